"""Attention patterns as a picture: a square a head, queries downwards, keys to the right."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from interp_jax.report.drawing import as_picture, drawing, shortened, wrapped
from interp_jax.report.picture import Picture

__all__ = ["attention_picture"]

_COLUMNS = 4
_MOST_LABELS = 40
"""Tokens up to which each has room for its label."""


def attention_picture(patterns: Any, labels: Sequence[str] | None = None, *, title: str = "") -> Picture:
    """What the heads of one layer attend to.

    Args:
        patterns: attention probabilities of one layer and prompt, `[heads, query, key]`:
            `attention_patterns(model, tokens)[layer, row]`.
        labels: of the tokens, `model.tokenizer.readable(tokens)`; numbers when None.
        title: written above.

    Raises:
        ValueError: for an array of another rank or an empty one, labels that are no texts, or another number of labels
            than of positions.
    """
    values = np.asarray(patterns, np.float32)
    if values.ndim != 3 or not values.size:
        raise ValueError(
            f"patterns have shape {values.shape}; expected [heads, query, key]: those of one layer and prompt."
        )
    if labels is not None and (isinstance(labels, str) or not all(isinstance(label, str) for label in labels)):
        raise ValueError("labels must be texts, one a token: model.tokenizer.readable(tokens) gives those of ids.")
    n_heads, n_queries, n_keys = values.shape
    names = list(map(str, range(n_keys))) if labels is None else [shortened(label, 14) for label in labels]
    if len(names) != n_keys or n_queries != n_keys:
        raise ValueError(f"{len(names)} labels, {n_queries} queries and {n_keys} keys: there must be as many of each.")
    columns = min(_COLUMNS, n_heads)
    rows = -(-n_heads // columns)
    with drawing():
        side = min(5.0, max(2.2, 0.9 + 0.16 * min(n_keys, _MOST_LABELS)))
        figure = Figure(figsize=(side * columns + 0.6, side * rows + 0.3), layout="constrained", dpi=150)
        grid = figure.subplots(rows, columns, squeeze=False)
        image = None
        every = -(-n_keys // _MOST_LABELS)
        for number, axes in enumerate(grid.flat):
            if number >= n_heads:
                axes.set_axis_off()
                continue
            image = axes.imshow(values[number], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"head {number}", fontsize=8)
            ticks = range(0, n_keys, every)
            axes.set_xticks(ticks, names[::every], rotation=90, fontsize=6)
            axes.set_yticks(ticks, names[::every] if number % columns == 0 else [], fontsize=6)
        grid[0, 0].set_ylabel("query")
        grid[-1, 0].set_xlabel("key")
        if image is not None:
            figure.colorbar(image, ax=grid, label="attention probability", fraction=0.03)
        figure.suptitle(wrapped(title, figure.get_figwidth()), fontsize=9)
        return as_picture(figure)

"""The logit lens as a picture: layers by positions, the likeliest next token a cell, its probability as colour."""

import numpy as np
from matplotlib.figure import Figure

from interp_jax.attribution.logit_lens import LogitLens
from interp_jax.report.drawing import as_picture, drawing, shortened
from interp_jax.report.picture import Picture

__all__ = ["logit_lens_picture"]


def logit_lens_picture(lens: LogitLens, row: int = 0) -> Picture:
    """What each layer would predict after each token.

    The last layer is on top. With a target the colour is its probability, else that of the likeliest token.

    Args:
        lens: what `logit_lens` gives.
        row: which prompt.

    Raises:
        IndexError: if there is no such prompt.
    """
    if not -len(lens.tokens) <= row < len(lens.tokens):
        raise IndexError(f"there is no prompt {row}: the lens has {len(lens.tokens)}.")
    words = [lens.tokenizer.readable(line) for line in lens.top_tokens[:, row, :, 0].tolist()]
    has_target = lens.target_probability is not None
    of_target = lens.top_probabilities[..., 0] if lens.target_probability is None else lens.target_probability
    values = np.asarray(of_target[:, row], np.float32)
    n_layers, n_positions = values.shape
    with drawing():
        size = min(40.0, 2.2 + 0.75 * n_positions), min(24.0, 1.8 + 0.24 * n_layers)
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        axes = figure.subplots()
        image = axes.imshow(
            values, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest"
        )
        for (layer, position), value in np.ndenumerate(values):
            word = shortened(words[layer][position], 9)
            color = "white" if value > 0.55 else "black"
            axes.text(position, layer, word, ha="center", va="center", fontsize=6.5, color=color)
        read = lens.tokenizer.readable(lens.tokens[row].tolist())
        axes.set_xticks(range(n_positions), [shortened(word) for word in read], rotation=90)
        axes.set_yticks(range(n_layers), ["-" if layer is None else str(layer) for layer in lens.layers])
        axes.set_ylabel(f"layer, at {lens.site}")
        axes.set_xlabel("token read")
        label = "probability of the target" if has_target else "probability of the token shown"
        figure.colorbar(image, ax=axes, label=label, fraction=0.05)
        return as_picture(figure)

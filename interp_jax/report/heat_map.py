"""A heat map of effects, layers by positions or heads: as PNG, and as the cells of a table in a page.

The colour scale diverges and is centred at 0, so that no effect has the ground's colour and sign is colour.
"""

import dataclasses
import io
import warnings
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

__all__ = ["HeatMap", "HeatMapCell", "as_png"]

_STYLE: dict[Any, Any] = {"text.parse_math": False, "font.size": 9}
_MOST_NUMBERS = 16
"""Columns up to which a cell has room for its number."""
_SMALLEST = 0.01
"""Numbers smaller than this share of the largest are left out; the pointer shows them."""


@dataclasses.dataclass(frozen=True)
class HeatMapCell:
    """What a page shows of one cell."""

    text: str
    """The number, short; empty where there is no room."""
    title: str
    """The whole of it, for the pointer."""
    percent: int
    """How strong the colour is, from 0 to 100."""
    is_positive: bool
    """Which of the two colours it is."""


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Effects by layer and one other axis."""

    title: str
    """What is shown."""
    values: Float[np.ndarray, "layers columns"]
    """The effects."""
    layers: tuple[str, ...]
    """A label for each row."""
    columns: tuple[str, ...]
    """A label for each column: tokens, or heads."""
    axis: str
    """What the columns are."""

    @property
    def largest(self) -> float:
        """The largest size of an effect, where the colours are full."""
        return max(float(np.abs(self.values).max(initial=0.0)), 1e-12)

    def cells(self) -> list[tuple[str, list[HeatMapCell]]]:
        """The rows with their labels."""
        with_numbers = len(self.columns) <= _MOST_NUMBERS
        rows = []
        for layer, row in zip(self.layers, self.values.tolist(), strict=True):
            cells = [
                HeatMapCell(
                    f"{value:.2f}" if with_numbers and abs(value) >= _SMALLEST * self.largest else "",
                    f"layer {layer}, {self.axis} {place}, {label}: {value:+.4g}",
                    round(100 * abs(value) / self.largest),
                    value > 0,
                )
                for place, (label, value) in enumerate(zip(self.columns, row, strict=True))
            ]
            rows.append((layer, cells))
        return rows


def as_png(heat_map: HeatMap) -> bytes:
    """The heat map as a PNG file, with a scale and readable labels.

    Args:
        heat_map: what to draw.
    """
    n_layers, n_columns = heat_map.values.shape
    width = min(24.0, max(4.5, 2.2 + 0.36 * n_columns))
    height = min(20.0, max(3.0, 2.4 + 0.2 * n_layers))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        axes = figure.subplots()
        norm = TwoSlopeNorm(0.0, -heat_map.largest, heat_map.largest)
        image = axes.imshow(heat_map.values, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(n_columns), [_short(label) for label in heat_map.columns], rotation=90)
        every = max(1, -(-n_layers // 40))
        axes.set_yticks(range(0, n_layers, every), heat_map.layers[::every])
        axes.set_ylabel("layer")
        axes.set_xlabel(heat_map.axis)
        axes.set_title(heat_map.title, fontsize=9, wrap=True)
        figure.colorbar(image, ax=axes, label="effect", fraction=0.05)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _short(label: str, most: int = 24) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"

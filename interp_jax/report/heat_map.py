"""A heat map of effects, layers by positions or heads: as PNG, and as the cells of a table in a page.

The colour scale diverges and is centred at 0, so that no effect has the ground's colour and sign is colour.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from interp_jax.attribution.nodes import Effects
from interp_jax.report.drawing import as_picture, drawing, shortened, wrapped
from interp_jax.report.picture import Picture

__all__ = ["HeatMap", "HeatMapCell", "effects_picture", "heat_map_picture"]

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

    @classmethod
    def of(cls, effects: Effects, site: str, axis: str | None = None) -> "HeatMap":
        """A site's effects by layer and one axis; over the others by which it was attributed they are summed.

        Args:
            effects: the effects.
            site: the site.
            axis: the axis; None is `position`, or the first that there is.

        Raises:
            ValueError: if the site was not attributed to, or not by this axis.
        """
        families = {family.site: family for family in effects.families}
        by = families[site].by if site in families else ()
        axis = axis or ("position" if "position" in by or not by else by[0])
        values = effects.grid(site, axis)
        columns = tuple(map(str, range(values.shape[1])))
        if axis == "position" and effects.labels is not None:
            columns = effects.labels
        summed = [other for other in by if other != axis]
        title = f"Effect of {site} by layer and {axis}" + (f", summed over {' and '.join(summed)}" if summed else "")
        layers = tuple("-" if layer is None else str(layer) for layer in families[site].layers)
        return cls(title, values, layers, columns, axis)

    @property
    def largest(self) -> float:
        """The largest size of a finite effect, where the colours are full."""
        return max(float(np.abs(self.values[np.isfinite(self.values)]).max(initial=0.0)), 1e-12)

    def cells(self) -> list[tuple[str, list[HeatMapCell]]]:
        """The rows with their labels."""
        with_numbers = len(self.columns) <= _MOST_NUMBERS
        rows = []
        for layer, row in zip(self.layers, self.values.tolist(), strict=True):
            cells = [
                HeatMapCell(
                    f"{value:.2f}" if with_numbers and not abs(value) < _SMALLEST * self.largest else "",
                    f"layer {layer}, {self.axis} {place}{'' if label == str(place) else f', {label}'}: {value:+.4g}",
                    0 if np.isnan(value) else round(100 * min(abs(value) / self.largest, 1.0)),
                    value > 0,
                )
                for place, (label, value) in enumerate(zip(self.columns, row, strict=True))
            ]
            rows.append((layer, cells))
        return rows


def effects_picture(effects: Effects, site: str | None = None, axis: str | None = None) -> Picture:
    """Effects as layers by positions or heads, in colour.

    Args:
        effects: what `activation_patching`, `atp` and the others give.
        site: the site; None where there is but one.
        axis: the axis beside the layers; None is `position`, or the first of those by which the site was attributed.

    Raises:
        ValueError: if the site was not attributed to, or not by this axis, or there are several to choose from.
    """
    sites = [family.site for family in effects.families]
    if site is None and len(set(sites)) > 1:
        raise ValueError(f"there are effects of {', '.join(sites)}: say which site.")
    return heat_map_picture(HeatMap.of(effects, sites[0] if site is None else site, axis))


def heat_map_picture(heat_map: HeatMap) -> Picture:
    """The heat map as PNG, with a scale and readable labels.

    Args:
        heat_map: what to draw.
    """
    n_layers, n_columns = heat_map.values.shape
    width = min(24.0, max(4.5, 2.2 + 0.36 * n_columns))
    height = min(20.0, max(3.0, 2.4 + 0.2 * n_layers))
    with drawing():
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        axes = figure.subplots()
        norm = TwoSlopeNorm(0.0, -heat_map.largest, heat_map.largest)
        axes.set_facecolor("0.6")  # which a NaN shows; white is the colour of zero
        image = axes.imshow(heat_map.values, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(n_columns), [shortened(label) for label in heat_map.columns], rotation=90)
        every = max(1, -(-n_layers // 40))
        axes.set_yticks(range(0, n_layers, every), heat_map.layers[::every])
        axes.set_ylabel("layer")
        axes.set_xlabel(heat_map.axis)
        axes.set_title(wrapped(heat_map.title, width), fontsize=9)
        figure.colorbar(image, ax=axes, label="effect", fraction=0.05)
        return as_picture(figure)

"""Pictures of ways to code against one another: the frontier of loss recovered and L0, and codes against codes."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

__all__ = ["CodingPoint", "frontier_figure", "scatter_figure"]

_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
_MARKERS = {"encoder": ("*", "none"), "encoder's largest": ("s", ":"), "gradient pursuit": ("o", "-")}
_OTHER_MARKER = ("D", "--")


@dataclasses.dataclass(frozen=True)
class CodingPoint:
    """A dictionary with a way of coding, as it was measured."""

    dictionary: str
    way: str
    l0: float
    """Latents a token, as they came out."""
    fvu: float
    """Fraction of variance unexplained."""
    loss: float
    """The model's, in nats a token, with the activation replaced."""
    recovered: float
    """Share of the zero ablation's loss that is recovered."""


def frontier_figure(points: Sequence[CodingPoint]) -> bytes:
    """Loss recovered against L0: a colour a dictionary, a line style a way of coding.

    Args:
        points: the points.

    Returns:
        A PNG file.
    """
    dictionaries = list(dict.fromkeys(point.dictionary for point in points))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for dictionary, way in dict.fromkeys((point.dictionary, point.way) for point in points):
            these = sorted((p.l0, p.recovered) for p in points if (p.dictionary, p.way) == (dictionary, way))
            marker, line = _MARKERS.get(way, _OTHER_MARKER)
            color = f"C{dictionaries.index(dictionary) % 10}"
            size = 13 if marker == "*" else 5
            axes.plot(*zip(*these, strict=True), marker=marker, linestyle=line, color=color, markersize=size)
            axes.lines[-1].set_label(f"{dictionary}: {way}".replace("$", r"\$"))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("L0: latents a token")
        axes.set_ylabel("loss recovered (1: clean, 0: zero-ablated)")
        axes.legend(fontsize=8)
        return _png(figure)


def scatter_figure(
    encoded: Float[np.ndarray, "latents tokens"],
    pursued: Float[np.ndarray, "latents tokens"],
    latents: Sequence[int],
    *,
    title: str,
) -> bytes:
    """Codes by pursuit against codes by the encoder, a panel a latent, tokens where either is active.

    Args:
        encoded: by the encoder.
        pursued: by pursuit.
        latents: their numbers.
        title: what the codes are of.

    Returns:
        A PNG file.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.2 * len(latents), 3.4), layout="constrained")
        panels = figure.subplots(1, len(latents), squeeze=False)[0]
        for axes, latent, by_encoder, by_pursuit in zip(panels, latents, encoded, pursued, strict=True):
            is_active = (by_encoder > 0) | (by_pursuit > 0)
            axes.scatter(by_encoder[is_active], by_pursuit[is_active], s=6, alpha=0.5, linewidths=0)
            most = max(float(by_encoder.max(initial=0)), float(by_pursuit.max(initial=0)), 1e-6)
            axes.plot([0, most], [0, most], color="0.6", linewidth=0.8)
            axes.set_title(f"latent {latent}: {int(is_active.sum())} tokens", fontsize=9)
            axes.set_xlabel("by the encoder")
        panels[0].set_ylabel("by pursuit")
        figure.suptitle(title.replace("$", r"\$"), fontsize=10)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()

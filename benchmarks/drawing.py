"""How the studies' figures are drawn: on white, in colours that a colour-blind reader tells apart."""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from interp_jax.whole_file import write_whole

__all__ = ["COLOURS", "FIGURES", "panels", "points_over_l0", "save"]

FIGURES = pathlib.Path("docs/figures")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def panels(n: int, *, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure of panels in a row.

    Args:
        n: how many.
        height: in inches.
    """
    figure = Figure(figsize=(4.3 * n, height), layout="constrained")
    axes = [figure.add_subplot(1, n, place + 1) for place in range(n)]
    for one in axes:
        one.grid(visible=True, color="#dddddd", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def points_over_l0(
    axes: Axes, l0s: Sequence[Sequence[float]], values: Sequence[Sequence[float]], series: int, **style: Any
) -> None:
    """A line through means over seeds, with the standard errors in both directions.

    Args:
        axes: where.
        l0s: a sequence of L0s, one a seed, for every point.
        values: the same of the values.
        series: number of the series, which decides on its colour and marker.
        **style: for matplotlib.
    """
    x, x_error = _mean_and_error(l0s)
    y, y_error = _mean_and_error(values)
    colour, marker = COLOURS[series % len(COLOURS)], MARKERS[series % len(MARKERS)]
    look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5, "capsize": 2.5, **style}
    axes.errorbar(x, y, xerr=x_error, yerr=y_error, **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _mean_and_error(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(values, float)
    return table.mean(axis=1), table.std(axis=1, ddof=1) / np.sqrt(table.shape[1])


def save(figure: Figure, name: str) -> pathlib.Path:
    """Writes the figure as an SVG file of the docs, the same bytes for the same numbers.

    Args:
        figure: the figure.
        name: of the file, without its suffix.

    Returns:
        Its path.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return write_whole(FIGURES / f"{name}.svg", file.getvalue())

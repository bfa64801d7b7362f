"""The page's pictures: matplotlib drawings as inline SVG that takes its colours and its font from the page.

A picture is drawn once and read on a light and on a dark ground, so no colour may be fixed in it. Each drawing uses a
few marker colours that occur nowhere else, and afterwards they are replaced by CSS variables of the page (`var(--ink)`
and so on). Text stays text: it can be selected, searched and read aloud.

`on_white` makes of such a drawing a picture that stands alone, for a notebook, a paper or a slide.

What matplotlib adds around the drawing (document type, metadata with addresses, a style sheet that would apply to the
whole page, ids that every drawing has alike) is taken off; the tests hold it to that.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from interp_jax.report.coding_point import CodingPoint
from interp_jax.report.demo_report import DictionaryScore, TrainingCurve
from interp_jax.report.picture import Picture
from interp_jax.steering.frontier import FrontierPoint

__all__ = [
    "codes_by_codes",
    "coding_frontier",
    "density_histogram",
    "frontier_picture",
    "on_white",
    "score_against_l0",
    "steering_frontier",
    "training_curve",
]

_INK, _MUTED, _RULE, _FIRST, _SECOND, _GROUND = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _GROUND: "var(--ground)",
}
_ON_WHITE = {
    "var(--ink)": "#1d1c1a",
    "var(--muted)": "#635f58",
    "var(--rule)": "#dedad2",
    "var(--first)": "#0b6aa8",
    "var(--second)": "#b4510a",
    "var(--ground)": "#ffffff",
}
_WAYS = (("*", "none"), ("s", ":"), ("o", "-"), ("D", "--"))
_MARKERS = "oDs^vPX*<>dhp"  # not ten, as the colours are: the eleventh of a study differs from the first in its mark
_SERIES = ((_FIRST, "o"), (_SECOND, "D"), (_INK, "s"), (_MUTED, "^"))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
    "text.parse_math": False,
    "text.usetex": False,
    # With parse_math off, "10^-3" of a log axis must not be written as mathematics.
    "axes.formatter.use_mathtext": False,
}


def training_curve(curve: TrainingCurve) -> Markup:
    """The curve over training steps, on a logarithmic scale where all values allow it.

    Args:
        curve: steps and values; values that are not finite leave gaps.

    Returns:
        An `<svg>` element.
    """
    values = np.asarray(curve.values, float)
    finite = values[np.isfinite(values)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("training step", curve.label)
        axes.plot(curve.steps, values, color=_FIRST, linewidth=1.8)
        if finite.size and finite.min() > 0 and finite.max() / finite.min() > 3:
            axes.set_yscale("log")
            _number_ticks(axes.yaxis, finite.min(), finite.max())
        if finite.size:
            label = (
                f"Line: {curve.label} over {len(curve.steps)} recorded training steps, "
                f"from {finite[0]:.3g} to {finite[-1]:.3g}."
            )
        else:
            label = "No training step was recorded."
        return _svg(figure, "training-curve", label)


def score_against_l0(scores: Sequence[DictionaryScore], quantity: str, label: str) -> Markup:
    """One quantity against L0, a point a way of coding, each named beside its point.

    Args:
        scores: the points; one that is not finite is left out.
        quantity: which field of a score is on the vertical axis.
        label: what it is, for the axis.

    Returns:
        An `<svg>` element.
    """
    points = [(score.method, float(score.l0), float(getattr(score, quantity))) for score in scores]
    points = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("L0 (active latents a token)", label)
        # The upper of two points has its name above it and the lower one below, so that close points keep readable
        # names.
        rank = {i: place for place, i in enumerate(sorted(range(len(points)), key=lambda i: points[i][2]))}
        for i, (method, l0, value) in enumerate(points):
            color, marker = _SERIES[i % len(_SERIES)]
            axes.plot(
                [l0], [value], marker=marker, color=color, markersize=9, linestyle="none", markeredgecolor=_GROUND
            )
            is_upper = rank[i] >= len(points) / 2
            axes.annotate(
                f"{_short(method)}: {value:.3f}",
                (l0, value),
                xytext=(0, 11 if is_upper else -11),
                textcoords="offset points",
                ha="center",
                va="bottom" if is_upper else "top",
                parse_math=False,
            )
        if points:
            l0s, values = np.array([p[1] for p in points]), np.array([p[2] for p in points])
            axes.set_xlim(max(0.0, l0s.min() * 0.5), max(l0s.max() * 1.5, 1.0))
            margin = max(np.ptp(values) * 0.6, abs(values).max() * 0.02, 1e-6)
            axes.set_ylim(values.min() - margin, values.max() + margin)
        spoken = "; ".join(f"{method} {value:.3f} at L0 {l0:.1f}" for method, l0, value in points)
        return _svg(figure, f"points-{quantity.replace('_', '-')}", f"Points: {label} against L0. {spoken}.")


def coding_frontier(points: Sequence[CodingPoint]) -> Markup:
    """Loss recovered against L0: a line a dictionary and way of coding.

    Args:
        points: the points.

    Returns:
        An `<svg>` element.
    """
    dictionaries = list(dict.fromkeys(point.dictionary for point in points))
    ways = list(dict.fromkeys(point.way for point in points))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("L0 (latents a token)", "loss recovered (1 clean, 0 zero-ablated)", (7.6, 4.4))
        for dictionary, way in dict.fromkeys((point.dictionary, point.way) for point in points):
            these = sorted((p.l0, p.recovered) for p in points if (p.dictionary, p.way) == (dictionary, way))
            marker, line = _WAYS[ways.index(way) % len(_WAYS)]
            number = dictionaries.index(dictionary)
            color = _SERIES[number][0] if number < 2 else f"C{number % 10}"
            x, y = np.array(these).T
            axes.plot(x, y, marker=marker, linestyle=line, color=color, markersize=5)
            axes.lines[-1].set_label(_short(f"{dictionary}: {way}"))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        legend = axes.legend(fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return _svg(figure, "coding-frontier", "Lines: loss recovered against L0. The table holds the numbers.")


def codes_by_codes(
    encoded: Float[np.ndarray, "latents tokens"], pursued: Float[np.ndarray, "latents tokens"], latents: Sequence[int]
) -> Markup:
    """Codes by pursuit against codes by the encoder, a panel a latent, tokens where either is active.

    Args:
        encoded: by the encoder.
        pursued: by pursuit.
        latents: their numbers.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(latents), "by the encoder", "by pursuit", (2.4 * len(latents), 2.8))
        for axes, latent, by_encoder, by_pursuit in zip(panels, latents, encoded, pursued, strict=True):
            is_active = (by_encoder > 0) | (by_pursuit > 0)
            most = max(float(by_encoder.max(initial=0)), float(by_pursuit.max(initial=0)), 1e-6)
            axes.plot([0, most], [0, most], color=_MUTED, linewidth=0.8)
            x, y = by_encoder[is_active], by_pursuit[is_active]
            axes.plot(x, y, linestyle="none", marker="o", markersize=2.5, color=_FIRST, markeredgewidth=0)
            axes.set_title(f"latent {latent}: {int(is_active.sum())} tokens", fontsize=9)
        label = f"Points: codes by pursuit against codes by the encoder, of latents {', '.join(map(str, latents))}."
        return _svg(figure, "codes-by-codes", label)


def steering_frontier(points: Sequence[FrontierPoint]) -> Markup:
    """Success of steered rollouts against the loss on ordinary text: a line a method, along its strengths.

    Points on a method's frontier are filled, the others hollow. Bars are the intervals of success.

    Args:
        points: the points; those of a method in the order of its strengths.

    Returns:
        An `<svg>` element.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("loss on ordinary text (nats a token)", "P(successful rollout)", (7.6, 4.8))
        for number, method in enumerate(methods):
            mine = [point for point in points if point.method == method]
            color = _SERIES[number][0] if number < 2 else f"C{number % 10}"
            marker = _MARKERS[number % len(_MARKERS)]
            x, y = [point.loss for point in mine], [point.success for point in mine]
            low = [max(0.0, point.success - point.success_interval[0]) for point in mine]
            high = [max(0.0, point.success_interval[1] - point.success) for point in mine]
            axes.errorbar(x, y, yerr=[low, high], color=color, linewidth=1.0, elinewidth=0.5, alpha=0.9)
            best = [point for point in mine if point.is_on_frontier]
            axes.plot(x, y, linestyle="none", marker=marker, color=color, markerfacecolor=_GROUND, markersize=5)
            axes.plot(
                [p.loss for p in best], [p.success for p in best],
                linestyle="none", marker=marker, color=color, markersize=6, label=_short(method),
            )  # fmt: skip
        axes.set_ylim(-0.03, 1.03)
        if methods:
            legend = axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
            for text in legend.get_texts():
                text.set_parse_math(False)
        label = f"Lines: success against loss for {len(methods)} methods. The table holds the numbers."
        return _svg(figure, "steering-frontier", label)


def on_white(drawn: Markup) -> Picture:
    """A drawing that stands alone, for a notebook or a file: in fixed colours, on white.

    Args:
        drawn: what one of the other functions gives.
    """
    text = str(drawn)
    for variable, color in _ON_WHITE.items():
        text = text.replace(variable, color)
    opening, rest = text.split(">", 1)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"', 1)
    return Picture(f'{opening}><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'.encode(), "svg")


def frontier_picture(points: Sequence[FrontierPoint]) -> Picture:
    """`steering_frontier` for a notebook or a file.

    Args:
        points: what `interp_jax.steering.frontier` gives; of several methods, one after another.
    """
    return on_white(steering_frontier(points))


def density_histogram(densities: Sequence[float]) -> Markup:
    """How often latents are active: a histogram of log10 density over the latents that are active at all.

    Args:
        densities: share of tokens on which each latent is active, 0 for dead ones.

    Returns:
        An `<svg>` element.
    """
    values = np.asarray(densities, float)
    alive = values[values > 0]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("share of tokens on which a latent is active", "latents")
        if alive.size:
            low = np.floor(np.log10(alive.min()))
            high = max(np.ceil(np.log10(alive.max())), low + 1)
            bins = np.logspace(low, high, int(high - low) * 10 + 1).tolist()
            axes.hist(alive, bins=bins, color=_FIRST, edgecolor=_GROUND, linewidth=0.6)
            axes.set_xscale("log")
            _number_ticks(axes.xaxis, alive.min(), alive.max())
        n_dead = values.size - alive.size
        label = f"Histogram of the density of {alive.size} latents; {n_dead} of {values.size} are never active."
        if alive.size:
            label += f" The median density is {np.median(alive):.2g}."
        return _svg(figure, "density-histogram", label)


def _axes(x_label: str, y_label: str, size: tuple[float, float] = (4.8, 3.1)) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels(1, x_label, y_label, size)
    return figure, axes


def _panels(n: int, x_label: str, y_label: str, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Axes side by side, of which the first says what is upwards."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0.0)
    panels = list(figure.subplots(1, n, squeeze=False)[0])
    for axes in panels:
        axes.patch.set_alpha(0.0)
        axes.set_xlabel(_short(x_label), parse_math=False)
        axes.grid(visible=True, which="major")
    panels[0].set_ylabel(_short(y_label), parse_math=False)
    return figure, panels


def _short(label: str, most: int = 44) -> str:
    """A label that leaves room for the drawing; the page says the whole of it in the caption or the table."""
    return label if len(label) <= most else label[: most - 1] + "…"


def _number_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, three a decade where there are few decades."""
    steps = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axis.set_minor_formatter(ticker.NullFormatter())


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The drawing as an `<svg>` element that can stand in an HTML page beside others."""
    file = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # The page's font draws the text in the end, so a glyph that matplotlib's font lacks is no loss.
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    # XML has no way to write control characters, which tokens and names may hold.
    text = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", file.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    # matplotlib names its own font; the page's is wanted, at the same size.
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    opening = f'<svg class="picture" role="img" aria-label="{escape(label)}" {view_box.group()}>'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip())

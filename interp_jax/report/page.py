"""The demo's page: one HTML file that holds everything it shows and asks for nothing else.

It opens from a file system without a network, and a content security policy inside it sees to it that nothing is ever
asked for. All text comes through jinja2's autoescaping: tokens, model output and names are data, and `<script>` is a
token like any other. The pictures alone are inserted as markup, and they are made here.

It reads without JavaScript; one small script, allowed by its hash, filters the latents. Colours follow the reader's
light or dark setting, and every text on a shaded token keeps a contrast of 4.5 to 1 or more in both (a test computes
it).
"""

import base64
import hashlib
import importlib.resources
import math
import os
import pathlib
from typing import Any

import jinja2
from markupsafe import Markup

from interp_jax.report import pictures
from interp_jax.report.demo_report import DemoReport
from interp_jax.whole_file import write_whole

__all__ = ["render_page", "write_page"]

SHADES = 10
"""How many steps of shading there are."""


def render_page(report: DemoReport) -> str:
    """The page as HTML.

    Args:
        report: what it shows.

    Returns:
        A whole document.
    """
    script = _resource("filter.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=_number, count=_count, share=_share, signed=_signed, shade=_shade, shape=_shape, duration=_duration
    )
    densities = [float(d) for d in report.densities]
    return environment.from_string(_resource("demo_page.html.jinja")).render(
        report=report,
        setting=report.setting,
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        shades=range(1, SHADES + 1),
        curve=pictures.training_curve(report.training_curve),
        recovered=pictures.score_against_l0(report.scores, "loss_recovered_zero", "loss recovered (zero ablation)"),
        unexplained=pictures.score_against_l0(report.scores, "fvu", "fraction of variance unexplained"),
        histogram=pictures.density_histogram(densities),
        n_dead=sum(density == 0 for density in densities),
        n_dense=sum(density > 0.1 for density in densities),
    )


def write_page(path: str | os.PathLike[str], report: DemoReport) -> pathlib.Path:
    """Writes the page, atomically.

    Args:
        path: the file, usually `demo/index.html`; one that is there is replaced.
        report: what it shows.

    Returns:
        The path.
    """
    return write_whole(path, render_page(report))


def _resource(name: str) -> str:
    return (importlib.resources.files("interp_jax.report") / name).read_text(encoding="utf-8")


def _is_missing(value: Any) -> bool:
    return value is None or not math.isfinite(value)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if _is_missing(value) else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "–" if _is_missing(value) else f"{value:,}"


def _share(value: float | None) -> str:
    """A share in percent, with three digits however small it is."""
    if value is None or _is_missing(value):
        return "–"
    return "0 %" if value == 0 else f"{100 * value:.3g} %" if abs(value) >= 1e-6 else f"{100 * value:.1e} %"


def _signed(value: float) -> str:
    return "–" if _is_missing(value) else f"{value:+g}".replace("-", "−")


def _shade(activation: float, highest: float) -> int:
    """The step of shading, 0 for none; any activation above 0 gets at least the first."""
    if not (activation > 0 and highest > 0):
        return 0
    return min(SHADES, max(1, math.ceil(SHADES * activation / highest)))


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""The page of `interp-jax steer`: steered texts beside unsteered ones, the frontier, and what was added, in latents.

It stands alone, opens without a network, and all text in it is escaped: a model may write `<script>`.
"""

import dataclasses
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from interp_jax.report import pictures
from interp_jax.steering.frontier import FrontierPoint
from interp_jax.steering.reading_vector import ReadVector

__all__ = ["Comparison", "ComparisonRow", "comparison", "steering_page"]


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """What was written at one strength."""

    coefficient: float
    parts: tuple[tuple[bool, str], ...]
    """The text in pieces: whether a piece is what counts as success, and the piece."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same prompt at several strengths."""

    title: str
    prompt: str
    rows: tuple[ComparisonRow, ...]


def comparison(
    title: str, prompt: str, texts: Sequence[tuple[float, str]], pattern: re.Pattern[str] | None = None
) -> Comparison:
    """Texts beside one another, with what counts as success marked.

    Args:
        title: what they are from.
        prompt: what they continue.
        texts: (coefficient, continuation) pairs.
        pattern: what counts as success; None marks nothing.
    """
    rows = []
    for coefficient, text in texts:
        parts, end = [], 0
        for found in pattern.finditer(text) if pattern else ():
            parts += [(False, text[end : found.start()]), (True, found.group())]
            end = found.end()
        parts.append((False, text[end:]))
        rows.append(ComparisonRow(coefficient, tuple(part for part in parts if part[1])))
    return Comparison(title, prompt, tuple(rows))


def steering_page(
    title: str,
    *,
    setting: dict[str, Any],
    comparisons: Sequence[Comparison],
    points: Sequence[FrontierPoint] = (),
    readings: Sequence[tuple[str, ReadVector]] = (),
) -> str:
    """The page as HTML.

    Args:
        title: what the model is steered to.
        setting: model, site and layer; with points also judged_by, provenance, n_rollouts, confidence, n_tokens and
            n_prompt.
        comparisons: texts beside one another.
        points: of all methods.
        readings: the latents of each method that has some, by its name.
    """
    template = (importlib.resources.files("interp_jax.report") / "steering_page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    defaults = {"judged_by": "", "provenance": "", "n_rollouts": 0, "confidence": "95 %", "n_tokens": 0, "n_prompt": 0}
    return environment.from_string(template).render(
        title=title,
        setting=defaults | setting,
        comparisons=comparisons,
        points=points,
        picture=pictures.steering_frontier(points) if points else "",
        readings=readings,
    )

"""The page of `interp-jax attribute`: heat maps and the ranked nodes.

It stands alone, opens without a network, and all text in it is escaped: a token may be `<script>`.
"""

import importlib.resources
from collections.abc import Sequence
from typing import Any

import jinja2

from interp_jax.report.heat_map import HeatMap

__all__ = ["attribution_page"]


def attribution_page(
    *, setting: dict[str, Any], ranked: Sequence[tuple[str, float]], heat_maps: Sequence[HeatMap]
) -> str:
    """The page as HTML.

    Args:
        setting: `model`, `method`, `site`, `question` (what an effect is, in words), `metric`, `clean` and `corrupted`
            (its values), `tokens` (pairs of clean and corrupted labels).
        ranked: labels of nodes with their effects, the largest first.
        heat_maps: what is drawn.
    """
    template = importlib.resources.files("interp_jax.report") / "attribution_page.html.jinja"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        setting=setting, ranked=ranked, heat_maps=heat_maps
    )

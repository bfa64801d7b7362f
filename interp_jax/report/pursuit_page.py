"""The page of `interp-jax pursue`: the frontier, codes against codes, and two codes side by side on the same texts.

It stands alone, opens without a network, and all text in it is escaped: a token may be `<script>`.
"""

import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float

from interp_jax.report import pictures
from interp_jax.report.coding_point import CodingPoint

__all__ = ["CodedToken", "LatentCode", "pursuit_page", "side_by_side"]


@dataclasses.dataclass(frozen=True)
class LatentCode:
    """A latent of a token's code."""

    latent: int
    weight: float
    is_shared: bool
    """Whether the other way of coding finds it too."""


@dataclasses.dataclass(frozen=True)
class CodedToken:
    """A token with its two codes."""

    token: str
    encoder: tuple[LatentCode, ...]
    pursuit: tuple[LatentCode, ...]


def side_by_side(token: str, encoder: dict[int, float], pursuit: dict[int, float], *, most: int = 6) -> CodedToken:
    """A token's two codes, the strongest latents of each.

    Args:
        token: its text.
        encoder: the encoder's weights by latent.
        pursuit: pursuit's.
        most: latents shown of each.
    """

    def strongest(code: dict[int, float], other: dict[int, float]) -> tuple[LatentCode, ...]:
        order = sorted(code, key=lambda latent: -code[latent])[:most]
        return tuple(LatentCode(latent, code[latent], latent in other) for latent in order)

    return CodedToken(token, strongest(encoder, pursuit), strongest(pursuit, encoder))


def pursuit_page(
    *,
    setting: dict[str, Any],
    clean: float,
    zero: float,
    points: Sequence[CodingPoint],
    encoded: Float[np.ndarray, "latents tokens"],
    pursued: Float[np.ndarray, "latents tokens"],
    latents: Sequence[int],
    first: str,
    k: int,
    texts: Sequence[Sequence[CodedToken]],
) -> str:
    """The page as HTML.

    Args:
        setting: model, site, layer, text and tokens.
        clean: the model's loss, nats a token.
        zero: its loss with the activation set to zero.
        points: each dictionary with each way of coding.
        encoded: codes by the encoder of some latents of the first dictionary.
        pursued: codes by pursuit of the same.
        latents: their numbers.
        first: that dictionary's name.
        k: how many latents a token they have.
        texts: tokens with their codes.
    """
    template = (importlib.resources.files("interp_jax.report") / "pursuit_page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        setting=setting,
        clean=clean,
        zero=zero,
        points=points,
        frontier=pictures.coding_frontier(points),
        scatter=pictures.codes_by_codes(encoded, pursued, latents),
        first=first,
        k=k,
        texts=texts,
    )

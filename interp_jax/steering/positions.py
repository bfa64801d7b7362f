"""Where in a row something is done to an activation.

In words, or as numbers of tokens of the prompt:

- `all`: at every position. The first new token is already under its influence.
- `prompt`: at the prompt's tokens only; what is generated attends to the changed prompt.
- `generated`: at the generated tokens only. The first of them is picked from the last position of the prompt, which is
  left alone, so it is always the unsteered one.
- a tuple of ints: once, at these tokens of the prompt, counted from 0 at its first id (the begin-of-text token, where
  one stands there), or from -1 at its last.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool

from interp_jax.models.decoding import Place

__all__ = ["Positions", "Stretch", "check_positions", "is_any_of", "is_at", "is_in"]

Stretch = Literal["all", "prompt", "generated"]
"""A part of every row."""

Positions = Stretch | tuple[int, ...]
"""Where something is done; see the module's docstring."""


def check_positions(positions: Positions, n_prompt: Sequence[int] = ()) -> None:
    """Refuses what no prompt has.

    Args:
        positions: what was asked for.
        n_prompt: how many tokens each prompt has.

    Raises:
        ValueError: it is no known word, there is no position, one is named twice, or a prompt is too short for it.
    """
    if isinstance(positions, str):
        if positions not in get_args(Stretch):
            words = ", ".join(get_args(Stretch))
            raise ValueError(f"positions is {positions!r}; expected {words}, or a tuple of numbers of prompt tokens.")
        return
    if not positions:
        raise ValueError("positions is empty; name at least one token of the prompt, or 'all'.")
    for length in n_prompt:
        outside = [at for at in positions if not -length <= at < length]
        if outside:
            raise ValueError(
                f"Position {outside[0]} is outside the prompt, which has {length} tokens: its positions are 0 to "
                f"{length - 1}, or -{length} to -1. Take a longer prompt, or positions='all'."
            )
        if len({at % length for at in positions}) < len(positions):
            raise ValueError(f"positions {positions} name a token of the prompt's {length} twice.")


def is_in(stretch: Stretch, place: Place) -> Bool[Array, "batch seq"]:
    """Which values stand in a part of their rows; padding on the left never does."""
    if stretch == "prompt":
        return place.is_prompt
    return place.is_generated if stretch == "generated" else place.position >= 0


def is_any_of(positions: Positions, place: Place) -> Bool[Array, "batch seq"]:
    """Which values something is done to."""
    return is_in(positions, place) if isinstance(positions, str) else is_at(positions, place).any(axis=0)


def is_at(positions: tuple[int, ...], place: Place) -> Bool[Array, "n batch seq"]:
    """For each of some positions of the prompt, which value stands there."""
    at = jnp.asarray(positions)[:, None]
    wanted = jnp.where(at < 0, at + place.n_prompt, at)
    return place.position == wanted[..., None]

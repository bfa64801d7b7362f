"""Where the true entries of a very large mask stand, without passing over it more than once.

A running count over all entries, searched once for each place, would cost more than a training step's other work on the
mask. Here 32 entries are packed into the bits of a word, which is all that reads the mask; counts and searches are over
the words, a thirty-second of them, and a place within a word is found among its bits by halving.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from interp_jax.sae.counts_up_to import counts_up_to

__all__ = ["TruePlaces", "first_true", "true_places"]

_BITS = 32


class TruePlaces(NamedTuple):
    """A mask, packed so that its true entries are found by their number."""

    words: UInt32[Array, "words"]
    """32 entries each, the first in the lowest bit."""
    running: Int[Array, "words"]
    """How many entries are true up to the end of each word."""

    @property
    def total(self) -> Int[Array, ""]:
        """How many entries are true."""
        return self.running[-1]


def true_places(mask: Bool[Array, "*shape"]) -> TruePlaces:
    """Packs a mask.

    Args:
        mask: of less than 2^31 entries.
    """
    flat = mask.ravel()
    if flat.size % _BITS:
        flat = jnp.pad(flat, (0, -flat.size % _BITS))
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(_BITS, dtype=jnp.uint32))
    words = jnp.sum(jnp.where(flat.reshape(-1, _BITS), bits, 0), axis=1, dtype=jnp.uint32)
    return TruePlaces(words, jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32)))


def first_true(places: TruePlaces, k: int) -> Int[Array, "k"]:
    """In rising order, where the first k true entries stand in the flattened mask; -1 for those that there are not.

    Args:
        places: the packed mask.
        k: how many.
    """
    words, running = places
    number = jnp.arange(k, dtype=jnp.int32)
    word = counts_up_to(running, k)
    is_there = word < len(words)
    word = jnp.minimum(word, len(words) - 1)
    before = jnp.where(word > 0, running[word - 1], 0)
    return jnp.where(is_there, word * _BITS + _place_of_bit(words[word], number - before), -1)


def _place_of_bit(words: UInt32[Array, "k"], number: Int[Array, "k"]) -> Int[Array, "k"]:
    """Where in each word the bit that is set for the number-th time stands, counted from zero."""
    place, width = jnp.zeros_like(number), _BITS // 2
    while width:
        low = jnp.right_shift(words, place.astype(jnp.uint32)) & jnp.uint32(2**width - 1)
        count = jax.lax.population_count(low).astype(jnp.int32)
        is_above = number >= count
        place, number = jnp.where(is_above, place + width, place), jnp.where(is_above, number - count, number)
        width //= 2
    return place

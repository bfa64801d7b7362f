"""The k-th largest of very many numbers, and where the k largest stand: exact, without a sort.

Floating-point numbers that are not negative are ordered as their bits are, so the k-th largest is found bit by bit: one
count of the numbers that reach a candidate for each of 31 bits. To count few numbers often, the search is in two
stages: the k largest lie in the k groups with the largest maxima.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["LargestPairs", "kth_largest", "largest_pairs"]

GROUP = 16


class LargestPairs(NamedTuple):
    """The largest entries of a matrix in the order of its rows."""

    values: Float[Array, "pairs"]
    """Zero where fewer entries are positive than were asked for."""
    rows: Int[Array, "pairs"]
    columns: Int[Array, "pairs"]


def kth_largest(values: Float[Array, "*shape"], k: int) -> Float[Array, ""]:
    """The k-th largest of the positive numbers, or zero where there are fewer than k.

    Args:
        values: float32; what is not positive counts as zero.
        k: which.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(values), jnp.int32)

    def narrow(number: Array, prefix: Array) -> Array:
        candidate = prefix | (1 << (30 - number))
        return jnp.where(jnp.sum(bits >= candidate, dtype=jnp.int32) >= k, candidate, prefix)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, narrow, jnp.int32(0)), jnp.float32)


def largest_pairs(values: Float[Array, "batch n"], k: int) -> LargestPairs:
    """The k largest positive entries of a matrix, with their rows and columns.

    Of several entries equal to the k-th largest, those of the first rows are taken.

    Args:
        values: float32.
        k: how many; at most the matrix' size.
    """
    batch, n = values.shape
    if n % GROUP or batch * n // GROUP <= k:
        places = _first_places(values.ravel(), k)
        return LargestPairs(jnp.where(places < 0, 0, values.ravel()[places]), *_split(places, n))
    groups = values.reshape(-1, GROUP)
    chosen = _first_places(jnp.max(groups, axis=1), k)
    candidates = jnp.where(chosen[:, None] < 0, 0, groups[chosen]).ravel()
    places = _first_places(candidates, k)
    of_group, within = _split(places, GROUP)
    row, group_of_row = _split(chosen[of_group], n // GROUP)
    found = jnp.where(places < 0, 0, candidates[places])
    return LargestPairs(found, row, group_of_row * GROUP + within)


def _split(places: Array, width: int) -> tuple[Array, Array]:
    """Row and column of places in a matrix; those that were not found are told by their value."""
    places = jnp.maximum(places, 0)
    return places // width, places % width


def _first_places(values: Float[Array, "n"], k: int) -> Int[Array, "k"]:
    """In rising order, where the k largest positive numbers stand; -1 for those that there are not."""
    kth = kth_largest(values, k)
    above = jnp.where(kth > 0, values > kth, values > 0)
    # Ties with the k-th fill what the larger ones leave, the first ones first.
    ties = (values == kth) & (kth > 0)
    room = k - jnp.sum(above, dtype=jnp.int32)
    is_kept = above | (ties & (jnp.cumsum(ties, dtype=jnp.int32) <= room))
    running = jnp.cumsum(is_kept, dtype=jnp.int32)
    places = jnp.searchsorted(running, jnp.arange(1, k + 1, dtype=jnp.int32)).astype(jnp.int32)
    return jnp.where(places < len(values), places, -1)

"""The k-th largest of very many numbers, and where the k largest stand: exact, without a sort.

Floating-point numbers that are not negative are ordered as their bits are, so the k-th largest is found bit by bit: one
count of the numbers that reach a candidate for each of 31 bits. To count few numbers often, the search is in two
stages: the k largest lie in the k groups with the largest maxima.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from interp_jax.sae.gpu_or_default import gpu_or_default
from interp_jax.sae.true_places import first_true, true_places

__all__ = ["LargestPairs", "kth_largest", "largest_pairs", "largest_pairs_of_shard"]

GROUP = 16
_BITS = 31
"""Of a float that is not negative."""


class LargestPairs(NamedTuple):
    """The largest entries of a matrix in the order of its rows."""

    values: Float[Array, "pairs"]
    """Zero where fewer entries are positive than were asked for."""
    rows: Int[Array, "pairs"]
    columns: Int[Array, "pairs"]


def kth_largest(values: Float[Array, "*shape"], k: int, axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """The k-th largest of the positive numbers, or zero where there are fewer than k.

    Args:
        values: float32; what is not positive counts as zero.
        k: which.
        axes: of a mesh over which the numbers are split, inside `jax.shard_map`.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(values), jnp.int32)

    def narrow(number: Any, prefix: Array) -> Array:
        candidate = prefix | (1 << (_BITS - 1 - number))
        count = jnp.sum(bits >= candidate, dtype=jnp.int32)
        if axes:
            # More than k are as good as k, and the counts of many shards might not fit 32 bits.
            count = jax.lax.psum(jnp.minimum(count, k), axes)
        return jnp.where(count >= k, candidate, prefix)

    def search(start: Array) -> Array:
        return jax.lax.fori_loop(0, _BITS, narrow, start)

    def search_unrolled(start: Array) -> Array:
        return functools.reduce(lambda prefix, number: narrow(number, prefix), range(_BITS), start)

    # Shards that count together do so in a loop on any device.
    found = search(jnp.int32(0)) if axes else gpu_or_default(jnp.int32(0), gpu=search_unrolled, default=search)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


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


def largest_pairs_of_shard(
    values: Float[Array, "rows n"], k: int, *, rows_axis: str, columns_axis: str
) -> LargestPairs:
    """What `largest_pairs` gives, of a matrix that is split over a mesh: a shard's own; inside `jax.shard_map`.

    Args:
        values: the shard of a float32 matrix.
        k: how many over all shards; at most the whole matrix' size.
        rows_axis: the mesh's axis that rows are split over.
        columns_axis: the mesh's axis that columns are split over.

    Returns:
        Those of the k largest that are in this shard, their rows and columns counted from its first ones; in as many
        places as there may be, filled up with zeros.
    """
    is_kept = _kept_of_shard(values, k, rows_axis, columns_axis)
    n, count = values.shape[1], min(k, values.size)
    places = first_true(true_places(is_kept), count)
    return LargestPairs(jnp.where(places < 0, 0, values.ravel()[places]), *_split(places, n))


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
    return first_true(true_places(above | (ties & (jnp.cumsum(ties, dtype=jnp.int32) <= room))), k)


def _kept_of_shard(values: Float[Array, "rows n"], k: int, rows_axis: str, columns_axis: str) -> Bool[Array, "rows n"]:
    """Which entries of a shard are among the k largest positive ones of all shards."""
    kth = kth_largest(values, k, (rows_axis, columns_axis))
    above = jnp.where(kth > 0, values > kth, values > 0)
    ties = (values == kth) & (kth > 0)
    room = k - jax.lax.psum(jnp.sum(above, dtype=jnp.int32), (rows_axis, columns_axis))
    # Ties are counted in the order of the whole matrix: by row, and within a row by column.
    of_shards = jax.lax.all_gather(jnp.sum(ties, axis=1, dtype=jnp.int32), columns_axis)
    of_rows = jnp.sum(of_shards, axis=0)
    of_row_shards = jax.lax.all_gather(jnp.sum(of_rows), rows_axis)

    def of_shards_before(counts: Array, axis: str) -> Array:
        return jnp.cumsum(counts, axis=0)[jax.lax.axis_index(axis)] - counts[jax.lax.axis_index(axis)]

    before = of_shards_before(of_row_shards, rows_axis) + jnp.cumsum(of_rows) - of_rows
    before = before + of_shards_before(of_shards, columns_axis)

    def first_ones(ties: Array) -> Array:
        return ties & (before[:, None] + jnp.cumsum(ties, axis=1, dtype=jnp.int32) <= room)

    # Nearly always the k-th largest is the only one of its size.
    return above | jax.lax.cond(jnp.sum(of_row_shards) <= room, lambda ties: ties, first_ones, ties)

"""How many of some sorted whole numbers are at most 0, 1, 2 and so on: where each range of a sorted list ends.

A binary search for each is what a CPU does best. On a GPU that is a loop of many small kernels, each waited for; there
the numbers are counted by what they are, and the counts summed up.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Int

from interp_jax.sae.gpu_or_default import gpu_or_default

__all__ = ["by_counting", "by_searching", "counts_up_to"]


def counts_up_to(values: Int[Array, "n"], size: int) -> Int[Array, "_size"]:
    """For each number from 0 to `size - 1`, how many of the values are at most as large.

    Args:
        values: in rising order, none below zero.
        size: how many numbers.
    """
    counting, searching = (functools.partial(each, size=size) for each in (by_counting, by_searching))
    return gpu_or_default(values, gpu=counting, default=searching)


def by_searching(values: Int[Array, "n"], size: int) -> Int[Array, "_size"]:
    """`counts_up_to` by binary searches."""
    return jnp.searchsorted(values, jnp.arange(size, dtype=values.dtype), side="right").astype(jnp.int32)


def by_counting(values: Int[Array, "n"], size: int) -> Int[Array, "_size"]:
    """`counts_up_to` by a histogram and its running sum."""
    return jnp.cumsum(jnp.zeros(size, jnp.int32).at[values].add(1, mode="drop"))

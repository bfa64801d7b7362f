"""Sums over the rows of tall matrices, which XLA for CPU computes three to five times slower than memory allows.

It walks down the columns. So what is a product with ones is written as one, and what is not, counts, goes through the
matrix in slices of rows on a CPU. Everywhere else XLA's own reduction is as it should be.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["count_positive", "over_rows"]

_ROWS = 64
"""Rows a slice: a few megabytes, which stay in the cache."""


def count_positive(matrix: Float[Array, "batch n"], *, is_split: bool = False) -> Int[Array, "n"]:
    """How many entries of each column are positive.

    Args:
        matrix: no derivative is taken through it.
        is_split: whether its rows are split over devices. Slices would then be sent from one to another.
    """
    if is_split:
        return _count(jax.lax.stop_gradient(matrix))
    return jax.lax.platform_dependent(jax.lax.stop_gradient(matrix), cpu=_by_slices, default=_count)


def _count(matrix: Float[Array, "batch n"]) -> Int[Array, "n"]:
    return jnp.sum(matrix > 0, axis=0, dtype=jnp.int32)


def _by_slices(matrix: Float[Array, "batch n"]) -> Int[Array, "n"]:
    batch, n = matrix.shape
    whole = batch // _ROWS * _ROWS

    def add(total: Array, rows: Array) -> tuple[Array, None]:
        return total + _count(rows), None

    total, _ = jax.lax.scan(add, jnp.zeros(n, jnp.int32), matrix[:whole].reshape(-1, _ROWS, n))
    return total + _count(matrix[whole:])


def over_rows(row: Float[Array, "n"], batch: int) -> Float[Array, "batch n"]:
    """One row for every row of a batch: a broadcast, whose transpose is a product with ones.

    Args:
        row: the row.
        batch: how often.
    """
    ones = jnp.ones((batch, 1), row.dtype)
    return jax.lax.dot(ones, row[None], precision=jax.lax.Precision.HIGHEST)

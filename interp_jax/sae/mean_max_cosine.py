"""Mean-max cosine similarity (MMCS): how much of one dictionary is in another (Sharkey et al., "Taking features out of
superposition with sparse autoencoders", 2022).

It tells directions alone, whatever their norms and order. It is not symmetric: a dictionary that holds all of the true
directions and others besides has 1 as the second argument, and less as the first.

Two wide dictionaries have billions of pairs, so cosines are made a block at a time, a few megabytes each.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["max_cosines", "mean_max_cosine"]

_BLOCK = 1024
"""Rows of either side whose cosines exist at a time: 4 MiB."""


def mean_max_cosine(truth: Float[Array, "n d_in"], dictionary: Float[Array, "d_sae _d_in"]) -> float:
    """Mean over true directions of the greatest cosine similarity with a row of the dictionary (MMCS).

    Args:
        truth: the directions that should be found, or another dictionary.
        dictionary: those that were.

    Returns:
        -1 to 1. Rows of zero, which have no direction, are left out on both sides; NaN where no others are left.

    Raises:
        ValueError: if the two differ in width.
    """
    found = max_cosines(truth, dictionary)[np.any(np.asarray(truth) != 0, axis=1)]
    return float(np.mean(found, dtype=np.float64)) if found.size else float("nan")


def max_cosines(truth: Float[Array, "n d_in"], dictionary: Float[Array, "d_sae _d_in"]) -> Float[np.ndarray, "n"]:
    """For each true direction the greatest cosine similarity with a row of the dictionary.

    Args:
        truth: the directions that should be found, or another dictionary.
        dictionary: those that were.

    Returns:
        NaN for a direction of zero, and everywhere if the dictionary has no row but zero.

    Raises:
        ValueError: if the two differ in width.
    """
    if truth.shape[1] != dictionary.shape[1]:
        raise ValueError(
            f"truth has shape {truth.shape} and dictionary {dictionary.shape}; expected rows of the same width. A "
            "dictionary's rows are W_dec's."
        )
    greatest = np.full(len(truth), np.nan, np.float32)
    for start in range(0, len(truth), _BLOCK):
        rows = truth[start : start + _BLOCK]
        best = jnp.full(len(rows), -jnp.inf)
        for first in range(0, len(dictionary), _BLOCK):
            best = _greater(best, rows, dictionary[first : first + _BLOCK])
        greatest[start : start + len(rows)] = np.where(np.isneginf(best), np.nan, best)
    return greatest


@jax.jit
def _greater(
    best: Float[Array, "n"], truth: Float[Array, "n d_in"], dictionary: Float[Array, "d_sae d_in"]
) -> Float[Array, "n"]:
    """The greater of the best so far and the cosines with these rows; -inf where either is zero."""
    truth, is_truth = _unit(truth)
    dictionary, is_row = _unit(dictionary)
    # On a TPU the default would round the factors to bfloat16, 1 to 0.996.
    cosines = jnp.matmul(truth, dictionary.T, precision=jax.lax.Precision.HIGHEST)
    cosines = jnp.where(is_truth & is_row.T, cosines, -jnp.inf)
    return jnp.maximum(best, jnp.max(cosines, axis=1))


def _unit(rows: Float[Array, "n d_in"]) -> tuple[Array, Array]:
    """Rows of norm one, and which of them are not zero; NaN is not, and comes through."""
    rows = rows.astype(jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms != 0, norms, 1), norms != 0

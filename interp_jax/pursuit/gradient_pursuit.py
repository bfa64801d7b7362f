"""Gradient pursuit: all active weights move along their gradient, by an exact line search, once an atom is picked.

The method is gradient pursuit (Blumensath and Davies, "Gradient Pursuits", IEEE Transactions on Signal Processing,
2008) in the form that the DeepMind mechanistic interpretability team's progress update #1 (2024) uses to judge SAE
decoders apart from their encoders. A step picks the atom that correlates most with the residual, adds it to the
active set, and moves all active weights along the negative gradient by the exact line-search step; negative weights
are then clipped to zero, and an atom whose weight is zero is no longer active.

Gradients are those of the unrolled steps (`greedy`).

Hazards: the steps are not least squares, so the weights on the chosen atoms are near their optimum, not at it. An atom
picked again is refined and not duplicated; `l0_reached` then stays below `l0`, and says so.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from interp_jax.pursuit.greedy import FINISHED, Method, pursue
from interp_jax.pursuit.sparse_code import PRECISE, SparseCode

__all__ = ["gradient_pursuit"]


def gradient_pursuit(
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int | Int[Array, "..."],
    *,
    max_l0: int | None = None,
    nonnegative: bool = True,
    tolerance: float = 0.0,
    mesh: Mesh | None = None,
) -> SparseCode:
    """Finds codes with at most `l0` atoms a signal by gradient pursuit.

    Large batches are worked on in chunks. Zero signals have zero codes; zero atoms are never picked.

    Args:
        signals: what to approximate. A decoder bias is the caller's to subtract.
        dictionary: one atom a row, of any norm. Weights are in units of the atom as it stands. In bfloat16 its products
            are summed in float32.
        l0: the most atoms a signal may use, and the number of steps; or one such number a signal.
        max_l0: the most that any signal may use, where `l0` is an array: the width of the codes. More counts as that.
        nonnegative: clip weights at zero after each step and pick by signed correlation; else by its absolute value.
        tolerance: a signal is left alone once its residual's norm is at most this share of its own norm; a Python
            number, static under jit.
        mesh: devices of axes `data` and `latent`: signals are split over the one, the dictionary over the other, which
            is never gathered. None is one device.

    Returns:
        The codes. Correlations within rounding error of zero (four times the dtype's epsilon, relative to the signal)
        count as zero, so an exact fit stops there.

    Raises:
        ValueError: for mismatched widths, `l0` outside 1..d_sae, a negative tolerance, a dtype that is not floating, a
            mesh that does not divide, or a dictionary that holds NaN or infinity (where its values are known: outside
            jit). Inside jit such a dictionary gives codes of zeros with `residual_norm` NaN, as a signal with NaN does
            anywhere.
    """
    method = _METHODS[nonnegative]
    return pursue(
        method, signals, dictionary, l0, max_l0=max_l0, nonnegative=nonnegative, tolerance=tolerance, mesh=mesh
    )


def _refine(
    weights: Float[Array, "batch l0"],
    carried: Any,
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slot: Int[Array, "batch"],
    number: Int[Array, ""] | None,
    *,
    nonnegative: bool,
) -> tuple[Float[Array, "batch l0"], Any]:
    """One gradient step with exact line search on the active slots: of non-zero weight, and the one just picked."""
    is_active = (weights != 0) | (jnp.arange(weights.shape[1])[None] == slot[:, None])
    is_active &= slot[:, None] != FINISHED
    gradient = jnp.where(is_active, products - jnp.einsum("bij,bj->bi", gram, weights, precision=PRECISE), 0)
    squared = jnp.sum(jnp.square(gradient), axis=1)
    curvature = jnp.einsum("bi,bij,bj->b", gradient, gram, gradient, precision=PRECISE)
    # A zero direction changes nothing. Both selects are needed: the inner one keeps 0/0 out of the derivative too.
    is_moving = curvature > jnp.finfo(weights.dtype).tiny
    size = jnp.where(is_moving, squared / jnp.where(is_moving, curvature, 1), 0)
    moved = weights + size[:, None] * gradient
    return (jnp.where(moved > 0, moved, 0) if nonnegative else moved), carried


def _replay(
    weights: Float[Array, "batch l0"],
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slots: Int[Array, "batch steps"],
    *,
    nonnegative: bool,
) -> Float[Array, "batch l0"]:
    def step(weights: Array, slot: Array) -> tuple[Array, None]:
        return _refine(weights, None, gram, products, slot, None, nonnegative=nonnegative)

    return jax.lax.scan(step, jnp.zeros_like(products), slots.T)[0]


_METHODS = {
    nonnegative: Method(
        start=lambda batch, l0, dtype: None,
        refine=functools.partial(_refine, nonnegative=nonnegative),
        replay=functools.partial(_replay, nonnegative=nonnegative),
    )
    for nonnegative in (True, False)
}

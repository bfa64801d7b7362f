"""Matching pursuit: the atom that fits the residual best is subtracted, as much of it as there is (Mallat, Zhang 1993).

"Matching pursuits with time-frequency dictionaries", IEEE Transactions on Signal Processing, 1993. A step changes one
weight by the residual's product with that atom; weights found before are left as they are, and an atom picked again
adds to its weight. The cheapest pursuit and the crudest: of correlated atoms it takes several in turn for what one step
of `orthogonal_matching_pursuit` would settle.

Gradients are those of the unrolled steps (`greedy`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from interp_jax.pursuit.greedy import Method, pursue
from interp_jax.pursuit.sparse_code import PRECISE, SparseCode

__all__ = ["matching_pursuit"]


def matching_pursuit(
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int | Int[Array, "..."],
    *,
    max_l0: int | None = None,
    nonnegative: bool = True,
    tolerance: float = 0.0,
    mesh: Mesh | None = None,
) -> SparseCode:
    """Finds codes with at most `l0` atoms a signal by matching pursuit, in `l0` steps.

    Args:
        signals: as in `gradient_pursuit`.
        dictionary: as in `gradient_pursuit`.
        l0: as in `gradient_pursuit`.
        max_l0: as in `gradient_pursuit`.
        nonnegative: pick by signed correlation, so that every step adds to a weight; else by its absolute value, and
            weights may have any sign.
        tolerance: as in `gradient_pursuit`.
        mesh: as in `gradient_pursuit`.

    Returns:
        The codes.

    Raises:
        ValueError: as in `gradient_pursuit`.
    """
    return pursue(
        _METHOD, signals, dictionary, l0, max_l0=max_l0, nonnegative=nonnegative, tolerance=tolerance, mesh=mesh
    )


def _refine(
    weights: Float[Array, "batch l0"],
    carried: Any,
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slot: Int[Array, "batch"],
    number: Int[Array, ""] | None,
) -> tuple[Float[Array, "batch l0"], Any]:
    is_picked = jnp.arange(weights.shape[1])[None] == slot[:, None]
    left = products - jnp.einsum("bij,bj->bi", gram, weights, precision=PRECISE)
    return weights + jnp.where(is_picked, left, 0), carried


def _replay(
    weights: Float[Array, "batch l0"],
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slots: Int[Array, "batch steps"],
) -> Float[Array, "batch l0"]:
    def step(weights: Array, slot: Array) -> tuple[Array, None]:
        return _refine(weights, None, gram, products, slot, None)

    return jax.lax.scan(step, jnp.zeros_like(products), slots.T)[0]


_METHOD = Method(start=lambda batch, l0, dtype: None, refine=_refine, replay=_replay)

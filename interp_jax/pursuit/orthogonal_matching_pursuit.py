"""Orthogonal matching pursuit: after each atom the weights of all are solved for anew (Pati et al. 1993).

"Orthogonal matching pursuit: recursive function approximation with applications to wavelet decomposition", Asilomar
1993. Weights are least squares on the atoms that were picked, so the residual is orthogonal to them.

Signed, the inverse of the Gram matrix' Cholesky factor grows by one row a step, in O(l0^2); the weights come from it by
two products and two steps of iterative refinement, which take back most of what the running inverse loses by rounding;
weights that would leave more than those before are not taken. An atom that depends on those before it (in float32: at
an angle below 0.003 to their span) has no row, and weight zero; as it would be picked again, that signal's search ends
there.

Non-negative, each step solves least squares under `weights >= 0` to its Karush-Kuhn-Tucker conditions by the active-set
method of Lawson and Hanson ("Solving Least Squares Problems", 1974, chapter 23), all signals at once, warm-started at
the weights of the step before. An atom whose weight comes to zero keeps its slot, and may come back.

Gradients are implicit: the exact derivative of least squares on the atoms whose weight is not zero (`greedy`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from interp_jax.pursuit.greedy import FINISHED, Method, pursue
from interp_jax.pursuit.norms import norm, safe_inverse
from interp_jax.pursuit.sparse_code import PRECISE, SparseCode

__all__ = ["kkt_violation", "nonnegative_omp", "orthogonal_matching_pursuit"]


def orthogonal_matching_pursuit(
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int | Int[Array, "..."],
    *,
    max_l0: int | None = None,
    nonnegative: bool = True,
    tolerance: float = 0.0,
    mesh: Mesh | None = None,
) -> SparseCode:
    """Finds codes with at most `l0` atoms a signal by orthogonal matching pursuit, in `l0` steps.

    Args:
        signals: as in `gradient_pursuit`.
        dictionary: as in `gradient_pursuit`.
        l0: as in `gradient_pursuit`.
        max_l0: as in `gradient_pursuit`.
        nonnegative: weights of at least zero, and atoms picked by signed correlation; else least squares without
            bounds, and atoms picked by its absolute value.
        tolerance: as in `gradient_pursuit`.
        mesh: as in `gradient_pursuit`.

    Returns:
        The codes.

    Raises:
        ValueError: as in `gradient_pursuit`.
    """
    method = _NONNEGATIVE if nonnegative else _SIGNED
    return pursue(
        method, signals, dictionary, l0, max_l0=max_l0, nonnegative=nonnegative, tolerance=tolerance, mesh=mesh
    )


def nonnegative_omp(
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int | Int[Array, "..."],
    **options,
) -> SparseCode:
    """Non-negative orthogonal matching pursuit, each step solved to its KKT conditions: the reference for the others.

    Args:
        signals: as in `gradient_pursuit`.
        dictionary: as in `gradient_pursuit`.
        l0: as in `gradient_pursuit`.
        **options: `max_l0`, `tolerance` and `mesh` of `gradient_pursuit`.
    """
    return orthogonal_matching_pursuit(signals, dictionary, l0, nonnegative=True, **options)


def kkt_violation(
    code: SparseCode, signals: Float[Array, "*batch d_in"], dictionary: Float[Array, "d_sae d_in"]
) -> Float[Array, "*batch"]:
    """How far a code is from the best non-negative weights on its own atoms; zero at the optimum.

    The largest of what must vanish there: a negative weight, and the residual's correlation with an atom in use, each
    as a share of the signal's norm, for atoms of norm one. NaN for a signal with a NaN.

    Args:
        code: the code.
        signals: what it is of.
        dictionary: the dictionary that it was found in.
    """
    # All of norm one first: products of small or of large numbers would leave the dtype's range.
    atoms, signals = (value.astype(code.weights.dtype) for value in (dictionary[code.indices], signals))
    norms, scales = norm(atoms), norm(signals)
    inverse_scales = safe_inverse(scales)[..., None]
    units, weights = atoms * safe_inverse(norms)[..., None], code.weights * norms * inverse_scales
    residual = signals * inverse_scales - jnp.einsum("...k,...kd->...d", weights, units, precision=PRECISE)
    correlations = jnp.einsum("...kd,...d->...k", units, residual, precision=PRECISE)
    violations = jnp.maximum(jnp.abs(correlations), jnp.maximum(0, -weights))
    largest = jnp.max(jnp.where(code.indices >= 0, violations, 0), axis=-1, initial=0)
    return jnp.where(jnp.isnan(scales), jnp.nan, largest)


def _times(matrix: Float[Array, "batch l0 l0"], vector: Float[Array, "batch l0"]) -> Float[Array, "batch l0"]:
    return jnp.einsum("bij,bj->bi", matrix, vector, precision=PRECISE)


def _transpose_times(matrix: Float[Array, "batch l0 l0"], vector: Float[Array, "batch l0"]) -> Float[Array, "batch l0"]:
    return jnp.einsum("bji,bj->bi", matrix, vector, precision=PRECISE)


def _refine_signed(
    weights: Float[Array, "batch l0"],
    inverse: Float[Array, "batch l0 l0"],
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slot: Int[Array, "batch"],
    number: Int[Array, ""],
) -> tuple[Float[Array, "batch l0"], Float[Array, "batch l0 l0"]]:
    """One more row of the inverse factor, and the weights that it gives.

    With G = L L^T and M = L^-1, a new atom of correlations g with those before it and norm one has the row
    [-(M g)^T M, 1] / d, where d^2 = 1 - |M g|^2.
    """
    is_number = jnp.arange(weights.shape[1]) == number
    before = jnp.where(is_number, 0, jnp.take(gram, number, axis=2))
    projected = _times(inverse, before)
    squared = jnp.take(jnp.diagonal(gram, axis1=1, axis2=2), number, axis=1) - jnp.sum(jnp.square(projected), axis=1)
    is_new = (slot == number) & (squared > 64 * jnp.finfo(weights.dtype).eps)
    row = jnp.where(is_number, 1, -_transpose_times(inverse, projected))
    row = row * jax.lax.rsqrt(jnp.where(is_new, squared, 1))[:, None]
    inverse = jnp.where((is_new[:, None] & is_number)[:, :, None], row[:, None, :], inverse)

    def solve(right: Array) -> Array:
        return _transpose_times(inverse, _times(inverse, right))

    is_held = jnp.any(inverse != 0, axis=2)
    solved = solve(products)
    for _ in range(2):
        solved = solved + solve(jnp.where(is_held, products - _times(gram, solved), 0))

    def left(weights: Array) -> Array:
        """The squared residual, but for the target's own square."""
        return jnp.sum(weights * (_times(gram, weights) - 2 * products), axis=1)

    is_taken = (slot != FINISHED) & (left(solved) <= left(weights))
    return jnp.where(is_taken[:, None], solved, weights), inverse


def _refine_nonnegative(
    weights: Float[Array, "batch l0"],
    carried: Any,
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slot: Int[Array, "batch"],
    number: Int[Array, ""],
) -> tuple[Float[Array, "batch l0"], Any]:
    l0 = weights.shape[1]
    is_held = jnp.diagonal(gram, axis1=1, axis2=2) > 0
    floor = 4 * jnp.finfo(weights.dtype).eps
    slots = jnp.arange(l0)

    def is_unfinished(state: tuple[Array, ...]) -> Array:
        _, _, is_done, count = state
        return jnp.any(~is_done) & (count < 3 * l0)

    def work(state: tuple[Array, ...]) -> tuple[Array, ...]:
        weights, is_passive, is_done, count = state
        solved = _least_squares(gram, products, is_passive)
        # Weights that are no numbers come of atoms that depend on one another: what was there before stands.
        is_bad = ~jnp.all(jnp.isfinite(solved), axis=1)
        is_blocking = is_passive & (solved <= 0)
        has_blocking = jnp.any(is_blocking, axis=1)
        # As far towards the solution as the first weight that would turn negative.
        gap = weights - solved
        shares = jnp.where(is_blocking, weights / jnp.where(gap > 0, gap, 1), jnp.inf)
        share = jnp.where(has_blocking, jnp.min(shares, axis=1), 1)
        moved = jnp.where(is_passive, weights + share[:, None] * (solved - weights), 0)
        is_leaving = is_blocking & (shares <= share[:, None])
        moved = jnp.where(is_leaving, 0, jnp.maximum(moved, 0))
        moved = jnp.where(has_blocking[:, None], moved, jnp.where(is_passive, solved, 0))
        # Solved without a bound in the way: an atom that was left out comes back if it would help.
        gradient = products - _times(gram, moved)
        scores = jnp.where(is_held & ~is_passive, gradient, -jnp.inf)
        best = jnp.argmax(scores, axis=1)
        is_better = ~has_blocking & (jnp.max(scores, axis=1) > floor)
        is_entering = is_better[:, None] & (slots == best[:, None])
        is_finished = is_bad | (~has_blocking & ~is_better)
        keep = (is_done | is_bad)[:, None]
        return (
            jnp.where(keep, weights, moved),
            jnp.where(keep, is_passive, (is_passive & ~is_leaving) | is_entering),
            is_done | is_finished,
            count + 1,
        )

    is_passive = (weights > 0) | (slots == slot[:, None])
    start = (weights, is_passive, slot == FINISHED, jnp.int32(0))
    return jax.lax.while_loop(is_unfinished, work, start)[0], carried


def _least_squares(
    gram: Float[Array, "batch l0 l0"], products: Float[Array, "batch l0"], is_chosen: Bool[Array, "batch l0"]
) -> Float[Array, "batch l0"]:
    """`gram^-1 products` on the chosen slots, zero elsewhere; solved twice, the second time for what the first left."""
    eye = jnp.eye(gram.shape[1], dtype=gram.dtype)
    chosen = jnp.where(is_chosen[:, :, None] & is_chosen[:, None, :], gram, eye)
    right = jnp.where(is_chosen, products, 0)
    factor = jnp.linalg.cholesky(chosen)

    def solve(right: Array) -> Array:
        lower = jax.lax.linalg.triangular_solve(factor, right[..., None], left_side=True, lower=True)
        upper = jax.lax.linalg.triangular_solve(factor, lower, left_side=True, lower=True, transpose_a=True)
        return upper[..., 0]

    solved = solve(right)
    return solved + solve(right - _times(chosen, solved))


def _replay(
    weights: Float[Array, "batch l0"],
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slots: Int[Array, "batch steps"],
) -> Float[Array, "batch l0"]:
    is_chosen = weights != 0
    return jnp.where(is_chosen, _least_squares(gram, products, is_chosen), 0)


_SIGNED = Method(
    start=lambda batch, l0, dtype: jnp.zeros((batch, l0, l0), dtype), refine=_refine_signed, replay=_replay
)
_NONNEGATIVE = Method(start=lambda batch, l0, dtype: None, refine=_refine_nonnegative, replay=_replay)

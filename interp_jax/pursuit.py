"""Gradient pursuit: the sparse code of a signal in a fixed dictionary, found at inference time, without an encoder.

The method is gradient pursuit (Blumensath and Davies, "Gradient Pursuits", IEEE Transactions on Signal Processing,
2008) in the form that the DeepMind mechanistic interpretability team's progress update #1 (2024) uses to judge SAE
decoders apart from their encoders. A step picks the atom that correlates most with the residual, adds it to the
active set, and moves all active weights along the negative gradient by the exact line-search step; negative weights
are then clipped to zero, and an atom whose weight is zero is no longer active.

How it is laid out, and why:

- The post's version keeps dense weights and spends three products with the whole dictionary on each step. Here the
  active set is explicit: k indices, k gathered atoms and their Gram matrix. One product with the whole dictionary
  remains, which finds the next atom; gradient, step size and clipping happen in the k x k space of the Gram matrix.
- `jnp.argmax` of a [batch, d_sae] matrix does not vectorise on CPU and would cost 40 % of the product. Maxima of blocks
  do, and leave an argmax over the blocks and one inside the best block.
- Atoms may have any norm: each is used as if it had norm one, and its weight divided by its norm at the end, so
  that rescaling an atom changes its weight and nothing else. This takes one scaled copy of the dictionary, which is
  cheaper than scaling [batch, d_sae] products on every step. Signals are scaled to norm one in the same way, so that
  very small and very large ones neither underflow nor overflow.

Gradients (forward and reverse mode, with respect to signals and dictionary) are those of the steps with the choice of
atoms held fixed. They come from replaying the steps in the Gram space, where a step costs nothing beside a product with
the dictionary; nothing of size [batch, d_sae] is kept for them. The choice itself is piecewise constant: at the
points where it jumps the gradient is one-sided.

Hazards: the steps are not least squares, so the weights on the chosen atoms are near their optimum, not at it. An atom
picked again is refined and not duplicated; `l0_reached` then stays below `l0`, and says so.
"""

import functools
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CHUNK = 512
"""Signals worked on at a time: bounds memory at about CHUNK * (d_sae + l0 * d_in) numbers, whatever the batch."""

BLOCK = 128
"""Neighbouring atoms whose best correlation is found together."""

_PRECISE = jax.lax.Precision.HIGHEST


class SparseCode(NamedTuple):
    """A batch of sparse codes. Slots that hold an atom come first; an unused slot has index -1 and weight 0."""

    indices: Int[Array, "*batch l0"]
    """The atoms' rows in the dictionary, in the order in which they were first picked."""
    weights: Float[Array, "*batch l0"]
    """What each atom is multiplied by."""
    l0_reached: Int[Array, "*batch"]
    """How many weights are not zero; less than `l0` where no atom was left that would help."""
    residual_norm: Float[Array, "*batch"]
    """Norm of `signal - decode`. NaN where the signal or its products were not finite."""

    def dense(self, d_sae: int) -> Float[Array, "*batch d_sae"]:
        """The codes as dense rows.

        Args:
            d_sae: number of atoms in the dictionary.
        """
        batch = self.weights.shape[:-1]
        indices, weights = (
            self.indices.reshape(-1, self.indices.shape[-1]),
            self.weights.reshape(-1, self.weights.shape[-1]),
        )
        rows = jnp.arange(indices.shape[0])[:, None]
        dense = jnp.zeros((indices.shape[0], d_sae), weights.dtype).at[rows, indices].add(weights)
        return dense.reshape(*batch, d_sae)

    def decode(self, dictionary: Float[Array, "d_sae d_in"]) -> Float[Array, "*batch d_in"]:
        """The signals that the codes stand for.

        Args:
            dictionary: the dictionary that the codes were found in, one atom a row.
        """
        return jnp.einsum("...k,...kd->...d", self.weights, dictionary[self.indices], precision=_PRECISE)


def gradient_pursuit(
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int,
    *,
    nonnegative: bool = True,
    tolerance: float = 0.0,
) -> SparseCode:
    """Finds codes with at most `l0` atoms a signal by gradient pursuit.

    Large batches are worked on `CHUNK` signals at a time. Zero signals have zero codes; zero atoms are never picked.

    Args:
        signals: what to approximate. A decoder bias is the caller's to subtract.
        dictionary: one atom a row, of any norm. Weights are in units of the atom as it stands.
        l0: the most atoms a signal may use, and the number of steps.
        nonnegative: clip weights at zero after each step and pick by signed correlation; else by its absolute value.
        tolerance: a signal is left alone once its residual's norm is at most this share of its own norm.

    Returns:
        The codes. Correlations within rounding error of zero (four times the dtype's epsilon, relative to the signal)
        count as zero, so an exact fit stops there.

    Raises:
        ValueError: for mismatched widths, `l0` outside 1..d_sae, a negative tolerance, a dtype that is not floating,
            or a dictionary that holds NaN or infinity (where its values are known: outside jit). Inside jit such a
            dictionary gives codes of zeros with `residual_norm` NaN, as a signal with NaN does anywhere.
    """
    _check(signals, dictionary, l0, tolerance)
    dtype = jnp.promote_types(jnp.promote_types(signals.dtype, dictionary.dtype), jnp.float32)
    flat = signals.reshape(-1, signals.shape[-1]).astype(dtype)
    code = _pursue(flat, dictionary.astype(dtype), l0, nonnegative, float(tolerance))
    batch = signals.shape[:-1]
    return SparseCode(*(value.reshape(*batch, *value.shape[1:]) for value in code))


def _check(signals: Array, dictionary: Array, l0: int, tolerance: float) -> None:
    if dictionary.ndim != 2 or signals.ndim < 1 or signals.shape[-1] != dictionary.shape[1]:
        raise ValueError(
            f"signals {signals.shape} and dictionary {dictionary.shape} do not fit: expected [..., d_in] and "
            "[d_sae, d_in] with the same d_in. An SAE's dictionary is its W_dec, not W_enc."
        )
    if not 1 <= l0 <= dictionary.shape[0]:
        raise ValueError(f"l0 is {l0}; expected 1 to {dictionary.shape[0]}, the number of atoms in the dictionary.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; expected 0 or more, as a share of the signal's norm.")
    for name, value in (("signals", signals), ("dictionary", dictionary)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{name} have dtype {value.dtype}; expected a floating type. Convert with .astype('float32')."
            )
    if not isinstance(dictionary, jax.core.Tracer):
        # NumPy's, since under jit a jnp operation would give a tracer, although this dictionary is concrete.
        bad = np.flatnonzero(~np.isfinite(np.asarray(dictionary, np.float32)).all(axis=1))
        if bad.size:
            raise ValueError(f"dictionary row {int(bad[0])} holds NaN or infinity ({bad.size} such rows in all).")


@functools.partial(jax.jit, static_argnames=("l0", "nonnegative", "tolerance"))
def _pursue(
    signals: Float[Array, "batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int,
    nonnegative: bool,
    tolerance: float,
) -> SparseCode:
    size = signals.shape[0]
    n_chunks = max(1, -(-size // CHUNK))
    chunk = -(-size // n_chunks)
    fixed = jax.lax.stop_gradient(dictionary)
    inverse_norms = _safe_inverse(_norm(fixed))
    # Zero rows fill the last block: they correlate with nothing, so they are never picked.
    units = jnp.pad(fixed * inverse_norms[:, None], ((0, -dictionary.shape[0] % BLOCK), (0, 0)))
    run = functools.partial(
        _pursue_chunk,
        dictionary=dictionary,
        units=units,
        inverse_norms=inverse_norms,
        l0=l0,
        nonnegative=nonnegative,
        tolerance=tolerance,
    )
    if size == 0 or n_chunks == 1:
        return run(signals)
    padded = jnp.pad(signals, ((0, n_chunks * chunk - size), (0, 0)))
    codes = jax.lax.map(run, padded.reshape(n_chunks, chunk, -1))
    return jax.tree.map(lambda value: value.reshape(n_chunks * chunk, *value.shape[2:])[:size], codes)


def _pursue_chunk(
    signals: Float[Array, "batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    units: Float[Array, "n_units d_in"],
    inverse_norms: Float[Array, "d_sae"],
    l0: int,
    nonnegative: bool,
    tolerance: float,
) -> SparseCode:
    indices, slots, weights = _search(jax.lax.stop_gradient(signals), units, inverse_norms, l0, nonnegative, tolerance)
    weights = _with_gradient(nonnegative, signals, dictionary, indices, slots, weights)
    # Used slots first: a slot is unused where its step picked an atom that already had one, or clipped its atom.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    weights = jnp.take_along_axis(weights, order, axis=1)
    indices = jnp.where(weights == 0, -1, jnp.take_along_axis(indices, order, axis=1))
    residual = signals - jnp.einsum("bk,bkd->bd", weights, dictionary[indices], precision=_PRECISE)
    is_sound = jnp.all(jnp.isfinite(inverse_norms))
    residual_norm = jnp.where(is_sound, _norm(residual), jnp.nan)
    return SparseCode(indices, weights, jnp.sum(weights != 0, axis=1), residual_norm)


def _search(
    signals: Float[Array, "batch d_in"],
    units: Float[Array, "n_units d_in"],
    inverse_norms: Float[Array, "d_sae"],
    l0: int,
    nonnegative: bool,
    tolerance: float,
) -> tuple[Int[Array, "batch l0"], Int[Array, "batch l0"], Float[Array, "batch l0"]]:
    """The pursuit itself.

    Returns:
        The atom that each slot holds; the slot that each step worked on first (`l0` for none: refinement only; `l0 + 1`
        for a step that was left out since the tolerance was reached); and the weights.
    """
    size = signals.shape[0]
    scales = _norm(signals)
    targets = signals * _safe_inverse(scales)[:, None]
    floor = 4 * jnp.finfo(signals.dtype).eps

    def step(carry, number):
        residual, atoms, indices, gram, products, weights = carry
        correlations = residual @ units.T
        best, picked = _first_maximum(correlations if nonnegative else jnp.abs(correlations))
        is_running = jnp.linalg.norm(residual, axis=1) > tolerance
        is_useful = (best > floor) & is_running
        picked = jnp.where(is_useful, picked, 0)

        same = (indices == picked[:, None]) & is_useful[:, None]
        is_new = is_useful & ~jnp.any(same, axis=1)
        slot = jnp.where(is_new, number, jnp.where(is_useful, jnp.argmax(same, axis=1), l0)).astype(jnp.int32)
        slot = jnp.where(is_running, slot, l0 + 1)

        # A slot that is not new keeps zeros here: it is never active, and zero rows of the Gram matrix do no harm.
        atom = jnp.where(is_new[:, None], units[picked], 0)
        atoms = jax.lax.dynamic_update_index_in_dim(atoms, atom, number, axis=1)
        indices = indices.at[:, number].set(jnp.where(is_new, picked, -1))
        row = jnp.einsum("bkd,bd->bk", atoms, atom, precision=_PRECISE)
        gram = gram.at[:, number, :].set(row).at[:, :, number].set(row)
        products = products.at[:, number].set(jnp.sum(atom * targets, axis=1))

        weights = _refine(weights, gram, products, slot, nonnegative)
        residual = targets - jnp.einsum("bk,bkd->bd", weights, atoms, precision=_PRECISE)
        return (residual, atoms, indices, gram, products, weights), slot

    zeros = functools.partial(jnp.zeros, dtype=signals.dtype)
    start = (
        targets,
        zeros((size, l0, signals.shape[1])),
        jnp.full((size, l0), -1, jnp.int32),
        zeros((size, l0, l0)),
        zeros((size, l0)),
        zeros((size, l0)),
    )
    (_, _, indices, _, _, weights), slots = jax.lax.scan(step, start, jnp.arange(l0))
    weights = weights * scales[:, None] * jnp.where(indices < 0, 0, inverse_norms[indices])
    return indices, slots.T, jnp.where(jnp.isfinite(weights), weights, 0)


def _first_maximum(scores: Float[Array, "batch n_units"]) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
    """The greatest score of each row and its first position, by way of blocks; NaN where the row holds one."""
    blocks = scores.reshape(scores.shape[0], scores.shape[1] // BLOCK, BLOCK)
    maxima = jnp.max(blocks, axis=2)
    which = jnp.argmax(maxima, axis=1)
    block = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]
    return jnp.max(maxima, axis=1), which * BLOCK + jnp.argmax(block, axis=1)


def _refine(
    weights: Float[Array, "batch l0"],
    gram: Float[Array, "batch l0 l0"],
    products: Float[Array, "batch l0"],
    slot: Int[Array, "batch"],
    nonnegative: bool,
) -> Float[Array, "batch l0"]:
    """One gradient step with exact line search on the active slots: of non-zero weight, and the one just picked."""
    l0 = weights.shape[1]
    is_active = (weights != 0) | (jnp.arange(l0)[None] == slot[:, None])
    is_active &= slot[:, None] <= l0
    gradient = jnp.where(is_active, products - jnp.einsum("bij,bj->bi", gram, weights, precision=_PRECISE), 0)
    squared = jnp.sum(jnp.square(gradient), axis=1)
    curvature = jnp.einsum("bi,bij,bj->b", gradient, gram, gradient, precision=_PRECISE)
    # A zero direction changes nothing. Both selects are needed: the inner one keeps 0/0 out of the derivative too.
    is_moving = curvature > jnp.finfo(weights.dtype).tiny
    size = jnp.where(is_moving, squared / jnp.where(is_moving, curvature, 1), 0)
    moved = weights + size[:, None] * gradient
    return jnp.where(moved > 0, moved, 0) if nonnegative else moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_gradient(nonnegative, signals, dictionary, indices, slots, weights):
    """The weights that the search found, with the derivative of its replay."""
    return weights


@_with_gradient.defjvp
def _with_gradient_jvp(nonnegative, primals, tangents):
    signals, dictionary, indices, slots, weights = primals
    _, tangent = jax.jvp(
        lambda signals, dictionary: _replay(signals, dictionary, indices, slots, nonnegative),
        (signals, dictionary),
        tangents[:2],
    )
    return weights, tangent


def _replay(
    signals: Float[Array, "batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    indices: Int[Array, "batch l0"],
    slots: Int[Array, "batch steps"],
    nonnegative: bool,
) -> Float[Array, "batch l0"]:
    """The search's weights as a smooth function of signals and dictionary, with every choice of atom given."""
    scales = _norm(signals)
    targets = signals * _safe_inverse(scales)[:, None]
    atoms = jnp.where(indices[..., None] < 0, 0, dictionary[indices])
    inverse_norms = _safe_inverse(_norm(atoms))
    atoms = atoms * inverse_norms[..., None]
    gram = jnp.einsum("bid,bjd->bij", atoms, atoms, precision=_PRECISE)
    products = jnp.einsum("bkd,bd->bk", atoms, targets, precision=_PRECISE)

    def step(weights, slot):
        return _refine(weights, gram, products, slot, nonnegative), None

    weights, _ = jax.lax.scan(step, jnp.zeros_like(products), slots.T)
    return weights * scales[:, None] * inverse_norms


def _norm(vectors: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """Norms over the last axis that neither overflow nor underflow, with gradient zero at zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True, initial=0))
    is_zero = largest == 0
    squares = jnp.sum(jnp.square(vectors / jnp.where(is_zero, 1, largest)), axis=-1)
    is_zero, largest = is_zero[..., 0], largest[..., 0]
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)) * largest)


def _safe_inverse(values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """1/x, and 0 where x is too small to have one."""
    is_zero = values < 4 * jnp.finfo(values.dtype).tiny
    return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, values))

"""What all pursuits share: pick the atom that fits the residual best, find new weights, and again.

How it is laid out, and why:

- The active set is explicit: k indices, k gathered atoms and their Gram matrix. One product with the whole dictionary
  remains in a step, which finds the next atom; what a method does with the weights happens in the k x k space of the
  Gram matrix, so a method is a few lines (`Method`). With dense weights a step would take three products.
- Signals are scaled to norm one and so is each atom, so that very small and very large ones neither underflow nor
  overflow, and rescaling an atom changes its weight and nothing else. Only signals whose norm is within a factor of
  eight of the dtype's largest number have no code, and a residual norm of NaN. A weight beyond the dtype's range
  (a signal of 1e20 in an atom of 1e-20) is left out, and the residual norm is that of what is kept.
- Batches are worked on in chunks of signals, which bounds the memory whatever the batch.

Gradients, forward and reverse, with respect to signals and dictionary, are those of the weights with the choice of
atoms held fixed. They come from a method's `replay` in the Gram space, where a step costs nothing beside a product with
the dictionary; nothing of size [batch, d_sae] is kept for them. The choice itself is piecewise constant: at the points
where it jumps the gradient is one-sided.

On a mesh the search runs under `jax.shard_map`: rows split over `data`, the dictionary over `latent`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from interp_jax.pursuit.atom_table import AtomTable
from interp_jax.pursuit.norms import norm, safe_inverse
from interp_jax.pursuit.sparse_code import PRECISE, SparseCode, code_of

__all__ = ["Method", "pursue"]

DATA, LATENT = "data", "latent"
"""Axes of a mesh: rows are split over the one, the dictionary over the other."""

REFINE_ONLY, FINISHED = -1, -2
"""What stands for a slot where a step picked none: no atom would help, only weights are refined; or nothing changes."""

_STAGES, _SMALLEST_STAGE = 4, 8
"""Slots are given out in so many stages, each of some slots at least: a step reads the atoms of all slots given out so
far, twice, which is most of what it does beside the product. Every stage is compiled by itself."""

_CHUNK_NUMBERS = {"cpu": 5 * 2**20}
_CHUNK_NUMBERS_ELSEWHERE = 2**27
_SMALLEST_CHUNK = 64
"""A chunk is as many signals as fill so many numbers, so that products are of a good size and memory is bounded."""


class Method(NamedTuple):
    """How a pursuit finds its weights, in the Gram space of the atoms that each signal has picked."""

    start: Callable[[int, int, Any], Any]
    """From batch, slots and dtype to what the method carries from step to step: arrays of which each axis but the first
    is one of slots. New slots begin as zeros."""
    refine: Callable[..., tuple[Array, Any]]
    """`(weights, carried, gram, products, slot, number) -> (weights, carried)`: one step. `slot` is the one that was
    picked, or `REFINE_ONLY` or `FINISHED`. Empty slots have zero rows in `gram` and zero `products`; there may be fewer
    slots than l0, and more at a later step."""
    replay: Callable[..., Array]
    """`(weights, gram, products, slots) -> weights`: what the steps found, as a smooth function of `gram` and
    `products`, with all choices given by `weights` and `slots`."""


def pursue(
    method: Method,
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    l0: int | Int[Array, "..."],
    *,
    max_l0: int | None,
    nonnegative: bool,
    tolerance: float,
    mesh: Mesh | None,
) -> SparseCode:
    """Finds codes by a method; the arguments are those of the public functions."""
    signals, dictionary = jnp.asarray(signals), jnp.asarray(dictionary)
    batch = signals.shape[:-1]
    if not isinstance(l0, int | np.integer):
        l0 = jnp.asarray(l0)
    elif max_l0 is not None:
        l0 = min(l0, max_l0)
    size = l0 if max_l0 is None else max_l0
    if not jnp.issubdtype(jnp.result_type(l0), jnp.integer):
        raise ValueError(f"l0 has dtype {jnp.result_type(l0)}; expected whole numbers: the most atoms of a signal.")
    if not isinstance(size, int | np.integer):
        raise ValueError(f"l0 is an array of shape {jnp.shape(l0)}: max_l0 must say the most atoms of any signal.")
    size = int(size)
    _check(signals, dictionary, size, tolerance)
    if jnp.shape(l0) not in ((), batch):
        raise ValueError(f"l0 has shape {jnp.shape(l0)}; expected one number, or one a signal, {batch}.")
    if mesh is not None:
        _check_mesh(mesh, math.prod(batch), dictionary.shape[0])
        # Axes of `jax.make_mesh` would be part of the arrays' types; here they are the compiler's.
        mesh = Mesh(mesh.devices, mesh.axis_names)
    limits = np.int32(l0) if isinstance(l0, int | np.integer) else l0
    bad_rows = _bad_rows(dictionary)
    if cast(Any, jax.config).jax_debug_nans:  # or JAX stops at the first operation on one
        _refuse(bad_rows)
    code = _pursue(method, signals, dictionary, limits, size, nonnegative, float(tolerance), mesh)
    _refuse(bad_rows)  # waited for once the device has work to do
    return code


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


def _refuse(bad_rows: Array | None) -> None:
    """Raises ValueError for a dictionary with rows that are not finite, once that is known."""
    n_bad, first = (0, 0) if bad_rows is None else np.asarray(bad_rows).tolist()
    if n_bad:
        raise ValueError(f"dictionary row {first} holds NaN or infinity ({n_bad} such rows in all).")


def _bad_rows(dictionary: Array) -> Array | None:
    """`_rows_not_finite` of a dictionary whose values are known."""
    if isinstance(dictionary, jax.core.Tracer) or not dictionary.is_fully_addressable:
        return None
    # Under jit a plain operation would give a tracer, although this dictionary is concrete.
    with jax.ensure_compile_time_eval():
        return _rows_not_finite(dictionary)


@jax.jit
def _rows_not_finite(dictionary: Float[Array, "d_sae d_in"]) -> Int[Array, "2"]:
    """How many rows hold NaN or infinity, and the first of them; together, as each answer is waited for."""
    is_bad = ~jnp.all(jnp.isfinite(dictionary), axis=1)
    return jnp.stack([jnp.sum(is_bad), jnp.argmax(is_bad)])


def _check_mesh(mesh: Mesh, n_signals: int, n_atoms: int) -> None:
    if set(mesh.axis_names) != {DATA, LATENT}:
        raise ValueError(f"the mesh has axes {mesh.axis_names}; expected ('{DATA}', '{LATENT}').")
    for axis, number, what in ((DATA, n_signals, "signals"), (LATENT, n_atoms, "atoms")):
        if number % mesh.shape[axis]:
            raise ValueError(
                f"the mesh's axis '{axis}' has {mesh.shape[axis]} devices, which must divide the {number} {what}."
            )


@functools.partial(jax.jit, static_argnames=("method", "l0", "nonnegative", "tolerance", "mesh"))
def _pursue(
    method: Method,
    signals: Float[Array, "*batch d_in"],
    dictionary: Float[Array, "d_sae d_in"],
    limits: Int[Array, "..."],
    l0: int,
    nonnegative: bool,
    tolerance: float,
    mesh: Mesh | None,
) -> SparseCode:
    """The codes of signals of any shape: one program, as on a GPU each operation by itself costs as much as a step."""
    batch = signals.shape[:-1]
    dtype = jnp.promote_types(signals.dtype, jnp.float32)
    if dictionary.dtype != jnp.bfloat16:
        dtype = jnp.promote_types(dtype, dictionary.dtype)
        dictionary = dictionary.astype(dtype)
    if jnp.iinfo(limits.dtype).max > l0:  # in their own dtype: an unsigned one may hold what int32 does not
        limits = jnp.minimum(limits, l0)
    limits = jnp.broadcast_to(limits.astype(jnp.int32), batch).reshape(-1)
    rows = signals.reshape(-1, signals.shape[-1]).astype(dtype)
    search = functools.partial(_search, method=method, l0=l0, nonnegative=nonnegative, tolerance=tolerance)
    is_sound = jnp.all(jnp.isfinite(jax.lax.stop_gradient(dictionary)))
    finish = functools.partial(_finish, method=method, dictionary=dictionary, is_sound=is_sound)
    if mesh is None:
        table = AtomTable.of(dictionary)

        def whole(rows: Array, limits: Array) -> SparseCode:
            return finish(rows, *search(jax.lax.stop_gradient(rows), limits, table=table))

        code = _in_chunks(whole, dictionary.shape[0], l0, rows, limits)
    else:

        def of_shard(rows: Array, limits: Array, atoms: Array) -> tuple[Array, Array, Array]:
            run = functools.partial(search, table=AtomTable.of(atoms, LATENT))
            return _in_chunks(run, atoms.shape[0], l0, rows, limits)

        specs = {"in_specs": (P(DATA), P(DATA), P(LATENT)), "out_specs": P(DATA)}
        found = jax.shard_map(of_shard, mesh=mesh, check_vma=False, **specs)(
            *map(jax.lax.stop_gradient, (rows, limits, dictionary))
        )
        code = finish(rows, *found)
    return SparseCode(*(value.reshape(*batch, *value.shape[1:]) for value in code))


def _in_chunks(run: Callable[[Array, Array], Any], n_atoms: int, l0: int, signals: Array, limits: Array) -> Any:
    """A function of signals and their limits, on a chunk of them at a time."""
    size, d_in = signals.shape
    numbers = _CHUNK_NUMBERS.get(jax.default_backend(), _CHUNK_NUMBERS_ELSEWHERE)
    chunk = max(_SMALLEST_CHUNK, numbers // (n_atoms + l0 * (d_in + 2 * l0)))
    n_chunks = max(1, -(-size // chunk))
    if n_chunks == 1:
        return run(signals, limits)
    chunk = -(-size // n_chunks)
    signals = jnp.pad(signals, ((0, n_chunks * chunk - size), (0, 0))).reshape(n_chunks, chunk, d_in)
    limits = jnp.pad(limits, (0, n_chunks * chunk - size)).reshape(n_chunks, chunk)
    found = jax.lax.map(lambda given: run(*given), (signals, limits))
    return jax.tree.map(lambda value: value.reshape(n_chunks * chunk, *value.shape[2:])[:size], found)


def _finish(
    signals: Float[Array, "batch d_in"],
    indices: Int[Array, "batch l0"],
    slots: Int[Array, "batch steps"],
    weights: Float[Array, "batch l0"],
    method: Method,
    dictionary: Float[Array, "d_sae d_in"],
    is_sound: Bool[Array, ""],
) -> SparseCode:
    """The code of what a search found, differentiable by signals and dictionary."""
    weights = _with_gradient(method, signals, dictionary, indices, slots, weights)
    atoms = dictionary[indices].astype(signals.dtype)
    residual = signals - jnp.einsum("bk,bkd->bd", weights, atoms, precision=PRECISE)
    # Beyond that an inverse norm is subnormal, which some machines take for zero.
    is_known = is_sound & (norm(jax.lax.stop_gradient(signals)) < jnp.finfo(signals.dtype).max / 8)
    return code_of(indices, weights, jnp.where(is_known, norm(residual), jnp.nan))


class _State(NamedTuple):
    """What a search knows after a step."""

    residual: Float[Array, "batch d_in"]
    indices: Int[Array, "batch slots"]
    """Each slot's atom; -1 where it has none."""
    atoms: tuple[Float[Array, "batch part d_in"], ...]
    """Those of each stage's slots: what is read again and again is not copied when slots are added."""
    gram: Float[Array, "batch slots slots"]
    products: Float[Array, "batch slots"]
    weights: Float[Array, "batch slots"]
    """Of atoms of norm one and the signal scaled to norm one, as are `gram` and `products`."""
    carried: Any

    @classmethod
    def of(cls, targets: Float[Array, "batch d_in"], method: Method, slots: int) -> "_State":
        """Before the first step."""
        size, d_in = targets.shape
        zeros = functools.partial(jnp.zeros, dtype=targets.dtype)
        return cls(
            residual=targets,
            indices=jnp.full((size, slots), -1, jnp.int32),
            atoms=(zeros((size, slots, d_in)),),
            gram=zeros((size, slots, slots)),
            products=zeros((size, slots)),
            weights=zeros((size, slots)),
            carried=method.start(size, slots, targets.dtype),
        )

    def with_slots(self, slots: int) -> "_State":
        """The same with so many slots, the new ones empty."""
        more = slots - self.weights.shape[1]
        if not more:
            return self

        def wider(value: Array, empty: int = 0) -> Array:
            return jnp.pad(value, ((0, 0), *((0, more),) * (value.ndim - 1)), constant_values=empty)

        part = jnp.zeros((len(self.residual), more, self.residual.shape[1]), self.residual.dtype)
        return _State(
            residual=self.residual,
            indices=wider(self.indices, -1),
            atoms=(*self.atoms, part),
            gram=wider(self.gram),
            products=wider(self.products),
            weights=wider(self.weights),
            carried=jax.tree.map(wider, self.carried),
        )


def _search(
    signals: Float[Array, "batch d_in"],
    limits: Int[Array, "batch"],
    *,
    table: AtomTable,
    method: Method,
    l0: int,
    nonnegative: bool,
    tolerance: float,
) -> tuple[Int[Array, "batch l0"], Int[Array, "batch l0"], Float[Array, "batch l0"]]:
    """The pursuit itself.

    Returns:
        The atom that each slot holds; the slot that each step worked on first, as `Method.refine` is told; the weights.
    """
    dtype = signals.dtype
    scales = norm(signals)
    targets = signals * safe_inverse(scales)[:, None]
    floor = 4 * jnp.finfo(dtype).eps

    def step(state: _State, number: Array) -> tuple[_State, Array]:
        best, picked = table.best(state.residual, is_signed=not nonnegative)
        is_running = (jnp.linalg.norm(state.residual, axis=1) > tolerance) & (number < limits)
        is_useful = (best > floor) & is_running
        picked = jnp.where(is_useful, picked, 0).astype(jnp.int32)

        same = (state.indices == picked[:, None]) & is_useful[:, None]
        is_new = is_useful & ~jnp.any(same, axis=1)
        slot = jnp.where(is_new, number, jnp.where(is_useful, jnp.argmax(same, axis=1), REFINE_ONLY))
        slot = jnp.where(is_running, slot, FINISHED).astype(jnp.int32)

        # A slot that is not new keeps zeros here: it is never active, and zero rows of the Gram matrix do no harm.
        atom = jnp.where(is_new[:, None], table.units(picked), 0).astype(dtype)
        *before, last = state.atoms
        place = number - sum(part.shape[1] for part in before)
        atoms = (*before, jax.lax.dynamic_update_index_in_dim(last, atom, place, axis=1))
        indices = state.indices.at[:, number].set(jnp.where(is_new, picked, -1))
        row = jnp.concatenate([jnp.einsum("bkd,bd->bk", part, atom, precision=PRECISE) for part in atoms], axis=1)
        gram = state.gram.at[:, number, :].set(row).at[:, :, number].set(row)
        products = state.products.at[:, number].set(jnp.sum(atom * targets, axis=1))

        weights, carried = method.refine(state.weights, state.carried, gram, products, slot, number)
        residual, first = targets, 0
        for part in atoms:
            of_part = weights[:, first : (first := first + part.shape[1])]
            residual = residual - jnp.einsum("bk,bkd->bd", of_part, part, precision=PRECISE)
        return _State(residual, indices, atoms, gram, products, weights, carried), slot

    stage = min(l0, max(_SMALLEST_STAGE, -(-l0 // _STAGES)))
    state, slots = _State.of(targets, method, stage), []
    for first in range(0, l0, stage):
        end = min(first + stage, l0)
        state, of_stage = jax.lax.scan(step, state.with_slots(end), jnp.arange(first, end))
        slots.append(of_stage)
    weights = state.weights * scales[:, None] * table.inverses(state.indices)
    return state.indices, jnp.concatenate(slots).T, jnp.where(jnp.isfinite(weights), weights, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_gradient(method, signals, dictionary, indices, slots, weights):
    """The weights that the search found, with the derivative of the method's replay."""
    return weights


@_with_gradient.defjvp
def _with_gradient_jvp(method, primals, tangents):
    signals, dictionary, indices, slots, weights = primals

    def replay(signals: Array, dictionary: Array) -> Array:
        scales = norm(signals)
        targets = signals * safe_inverse(scales)[:, None]
        atoms = jnp.where(indices[..., None] < 0, 0, dictionary[indices].astype(signals.dtype))
        inverse_norms = safe_inverse(norm(atoms))
        atoms = atoms * inverse_norms[..., None]
        gram = jnp.einsum("bid,bjd->bij", atoms, atoms, precision=PRECISE)
        products = jnp.einsum("bkd,bd->bk", atoms, targets, precision=PRECISE)
        return method.replay(weights, gram, products, slots) * scales[:, None] * inverse_norms

    return weights, jax.jvp(replay, (signals, dictionary), tangents[:2])[1]

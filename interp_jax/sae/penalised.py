"""What the kinds have in common whose codes a penalty makes sparse: a step that costs what its codes cost.

Such codes are dense when training starts and a few hundred steps later nearly all zero; then four of the five products
of a dense step multiply zeros. So, where some rows say that it may be so, the encoder is run first, the (row, latent)
pairs that matter are counted, and where they are few the rest of the step is about them alone (`sparse_pairs`), at half
the time of the dense one. The result is the same but for rounding, and which way it came is a function of the batch and
the weights: runs stay repeatable.

That is so on a CPU. On accelerators, where products are cheap and gathers are not, and on a mesh the step is always
dense. Under `jax.vmap` a choice by data would compute all ways at once, so there one autoencoder is worked on after
another.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from interp_jax.sae.autoencoder import Batch, Outcome, SparseAutoencoder, Sparsity, known_affine, with_gradient
from interp_jax.sae.encoder_gradients import sparse_weights
from interp_jax.sae.gradient_by_slices import gradient_by_slices
from interp_jax.sae.sparse_pairs import SparsePairs, first_pairs, pre_activations_at
from interp_jax.sae.true_places import true_places

__all__ = ["PenalisedSAE"]

P = TypeVar("P", bound="PenalisedSAE")

_FEW = (256, 96)
"""Pairs are few where they are at most one of so many entries of the dense codes; there is room for either number."""
_SAMPLE = 64
"""Rows that tell whether to count at all: a dense step is a tenth faster where the encoder's output is not kept."""
_LARGE = 2**21
"""Entries of the dense codes from which on it is worth to compile the step in more ways than one."""
_TOO_LARGE = 2**31
"""Entries that 32 bits do not number."""


class PenalisedSAE(SparseAutoencoder):
    """An autoencoder whose objective is a function of the encoder's output, dense or at the pairs that matter."""

    @abc.abstractmethod
    def floor(self) -> Float[Array, "d_sae"]:
        """What a latent's pre-activation must exceed to have any part in the objective or in a derivative of it."""

    @abc.abstractmethod
    def dense_objective(
        self, pre: Float[Array, "batch d_sae"], batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None
    ) -> Outcome:
        """`objective`, of the encoder's output.

        Args:
            pre: the encoder's output before its nonlinearity.
            batch: what the step is trained on.
            sparsity: strength and form of the penalty.
            mesh: what the arrays lie on; None where that is one device.
        """

    @abc.abstractmethod
    def sparse_objective(
        self, pre: Float[Array, "pairs"], pairs: SparsePairs, batch: Batch, sparsity: Sparsity
    ) -> Outcome:
        """`dense_objective` from the pairs above `floor`, at which alone the encoder's output is given.

        Args:
            pre: the encoder's output at the pairs; zero at inactive ones.
            pairs: the pairs.
            batch: what the step is trained on.
            sparsity: strength and form of the penalty.
        """

    def objective(self, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None) -> Outcome:
        """See `SparseAutoencoder.objective`."""
        return self.dense_objective(self.pre_activations(batch.x), batch, sparsity, mesh)

    def objective_and_gradient(
        self: P, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None
    ) -> tuple[Outcome, P]:
        """See `SparseAutoencoder.objective_and_gradient`."""
        if mesh is not None or not _LARGE <= len(batch.x) * self.d_sae < _TOO_LARGE:
            return with_gradient(lambda sae: sae.objective(batch, sparsity, mesh), self)

        def densely(sae: P, batch: Batch, coefficient: Array) -> tuple[Outcome, P]:
            now = sparsity._replace(coefficient=coefficient)
            return with_gradient(lambda sae: sae.objective(batch, now), sae)

        @jax.custom_batching.sequential_vmap
        def by_count(sae: P, batch: Batch, coefficient: Array) -> tuple[Outcome, P]:
            some = sae.pre_activations(batch.x[:_SAMPLE])
            is_sparse = jnp.mean(~(some <= sae.floor())) < 2 / _FEW[-1]
            now = sparsity._replace(coefficient=coefficient)
            by_slices = functools.partial(_densely, lambda sae, batch: sae.objective(batch, now), sae, batch, now)
            return jax.lax.cond(is_sparse, lambda: _by_count(sae, batch, now), by_slices)

        given = (self, batch, jnp.asarray(sparsity.coefficient, batch.x.dtype))
        return jax.lax.platform_dependent(*given, cpu=by_count, default=densely)


def _densely(objective: Callable[[P, Any], Outcome], sae: P, rows: Any, sparsity: Sparsity) -> tuple[Outcome, P]:
    """An objective of dense codes, and its gradient."""
    if sparsity.l0_target is not None:  # then the penalty is not a mean over rows
        return with_gradient(lambda sae: objective(sae, rows), sae)
    return gradient_by_slices(objective, sae, rows)


def _by_count(sae: P, batch: Batch, sparsity: Sparsity) -> tuple[Outcome, P]:
    """The objective and its gradient by no more pairs than there are, or densely where they are many."""
    x, shape = batch.x, (len(batch.x), sae.d_sae)
    pre = sae.pre_activations(x)
    # And not `>`, so that NaN is kept and seen in the loss.
    mask = true_places(~(pre <= sae.floor()))

    def densely() -> tuple[Outcome, P]:
        def objective(sae: P, rows: tuple[Batch, Array]) -> Outcome:
            batch, pre = rows
            W_enc, bias, _, shift = sparse_weights(sae)
            return sae.dense_objective(known_affine(pre, batch.x, shift, W_enc, bias), batch, sparsity)

        return _densely(objective, sae, (batch, pre), sparsity)

    def sparsely(n_pairs: int) -> tuple[Outcome, P]:
        pairs = first_pairs(mask, shape, n_pairs)
        values = jnp.where(pairs.is_active, pre[pairs.rows, pairs.columns], 0)

        def objective(sae: P) -> Outcome:
            known = pre_activations_at(sparse_weights(sae), x, values, pairs)
            return sae.sparse_objective(known, pairs, batch, sparsity)

        return with_gradient(objective, sae)

    sizes = [pre.size // share for share in _FEW]
    way = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), mask.total)
    return jax.lax.switch(way, [*(functools.partial(sparsely, size) for size in sizes), densely])

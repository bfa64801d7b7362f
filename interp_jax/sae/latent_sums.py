"""Sums over the (row, latent) pairs of a sparse code, latent by latent: the weight gradients of a TopK dictionary.

The gradient of a decoder row is the sum, over the rows of the batch in which that latent is active, of its activation
times the row's gradient; an encoder column's is the same sum with other factors. There are batch * k pairs, a few
hundredths of what dense codes would multiply. A plain scatter-add, though, takes XLA about a microsecond a row on CPU,
longer than the arithmetic. So:

1. `group_by_latent` sorts the pairs by latent, once for all the sums of a step. Latent and pair number are packed into
   one 32-bit key where they fit, since a sort of one operand is five times faster than one of two.
2. `sum_by_latent` cuts each latent's pairs into pieces of `PIECE`. The first piece of every latent stands at the
   latent's own place, the rest in an overflow area of known size, so that all pieces are summed by plain gathers; only
   the overflow is scattered, a sixteenth of the pairs at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from interp_jax.sae.counts_up_to import counts_up_to
from interp_jax.sae.gpu_or_default import gpu_or_default

__all__ = ["LatentGroups", "group_by_latent", "sum_by_latent"]

PIECE = 16
"""Pairs summed by gathers at a time; near the usual number of pairs a latent."""
_UNROLL, _UNROLL_ON_GPU = 4, 64
"""Terms of a sum that a step of a scan adds, at most. Each is traced by itself, for every device."""


class LatentGroups(NamedTuple):
    """The pairs of a sparse code in the order of their latents."""

    order: Int[Array, "pairs"]
    """Pair numbers, sorted by latent; pairs that are not active come last."""
    starts: Int[Array, "d_sae_plus_1"]
    """Where each latent's pairs start in `order`, and where the last one's end."""

    @property
    def counts(self) -> Int[Array, "d_sae"]:
        """In how many rows each latent is active."""
        return self.starts[1:] - self.starts[:-1]


def group_by_latent(latents: Int[Array, "pairs"], is_active: Bool[Array, "pairs"], d_sae: int) -> LatentGroups:
    """Sorts the active pairs of a code by latent.

    Args:
        latents: the latent of each pair.
        is_active: which of them count.
        d_sae: number of latents.
    """
    n_pairs = latents.size
    latents = jnp.where(is_active, latents, d_sae)
    bits = max(1, (n_pairs - 1).bit_length())
    if d_sae < 2 ** (32 - bits):
        keys = jnp.sort((latents.astype(jnp.uint32) << bits) | jnp.arange(n_pairs, dtype=jnp.uint32))
        latents, order = (keys >> bits).astype(jnp.int32), (keys & (2**bits - 1)).astype(jnp.int32)
    else:
        latents, order = jax.lax.sort((latents.astype(jnp.int32), jnp.arange(n_pairs, dtype=jnp.int32)), num_keys=1)
    return LatentGroups(order, jnp.pad(counts_up_to(latents, d_sae), (1, 0)))


def sum_by_latent(
    factors: Float[Array, "pairs"], rows: Float[Array, "m d"], row_of: Int[Array, "pairs"], groups: LatentGroups
) -> Float[Array, "d_sae d"]:
    """For each latent, the sum of `factors[pair] * rows[row_of[pair]]` over its pairs.

    Args:
        factors: one a pair; those of inactive pairs are not looked at.
        rows: what is summed.
        row_of: which of them each pair takes.
        groups: the pairs, from `group_by_latent`.
    """
    order, starts = groups
    n_pairs, d_sae = order.size, starts.size - 1
    n_overflow = -(-n_pairs // PIECE)

    # Overflow piece q belongs to the latent whose range in the running count of overflow pieces holds q.
    extra = jnp.maximum(0, -(-(groups.counts - PIECE) // PIECE))
    ends = jnp.cumsum(extra)
    piece = jnp.arange(n_overflow, dtype=jnp.int32)
    owner = counts_up_to(ends, n_overflow)
    known = jnp.minimum(owner, d_sae - 1)
    overflow_start = starts[known] + PIECE * (1 + piece - (ends - extra)[known])
    first = jnp.concatenate([starts[:-1], overflow_start])
    last = jnp.concatenate([starts[1:], jnp.where(owner < d_sae, starts[known + 1], 0)])

    position = first + jnp.arange(PIECE, dtype=jnp.int32)[:, None]
    is_pair = position < last
    pair = order[jnp.minimum(position, n_pairs - 1)]
    factor = jnp.where(is_pair, factors[pair], 0)
    row = jnp.where(is_pair, row_of[pair], 0)
    # Without the barrier XLA computes factor and row anew for each of the d columns.
    factor, row, rows = jax.lax.optimization_barrier((factor, row, rows))

    sums = gathered_sum(factor, rows, row)
    return sums[:d_sae].at[owner].add(sums[d_sae:], indices_are_sorted=True, mode="drop")


def gathered_sum(
    factors: Float[Array, "terms n"], rows: Float[Array, "m d"], indices: Int[Array, "terms n"]
) -> Float[Array, "n d"]:
    """`sum over t of factors[t, i] * rows[indices[t, i]]`, with nothing of size n * terms * d in between."""
    # On a GPU one kernel reads as many terms as it can; each step of a scan writes the sums and reads them again.
    at_once, in_steps = (
        functools.partial(_gathered_sum, unroll=max(n for n in range(1, most + 1) if len(factors) % n == 0))
        for most in (_UNROLL_ON_GPU, _UNROLL)
    )
    return gpu_or_default(factors, rows, indices, gpu=at_once, default=in_steps)


def _gathered_sum(
    factors: Float[Array, "terms n"], rows: Float[Array, "m d"], indices: Int[Array, "terms n"], *, unroll: int
) -> Float[Array, "n d"]:
    def add(total, terms):
        for factor, index in zip(*terms, strict=True):
            total = total + factor[:, None] * rows[index]
        return total, None

    start = jnp.zeros((factors.shape[1], rows.shape[1]), rows.dtype)
    split = functools.partial(jnp.reshape, shape=(-1, unroll, factors.shape[1]))
    return jax.lax.scan(add, start, (split(factors), split(indices)))[0]

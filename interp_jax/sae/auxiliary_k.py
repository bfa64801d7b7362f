"""Auxiliary-k: dead latents are given the reconstruction's error to explain (Gao et al. 2024, appendix A.2), cheaply.

A latent that is never among the k largest gets no gradient and stays dead. The auxiliary loss reconstructs the error
that the active latents leave, from the `k_aux` largest of the dead ones, and its gradient moves them to where they are
of use.

The paper takes the largest among all dead latents, which costs a second pass over the whole dictionary. Here at most
`N_REVIVED` latents, those dead for longest, are gathered and worked on densely. The paper's loss takes the error as
constant, and so does this one.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from interp_jax.sae.dead_latents import DeadLatents
from interp_jax.sae.mesh import DATA

__all__ = ["N_REVIVED", "auxiliary_loss"]

N_REVIVED = 512
"""The most dead latents that are worked on in one step."""


def auxiliary_loss(
    dead: DeadLatents,
    x: Float[Array, "batch d_in"],
    error: Float[Array, "batch d_out"],
    row_weights: Float[Array, "batch"],
    *,
    k_aux: int,
    coefficient: float,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """The auxiliary loss, a weighted mean over rows.

    Args:
        dead: latents.
        x: activations.
        error: what the active latents leave of the target.
        row_weights: weight of each row in the loss.
        k_aux: dead latents that may be used a row.
        coefficient: weight of the loss.
        mesh: what the rows are split over; None where that is one device.
    """
    pre = jnp.where(dead.is_dead, dead.pre_activations(x), -jnp.inf)
    threshold = _kth_of_rows(jax.lax.stop_gradient(pre), min(k_aux, pre.shape[1]), mesh)
    codes = jnp.where((pre >= threshold) & (pre > 0), pre, 0)
    return coefficient * jnp.mean(row_weights * jnp.sum(jnp.square(error - codes @ dead.W_dec), axis=1))


def _kth_of_rows(values: Float[Array, "batch n"], k: int, mesh: Mesh | None) -> Float[Array, "batch 1"]:
    def kth(values: Array) -> Array:
        return jax.lax.top_k(values, k)[0][:, -1:]

    # XLA does not split a top-k by rows: left to it, every device would sort the whole batch.
    return kth(values) if mesh is None else jax.shard_map(kth, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))(values)

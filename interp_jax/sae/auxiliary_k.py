"""Auxiliary-k: dead latents are given the reconstruction's error to explain (Gao et al. 2024, appendix A.2), cheaply.

A latent that is never among the k largest gets no gradient and stays dead. The auxiliary loss reconstructs the error
that the active latents leave, from the `k_aux` largest of the dead ones, and its gradient moves them to where they are
of use.

The paper takes the largest among all dead latents, which costs a second pass over the whole dictionary. Here at most
`N_REVIVED` latents, those dead for longest, are gathered and worked on densely; when nothing is dead a `cond` skips it
all. The paper's loss takes the error as constant, and so does this one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interp_jax.sae.topk import TopKSAE

__all__ = ["N_REVIVED", "add_auxiliary_gradient"]

N_REVIVED = 512
"""The most dead latents that are worked on in one step."""


def add_auxiliary_gradient(
    gradient: TopKSAE,
    sae: TopKSAE,
    x: Float[Array, "batch d_in"],
    error: Float[Array, "batch d_in"],
    row_weights: Float[Array, "batch"],
    idle: Int[Array, "d_sae"],
    *,
    dead_after: int,
    k_aux: int,
    coefficient: float,
) -> TopKSAE:
    """Adds the gradient of the auxiliary loss to that of the main one.

    Args:
        gradient: gradient of the main loss, the weighted mean over rows of the squared error's sum.
        sae: the autoencoder.
        x: activations.
        error: x less its reconstruction.
        row_weights: weight of each row in the loss.
        idle: rows since each latent was last active.
        dead_after: a latent idle for more rows than this is dead.
        k_aux: dead latents that may be used a row.
        coefficient: weight of the auxiliary loss.

    Returns:
        The sum of both gradients; the main one's where nothing is dead.
    """
    n_revived = min(N_REVIVED, sae.d_sae)
    longest, latents = jax.lax.top_k(idle, n_revived)
    is_dead = longest > dead_after
    b_dec = sae.b_dec[...]

    def loss(weights: tuple[Array, Array, Array]) -> Array:
        W_enc, b_enc, W_dec = weights
        pre = jnp.where(is_dead, (x - b_dec) @ W_enc + b_enc, -jnp.inf)
        threshold = jax.lax.top_k(jax.lax.stop_gradient(pre), min(k_aux, n_revived))[0][:, -1:]
        codes = jnp.where((pre >= threshold) & (pre > 0), pre, 0)
        return coefficient * jnp.mean(row_weights * jnp.sum(jnp.square(error - codes @ W_dec), axis=1))

    def added(arrays: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        W_enc, b_enc, W_dec = arrays
        revived = (sae.W_enc[...][:, latents], sae.b_enc[...][latents], sae.W_dec[...][latents])
        d_W_enc, d_b_enc, d_W_dec = jax.grad(loss)(revived)
        return W_enc.at[:, latents].add(d_W_enc), b_enc.at[latents].add(d_b_enc), W_dec.at[latents].add(d_W_dec)

    arrays = (gradient.W_enc[...], gradient.b_enc[...], gradient.W_dec[...])
    W_enc, b_enc, W_dec = jax.lax.cond(is_dead[0], added, lambda arrays: arrays, arrays)
    return TopKSAE(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=gradient.b_dec[...], k=sae.k)

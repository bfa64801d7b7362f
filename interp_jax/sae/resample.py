"""Resampling: dead latents start again from inputs that are badly reconstructed (Bricken et al. 2023).

A dead latent's dictionary row becomes the direction of an input, drawn with a probability that goes with the square of
the row's squared error, and no input for two of them: twins would have the same gradients, and stay twins. Its encoder
column becomes the same direction at a fifth of the living columns' mean norm, its biases zero and its threshold the
living ones' mean, and the optimiser's moments of all of them zero. That is a shock to a dictionary that is otherwise
done, so it is done at long intervals: *resampling*. Or only to the few latents that have been dead for longest,
whenever there are any, from the batch at hand: *lazy re-initialisation*, which spares the pass over many inputs.
Neither is done while the learning rate decays to zero, when nothing new could be learnt any more.

Hazard: Adam makes up for moments that began at zero, by the number of steps since. For a latent that starts again these
are not the steps of the run (`as_if_new`): with beta2 = 0.999 its first step would be 32 times as long as the learning
rate says, and the direction that was drawn for it gone.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from interp_jax.sae.autoencoder import SparseAutoencoder

__all__ = ["N_LAZY", "as_if_new", "longest_dead", "resample"]

N_LAZY = 16
"""The most latents that are re-initialised in one step, where that is done lazily."""

S = TypeVar("S", bound=SparseAutoencoder)


def resample(
    sae: S,
    moments: Any,
    is_chosen: Bool[Array, "d_sae"],
    is_dead: Bool[Array, "d_sae"],
    x: Float[Array, "batch d_in"],
    target: Float[Array, "batch d_out"],
    row_errors: Float[Array, "batch"],
    *,
    key: PRNGKeyArray,
) -> tuple[S, Any]:
    """Starts latents again.

    Args:
        sae: the autoencoder.
        moments: the optimiser's state; every autoencoder-shaped part of it is set to zero at those latents.
        is_chosen: which latents; no more than there are rows.
        is_dead: which latents are no measure for them: those and what else is dead.
        x: activations to draw from.
        target: what they are to be reconstructed to: `x`, but for a transcoder.
        row_errors: how badly each is: its weighted squared error.
        key: random key.

    Returns:
        The autoencoder and the optimiser's state.
    """
    # The order of log p + Gumbel noise is that of draws without replacement.
    logits = jnp.log(jnp.maximum(jnp.square(row_errors), 1e-30))
    drawn = jnp.argsort(-(logits + jax.random.gumbel(key, logits.shape)))
    chosen = drawn[jnp.clip(jnp.cumsum(is_chosen) - 1, 0, len(x) - 1)]
    inputs = x - sae.b_dec[...] if sae.apply_b_dec_to_input else x
    read, written = _unit(inputs)[chosen], _unit(target - sae.b_dec[...])[chosen]
    n_living = jnp.maximum(jnp.sum(~is_dead), 1)

    def of_living(numbers: Float[Array, "d_sae"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(is_dead, 0, numbers)) / n_living

    norm = of_living(jnp.linalg.norm(sae.W_enc[...], axis=0))
    norm = jnp.where(norm > 0, norm, 5.0)  # nothing lives: a fifth of this is one
    arrays = {
        "W_enc": jnp.where(is_chosen, 0.2 * norm * read.T, sae.W_enc[...]),
        "W_dec": jnp.where(is_chosen[:, None], written, sae.W_dec[...]),
    }
    for name in sae.per_latent:
        numbers = sae.parameter(name)
        arrays[name] = jnp.where(is_chosen, of_living(numbers) if "threshold" in name else 0, numbers)

    def forget(part: Any) -> Any:
        if not isinstance(part, SparseAutoencoder):
            return part
        zeros = {name: jnp.where(is_chosen, 0, part.parameter(name)) for name in arrays if name != "W_dec"}
        return part.replace(W_dec=jnp.where(is_chosen[:, None], 0, part.W_dec[...]), **zeros)

    moments = jax.tree.map(forget, moments, is_leaf=lambda part: isinstance(part, SparseAutoencoder))
    return sae.replace(**arrays), moments


def as_if_new(
    updates: S, began: Int[Array, "d_sae"], n_steps: Int[Array, ""] | int, *, beta1: float, beta2: float
) -> S:
    """Adam's updates, corrected for moments that began at zero later than the run did.

    Args:
        updates: of Adam, which takes all moments to be as old as the run.
        began: how many steps were done when each latent last started again; 0 where it never did.
        n_steps: steps done, with this one.
        beta1: Adam's.
        beta2: Adam's.
    """

    def kept(beta: float) -> Float[Array, "d_sae"]:
        """How much less of a full mean a latent's moment holds than one as old as the run."""
        n = jnp.asarray(n_steps, jnp.float32)
        return jnp.where(began > 0, (1 - beta ** (n - began)) / (1 - beta**n), 1)

    factor = jnp.sqrt(kept(beta2)) / kept(beta1)
    names = ("W_enc", *updates.per_latent)
    arrays = {name: factor * updates.parameter(name) for name in names}
    return updates.replace(W_dec=factor[:, None] * updates.W_dec[...], **arrays)


def longest_dead(idle: Int[Array, "d_sae"], is_dead: Bool[Array, "d_sae"], n: int) -> Bool[Array, "d_sae"]:
    """The n latents, at most, that have been dead for longest.

    Args:
        idle: rows since each latent was last active.
        is_dead: which are dead.
        n: how many.
    """
    longest, latents = jax.lax.top_k(jnp.where(is_dead, idle, -1), min(n, len(idle)))
    return jnp.zeros(len(idle), bool).at[latents].set(longest >= 0)


def _unit(rows: Float[Array, "batch d"]) -> Float[Array, "batch d"]:
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)

"""Ghost gradients: dead latents predict the residual by an exponential, which has a gradient where ReLU has none.

After Jermyn and Templeton ("Ghost grads", Anthropic's Circuits Updates, January 2024), with the changes of the DeepMind
interpretability team's Progress Update of April 2024:

    codes = exp(pre_dead);   ghost = codes @ W_dec[dead];   scale = |residual| / (2 |ghost|), a row
    loss = factor * mean over rows of |residual - scale * ghost|^2,   factor = squared_error / that mean

Residual, scale and factor are constants for the derivative. The factor makes the loss as large as the squared error
itself, however few latents are dead, which is too much for a few; *rescaled* multiplies it by their share of all.

Multiplying a row's codes by a number changes nothing, since the scale divides by it, so the row's largest exponent is
subtracted first: no row overflows.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.sae.dead_latents import DeadLatents

__all__ = ["ghost_loss"]


def ghost_loss(
    dead: DeadLatents,
    x: Float[Array, "batch d_in"],
    error: Float[Array, "batch d_out"],
    row_weights: Float[Array, "batch"],
    *,
    weight: Float[Array, ""] | float = 1.0,
    activation: Literal["exp", "capped_exp"] = "exp",
    norm: Literal["residual", "input"] = "residual",
) -> Float[Array, ""]:
    """The ghost loss, a weighted mean over rows.

    Args:
        dead: latents.
        x: activations.
        error: the residual: what the active latents leave of the target.
        row_weights: weight of each row in the loss.
        weight: multiplies the loss: 1, or the share of dead latents.
        activation: exp(pre), or exp(min(pre, 0)).
        norm: what the ghost output has half the norm of.

    Returns:
        The loss, whose value is `weight` times the squared error; zero where no latent is dead.
    """
    residual = jax.lax.stop_gradient(error)
    exponent = dead.pre_activations(x)
    if activation == "capped_exp":
        exponent = jnp.minimum(exponent, 0)
    exponent = jnp.where(dead.is_dead, exponent, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(exponent, axis=1, keepdims=True))
    # Not where nothing is dead, whose largest exponent is minus infinity.
    codes = jnp.where(dead.is_dead, jnp.exp(jnp.where(dead.is_dead, exponent - largest, 0)), 0)
    ghost = codes @ dead.W_dec

    reference = jnp.linalg.norm(residual if norm == "residual" else x, axis=1, keepdims=True)
    size = jnp.linalg.norm(jax.lax.stop_gradient(ghost), axis=1, keepdims=True)
    scale = jnp.where(size > 0, reference / (2 * jnp.where(size > 0, size, 1)), 0)
    found = jnp.mean(row_weights * jnp.sum(jnp.square(residual - scale * ghost), axis=1))
    squared_error = jnp.mean(row_weights * jnp.sum(jnp.square(residual), axis=1))
    factor = jax.lax.stop_gradient(squared_error / jnp.where(found > 0, found, 1))
    return jnp.where(jnp.any(dead.is_dead), weight * factor * found, 0)

"""Gradients that reach dead latents alone, at a cost that goes with how many are dead.

A loss that revives dead latents, auxiliary-k or ghost gradients, is a function of those latents' own parameters. They
are gathered into the smallest of a few sizes that holds them all, and nothing is computed when nothing is dead.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from interp_jax.sae.autoencoder import SparseAutoencoder, affine

__all__ = ["DeadLatents", "add_gradient_of_dead"]

S = TypeVar("S", bound=SparseAutoencoder)


class DeadLatents(NamedTuple):
    """Parameters of some latents."""

    W_enc: Float[Array, "d_in some"]
    bias: Float[Array, "some"]
    """The encoder's bias; the gate's, in a gated autoencoder."""
    W_dec: Float[Array, "some d_out"]
    shift: Float[Array, "d_in"]
    """What is subtracted from the input: the decoder bias, which all latents share, or nothing."""
    is_dead: Bool[Array, "some"]
    """Which of them are dead; the others fill up the size."""

    def pre_activations(self, x: Float[Array, "batch d_in"]) -> Float[Array, "batch some"]:
        """What the encoder gives for these latents.

        Args:
            x: activations.
        """
        return affine(x, self.shift, self.W_enc, self.bias)


def add_gradient_of_dead(
    loss: Callable[[DeadLatents], Float[Array, ""]],
    gradient: S,
    sae: S,
    idle: Int[Array, "d_sae"],
    is_dead: Bool[Array, "d_sae"],
    sizes: Sequence[int],
    *,
    reaches_b_dec: bool = False,
) -> tuple[S, Float[Array, ""]]:
    """Adds the gradient of a loss of the dead latents.

    Args:
        loss: of the gathered latents; it must not depend on those of them that are not dead.
        gradient: what is added to.
        sae: the autoencoder.
        idle: rows since each latent was last active.
        is_dead: which are dead.
        sizes: rising numbers of latents to gather. Where more are dead than the last one, those idle for longest count.
        reaches_b_dec: whether the decoder bias has a gradient from it too, where it is subtracted from the input.

    Returns:
        The sum of both gradients, and the loss; the gradient as it was, and zero, where nothing is dead.
    """
    bias = sae.encoder_bias
    names = ("W_enc", bias, "W_dec", "b_dec")
    arrays = tuple(gradient.parameter(name) for name in names)
    W_enc, b, W_dec, shift = sae.W_enc[...], sae.parameter(bias), sae.W_dec[...], sae.input_shift()
    reaches_b_dec = reaches_b_dec and sae.apply_b_dec_to_input

    def of_some(size: int):
        def added(arrays: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
            if size == sae.d_sae:
                places, dead = slice(None), is_dead
            else:
                longest, places = jax.lax.top_k(jnp.where(is_dead, idle, -1), size)
                dead = longest >= 0
            some = DeadLatents(W_enc[:, places], b[places], W_dec[places], shift, dead)
            value, by = jax.value_and_grad(loss, allow_int=True)(some)
            sums = (
                arrays[0].at[:, places].add(by.W_enc),
                arrays[1].at[places].add(by.bias),
                arrays[2].at[places].add(by.W_dec),
                arrays[3] + by.shift if reaches_b_dec else arrays[3],
            )
            return sums, value

        return added

    branches = [lambda arrays: (arrays, jnp.zeros(())), *map(of_some, sizes)]
    n_dead = jnp.sum(is_dead, dtype=jnp.int32)
    which = jnp.searchsorted(jnp.asarray([0, *sizes[:-1]], jnp.int32), n_dead, side="left").astype(jnp.int32)
    sums, value = jax.lax.switch(which, branches, arrays)
    return gradient.replace(**dict(zip(names, sums, strict=True))), value

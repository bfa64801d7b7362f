"""The encoder's gradients from (row, latent) pairs: what the sparse derivatives of all TopK kinds have in common."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.latent_sums import LatentGroups, sum_by_latent

__all__ = ["SparseWeights", "encoder_gradients", "sparse_weights"]

SparseWeights = tuple[Array, Array, Array, Array]
"""W_enc, b_enc, W_dec, and what is subtracted from the input: what a sparse derivative is taken by."""


def sparse_weights(sae: SparseAutoencoder) -> SparseWeights:
    """The weights that a sparse derivative is taken by.

    Args:
        sae: the autoencoder.
    """
    return sae.W_enc[...], sae.parameter(sae.encoder_bias), sae.W_dec[...], sae.input_shift()


def encoder_gradients(
    W_enc: Float[Array, "d_in d_sae"],
    inputs: Float[Array, "batch d_in"],
    by_value: Float[Array, "pairs"],
    row_of: Int[Array, "pairs"],
    groups: LatentGroups,
) -> tuple[Float[Array, "d_in d_sae"], Float[Array, "d_sae"], Float[Array, "d_in"]]:
    """Gradients by W_enc, b_enc and the input's shift.

    Args:
        W_enc: encoder.
        inputs: activations less the shift.
        by_value: gradient by each pair's code; those of inactive pairs are not looked at.
        row_of: the row of each pair.
        groups: the pairs by latent.
    """
    # A column of ones beside the inputs makes the encoder bias' gradient one more column of the same sum.
    inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[:, :1])], axis=1)
    d_encoder = sum_by_latent(by_value, inputs, row_of, groups)
    d_b_enc = d_encoder[:, -1]
    # The shift is subtracted from each input by way of every active column of the encoder.
    return d_encoder[:, :-1].T, d_b_enc, -(W_enc @ d_b_enc)

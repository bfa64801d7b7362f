"""Decoding from (row, latent) pairs, as many a row as there happen to be, with a derivative that is as sparse.

For BatchTopK and Matryoshka, whose rows use different numbers of latents. What `topk.reconstruct` is for k latents a
row: neither pass makes dense codes, and the choice of the pairs is constant for the derivative.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.kth_largest import LargestPairs
from interp_jax.sae.latent_sums import LatentGroups, group_by_latent, sum_by_latent

__all__ = ["decode_pairs"]

_CHUNK = 2048
"""Pairs whose rows are gathered at a time: a few megabytes, which stay in the cache."""


def decode_pairs(
    sae: SparseAutoencoder,
    x: Float[Array, "batch d_in"],
    pairs: LargestPairs,
    places: Int[Array, "pairs"],
    n_places: int,
) -> tuple[Float[Array, "n_places d_out"], Int[Array, "d_sae"]]:
    """Sums of codes times dictionary rows, each pair's at a place of its own; no decoder bias.

    Args:
        sae: the autoencoder, with an encoder bias `b_enc`.
        x: activations.
        pairs: which latents are active in which rows, and how strongly.
        places: which sum each pair goes to.
        n_places: how many sums there are.

    Returns:
        The sums, differentiable with respect to the autoencoder; in how many rows each latent is active.
    """
    is_active = pairs.values > 0
    by_latent = group_by_latent(pairs.columns, is_active, sae.d_sae)
    by_place = group_by_latent(places, is_active, n_places)
    b_dec = sae.b_dec[...]
    shift = b_dec if sae.apply_b_dec_to_input else jnp.zeros(sae.d_in, b_dec.dtype)
    weights = sae.W_enc[...], sae.parameter("b_enc"), sae.W_dec[...], shift
    return _decode(weights, x, pairs, places, by_latent, by_place), by_latent.counts


_Weights = tuple[Array, Array, Array, Array]


@jax.custom_vjp
def _decode(
    weights: _Weights, x: Array, pairs: LargestPairs, places: Array, by_latent: LatentGroups, by_place: LatentGroups
) -> Array:
    return sum_by_latent(pairs.values, weights[2], pairs.columns, by_place)


def _decode_forward(weights: _Weights, x: Array, pairs: LargestPairs, places: Array, by_latent, by_place):
    return _decode(weights, x, pairs, places, by_latent, by_place), (weights, x, pairs, places, by_latent)


def _decode_backward(kept, gradient: Array):
    (W_enc, _, W_dec, shift), x, pairs, places, by_latent = kept
    product = functools.partial(_product, gradient, W_dec)
    products = jax.lax.map(product, (places, pairs.columns), batch_size=min(_CHUNK, len(places)))
    by_value = jnp.where(pairs.values > 0, products, 0)
    d_W_dec = sum_by_latent(pairs.values, gradient, places, by_latent)
    inputs = jnp.concatenate([x - shift, jnp.ones_like(x[:, :1])], axis=1)
    d_encoder = sum_by_latent(by_value, inputs, pairs.rows, by_latent)
    d_b_enc = d_encoder[:, -1]
    return (d_encoder[:, :-1].T, d_b_enc, d_W_dec, -(W_enc @ d_b_enc)), None, None, None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _product(gradient: Array, W_dec: Array, place_and_latent: tuple[Array, Array]) -> Array:
    place, latent = place_and_latent
    return gradient[place] @ W_dec[latent]

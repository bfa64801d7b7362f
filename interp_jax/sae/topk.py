"""The TopK sparse autoencoder (Gao et al., "Scaling and evaluating sparse autoencoders", 2024).

    codes = top_k(relu((x - b_dec) @ W_enc + b_enc));   reconstruction = codes @ W_dec + b_dec

`W_dec[d_sae, d_in]` is the dictionary, one row a latent, of norm one. A row of the batch uses at most k latents: fewer
where fewer than k pre-activations are positive.

`TopKSAE.encode` and `decode` are the plain, dense mathematics, differentiable as they stand. Training goes through
`reconstruct`, which computes the same from the k active latents a row alone, with a derivative of its own: neither
forward nor backward pass makes dense codes or multiplies by them, and the one large product that is left is the
encoder's. Its derivative treats the choice of the latents as constant (it is, almost everywhere), and gives nothing to
x: an SAE is trained on fixed activations. To differentiate through a splice, use `__call__`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from interp_jax.sae.grouped_top_k import grouped_top_k
from interp_jax.sae.latent_sums import LatentGroups, gathered_sum, group_by_latent, sum_by_latent

__all__ = ["Reconstruction", "TopKSAE", "reconstruct"]

_CHUNK = 64
"""Rows whose k dictionary rows are gathered at a time: a few megabytes, which stay in the cache."""


class TopKSAE(nnx.Module):
    """A TopK sparse autoencoder; a pytree of four arrays."""

    def __init__(
        self,
        *,
        W_enc: Float[Array, "_d_in _d_sae"],
        b_enc: Float[Array, "_d_sae"],
        W_dec: Float[Array, "_d_sae _d_in"],
        b_dec: Float[Array, "_d_in"],
        k: int,
    ):
        """An SAE of given weights.

        Args:
            W_enc: encoder.
            b_enc: encoder bias.
            W_dec: dictionary.
            b_dec: decoder bias, subtracted from the input too.
            k: latents a row may use.

        Raises:
            ValueError: if the shapes do not fit one another, or k is not within 1..d_sae.
        """
        if W_dec.ndim != 2:
            raise ValueError(f"W_dec has shape {W_dec.shape}; expected [d_sae, d_in].")
        d_sae, d_in = W_dec.shape
        check_sizes(d_in, d_sae, k)
        found = (W_enc.shape, b_enc.shape, b_dec.shape)
        expected = ((d_in, d_sae), (d_sae,), (d_in,))
        if found != expected:
            raise ValueError(f"W_dec {W_dec.shape} expects W_enc, b_enc and b_dec of shapes {expected}; found {found}.")
        self.W_enc = nnx.Param(W_enc)
        self.b_enc = nnx.Param(b_enc)
        self.W_dec = nnx.Param(W_dec)
        self.b_dec = nnx.Param(b_dec)
        self.k = k

    @classmethod
    def random(cls, d_in: int, d_sae: int, k: int, *, key: PRNGKeyArray) -> "TopKSAE":
        """Random unit directions; the encoder is the decoder's transpose, the biases are zero.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            k: latents a row may use.
            key: random key for the directions.

        Raises:
            ValueError: if k is not within 1..d_sae, or a size is not positive.
        """
        check_sizes(d_in, d_sae, k)
        directions = jax.random.normal(key, (d_sae, d_in))
        directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
        return cls(W_enc=directions.T, b_enc=jnp.zeros(d_sae), W_dec=directions, b_dec=jnp.zeros(d_in), k=k)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    def pre_activations(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """The encoder's output before the k largest are picked."""
        return (x - self.b_dec[...]) @ self.W_enc[...] + self.b_enc[...]

    def encode_topk(self, x: Float[Array, "*batch d_in"]) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
        """The k largest activations, in falling order and none below zero, and the latents that they belong to.

        Args:
            x: activations.
        """
        pre = self.pre_activations(x)
        values, indices = grouped_top_k(pre.reshape(-1, self.d_sae), self.k)
        shape = (*x.shape[:-1], self.k)
        return jax.nn.relu(values).reshape(shape), indices.reshape(shape)

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes: at most k entries a row are not zero.

        Args:
            x: activations.
        """
        values, indices = self.encode_topk(x)
        flat = values.reshape(-1, self.k)
        rows = jnp.arange(len(flat))[:, None]
        codes = jnp.zeros((len(flat), self.d_sae), values.dtype).at[rows, indices.reshape(-1, self.k)].set(flat)
        return codes.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_in"]:
        """The activations that dense codes stand for.

        Args:
            codes: dense codes.
        """
        return codes @ self.W_dec[...] + self.b_dec[...]

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_in"]:
        """The reconstruction of activations.

        Args:
            x: activations.
        """
        return self.decode(self.encode(x))


def check_sizes(d_in: int, d_sae: int, k: int) -> None:
    """Raises ValueError for sizes that no TopK SAE can have."""
    if d_in < 1 or d_sae < 1:
        raise ValueError(f"d_in is {d_in} and d_sae {d_sae}; expected at least 1 each.")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 1 to d_sae = {d_sae}. Make k smaller or the dictionary wider.")


class Reconstruction(NamedTuple):
    """What the training loss is made of."""

    output: Float[Array, "batch d_in"]
    """The reconstruction."""
    values: Float[Array, "batch k"]
    """Activations; zero where fewer than k are positive."""
    firings: Int[Array, "d_sae"]
    """In how many rows each latent is active."""


def reconstruct(sae: TopKSAE, x: Float[Array, "batch d_in"]) -> Reconstruction:
    """What `sae(x)` gives, from the active latents alone; differentiable with respect to the SAE, not to x.

    Args:
        sae: the autoencoder.
        x: activations.
    """
    fixed = jax.tree.map(jax.lax.stop_gradient, sae)
    values, indices = fixed.encode_topk(jax.lax.stop_gradient(x))
    groups = group_by_latent(indices, values > 0, sae.d_sae)
    weights = sae.W_enc[...], sae.b_enc[...], sae.W_dec[...], sae.b_dec[...]
    output = _decode(weights, x, values, indices, groups)
    return Reconstruction(output, values, groups.counts)


_Weights = tuple[Array, Array, Array, Array]


@jax.custom_vjp
def _decode(weights: _Weights, x: Array, values: Array, indices: Array, groups: LatentGroups) -> Array:
    _, _, W_dec, b_dec = weights
    return gathered_sum(values.T, W_dec, indices.T) + b_dec


def _decode_forward(weights: _Weights, x: Array, values: Array, indices: Array, groups: LatentGroups):
    return _decode(weights, x, values, indices, groups), (weights, x, values, indices, groups)


def _decode_backward(kept, gradient: Array):
    (W_enc, _, W_dec, b_dec), x, values, indices, groups = kept
    by_value = jnp.where(values > 0, _gathered_products(gradient, W_dec, indices), 0)
    d_W_dec = sum_by_latent(values, gradient, groups)
    # A column of ones beside the inputs makes the encoder bias' gradient one more column of the same sum.
    inputs = jnp.concatenate([x - b_dec, jnp.ones_like(x[:, :1])], axis=1)
    d_encoder = sum_by_latent(by_value, inputs, groups)
    d_b_enc = d_encoder[:, -1]
    # b_dec is added to the output, and subtracted from each input by way of every active column of the encoder.
    d_b_dec = jnp.sum(gradient, axis=0) - W_enc @ d_b_enc
    return (d_encoder[:, :-1].T, d_b_enc, d_W_dec, d_b_dec), None, None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _gathered_products(
    rows: Float[Array, "batch d"], matrix: Float[Array, "n d"], indices: Int[Array, "batch k"]
) -> Float[Array, "batch k"]:
    """`rows[b] @ matrix[indices[b, j]]`, a chunk of the batch at a time."""
    run = functools.partial(_products, matrix)
    return jax.lax.map(run, (rows, indices), batch_size=min(_CHUNK, len(rows)))


def _products(matrix: Array, row_and_indices: tuple[Array, Array]) -> Array:
    row, indices = row_and_indices
    return matrix[indices] @ row

"""The BatchTopK sparse autoencoder (Bussmann, Leask, Nanda, "BatchTopK sparse autoencoders", 2024).

In training the `batch * k` largest positive pre-activations of a whole batch are kept, so that a row may use more
latents than another; k is their number a row on average. A single row has no batch: `encode` keeps what is above
`threshold`, a running mean of the least code that training batches kept, and is a JumpReLU.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from interp_jax.sae.autoencoder import Batch, Outcome, SparseAutoencoder, Sparsity, random_arrays
from interp_jax.sae.kth_largest import LargestPairs, largest_pairs
from interp_jax.sae.sparse_pairs import decode_largest_on_mesh, decode_pairs
from interp_jax.sae.topk import check_k

__all__ = ["BatchTopKSAE"]


class BatchTopKSAE(SparseAutoencoder):
    """A BatchTopK sparse autoencoder."""

    code_offsets = ("b_enc", "threshold")
    b_enc: nnx.Param
    threshold: nnx.Param

    def __init__(self, *, b_enc: Float[Array, "_d_sae"], threshold: Float[Array, "_d_sae"], k: int, **arrays):
        """An SAE of given weights.

        Args:
            b_enc: encoder bias.
            threshold: what a pre-activation must exceed to count, outside training: the same for every latent, unless
                they were given by another tool.
            k: latents a row uses on average.
            **arrays: what every `SparseAutoencoder` has.

        Raises:
            ValueError: if the shapes do not fit one another, or k is not within 1..d_sae.
        """
        super().__init__(**arrays)
        self._set_per_latent(b_enc=b_enc, threshold=threshold)
        check_k(k, self.d_sae)
        self.k = k

    @classmethod
    def random(cls, d_in: int, d_sae: int, k: int, *, key: PRNGKeyArray, **shape) -> "BatchTopKSAE":
        """Random unit directions, zero biases and threshold.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            k: latents a row uses on average.
            key: random key.
            **shape: `d_out` and `has_skip` of a transcoder.
        """
        zeros = {name: jnp.zeros(d_sae) for name in ("b_enc", "threshold")}
        return cls(k=k, **zeros, **random_arrays(d_in, d_sae, key=key, **shape))

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations by the threshold, each row by itself.

        Args:
            x: activations.
        """
        pre = self.pre_activations(x)
        return jnp.where((pre > self.threshold[...]) & (pre > 0), pre, 0)

    def batch_pairs(self, x: Float[Array, "batch d_in"]) -> LargestPairs:
        """The `batch * k` largest pre-activations of a batch; no derivative.

        Args:
            x: activations.
        """
        fixed, x = jax.lax.stop_gradient((self, x))
        return largest_pairs(fixed.pre_activations(x), len(x) * self.k)

    def objective(self, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None) -> Outcome:
        """Squared error; see `SparseAutoencoder.objective`. k alone makes the codes sparse."""
        x = batch.x
        if mesh is None:
            pairs = self.batch_pairs(x)
            decoded, firings = decode_pairs(self, x, pairs, pairs.rows, len(x))
        else:
            (decoded,), firings, pairs = decode_largest_on_mesh(self, x, len(x) * self.k, (self.d_sae,), mesh)
        error = batch.target - (decoded + self.b_dec[...] + self.skipped(x))
        squared_error = batch.squared_error(error)
        return Outcome(squared_error, squared_error, error, firings, least_kept(pairs))


def least_kept(pairs: LargestPairs) -> Float[Array, ""]:
    """The least code of a batch that is not zero; zero where there is none."""
    least = jnp.min(jnp.where(pairs.values > 0, pairs.values, jnp.inf))
    return jnp.where(jnp.isfinite(least), least, 0)

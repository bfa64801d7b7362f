"""The ReLU sparse autoencoder with an L1 penalty (Bricken et al., "Towards monosemanticity", 2023).

    codes = relu((x - b_dec) @ W_enc + b_enc)
    loss = mean over rows of |target - output|^2 + coefficient * mean over rows of sum_i codes_i (* |W_dec_i|)

L1 shrinks codes; without a bound on the dictionary's norm it would be lowered for nothing, by small codes and long
rows. Rows are therefore held to norm one (`unit_norm`), or the norm stands in the penalty (Conerly et al. 2024).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from interp_jax.sae.autoencoder import Batch, Outcome, SparseAutoencoder, Sparsity, random_arrays
from interp_jax.sae.column_sums import count_positive
from interp_jax.sae.penalised import PenalisedSAE
from interp_jax.sae.sparse_pairs import SparsePairs, decode_at, per_latent_at, sum_per_latent

__all__ = ["ReLUSAE", "dense_outcome", "l1", "sparse_l1", "sparse_outcome"]


class ReLUSAE(PenalisedSAE):
    """A ReLU sparse autoencoder."""

    b_enc: nnx.Param

    def __init__(self, *, b_enc: Float[Array, "_d_sae"], **arrays):
        """An SAE of given weights.

        Args:
            b_enc: encoder bias.
            **arrays: what every `SparseAutoencoder` has.

        Raises:
            ValueError: if the shapes do not fit one another.
        """
        super().__init__(**arrays)
        self._set_per_latent(b_enc=b_enc)

    @classmethod
    def random(cls, d_in: int, d_sae: int, *, key: PRNGKeyArray, **shape) -> "ReLUSAE":
        """Random unit directions and zero biases.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            key: random key.
            **shape: `d_out` and `has_skip` of a transcoder.
        """
        return cls(b_enc=jnp.zeros(d_sae), **random_arrays(d_in, d_sae, key=key, **shape))

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations.

        Args:
            x: activations.
        """
        return jax.nn.relu(self.pre_activations(x))

    def floor(self) -> Float[Array, "d_sae"]:
        """Zero."""
        return jnp.zeros(self.d_sae)

    def dense_objective(
        self, pre: Float[Array, "batch d_sae"], batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None
    ) -> Outcome:
        """Squared error plus L1; see `PenalisedSAE.dense_objective`."""
        codes = jax.nn.relu(pre)
        return dense_outcome(self, codes, batch, l1(self, codes, sparsity), mesh)

    def sparse_objective(
        self, pre: Float[Array, "pairs"], pairs: SparsePairs, batch: Batch, sparsity: Sparsity
    ) -> Outcome:
        """Squared error plus L1; see `PenalisedSAE.sparse_objective`."""
        penalty = sparse_l1(self, pre, pairs, sparsity, len(batch.x))
        return sparse_outcome(self, pre, pairs, batch, penalty)


def l1(sae: SparseAutoencoder, codes: Float[Array, "batch d_sae"], sparsity: Sparsity) -> Float[Array, ""]:
    """The L1 penalty of codes that are not negative, a mean over rows.

    Args:
        sae: the autoencoder.
        codes: its codes.
        sparsity: the coefficient, and whether a code counts times its row's norm.
    """
    if sparsity.is_norm_weighted:
        sizes = codes @ jnp.linalg.norm(sae.W_dec[...], axis=1)
    else:
        sizes = jnp.sum(codes, axis=1)
    return sparsity.coefficient * jnp.mean(sizes)


def sparse_l1(
    sae: SparseAutoencoder, codes: Float[Array, "pairs"], pairs: SparsePairs, sparsity: Sparsity, batch: int
) -> Float[Array, ""]:
    """`l1` of codes by (row, latent) pairs.

    Args:
        sae: the autoencoder.
        codes: its codes at the pairs; zero at inactive ones.
        pairs: the pairs.
        sparsity: the coefficient, and whether a code counts times its row's norm.
        batch: how many rows there are.
    """
    if sparsity.is_norm_weighted:
        codes = codes * per_latent_at(jnp.linalg.norm(sae.W_dec[...], axis=1), pairs)
    return sparsity.coefficient * (jnp.sum(codes) / batch)


def dense_outcome(
    sae: SparseAutoencoder,
    codes: Float[Array, "batch d_sae"],
    batch: Batch,
    penalty: Float[Array, ""],
    mesh: Mesh | None = None,
) -> Outcome:
    """The outcome of an objective whose codes are dense: squared error plus a penalty.

    Args:
        sae: the autoencoder.
        codes: its codes.
        batch: what the step is trained on.
        penalty: added to the squared error.
        mesh: what the arrays lie on; None where that is one device.
    """
    error = batch.target - (sae.decode(codes) + sae.skipped(batch.x))
    squared_error = batch.squared_error(error)
    loss = squared_error + penalty
    return Outcome(loss, squared_error, error, count_positive(codes, is_split=mesh is not None), jnp.zeros(()))


def sparse_outcome(
    sae: SparseAutoencoder,
    codes: Float[Array, "pairs"],
    pairs: SparsePairs,
    batch: Batch,
    penalty: Float[Array, ""],
) -> Outcome:
    """`dense_outcome` from codes by (row, latent) pairs.

    Args:
        sae: the autoencoder.
        codes: its codes at the pairs, not negative; zero at inactive ones.
        pairs: the pairs, each in its row's place.
        batch: what the step is trained on.
        penalty: added to the squared error.
    """
    error = batch.target - (decode_at(codes, sae.W_dec[...], pairs) + sae.b_dec[...] + sae.skipped(batch.x))
    squared_error = batch.squared_error(error)
    firings = sum_per_latent(jnp.asarray(jax.lax.stop_gradient(codes) > 0, codes.dtype), pairs).astype(jnp.int32)
    return Outcome(squared_error + penalty, squared_error, error, firings, jnp.zeros(()))

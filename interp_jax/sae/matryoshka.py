"""The Matryoshka BatchTopK sparse autoencoder (Bussmann et al., "Learning multi-level features with Matryoshka sparse
autoencoders", 2025).

One dictionary whose prefixes are dictionaries too: the first m_1 latents reconstruct alone, so do the first m_2, and so
on to all of them, and the loss is the mean of their errors. General features thus come first and are not split up by
what stands behind them. Codes are chosen once, by BatchTopK over all latents.

Each prefix' output is that of the one before it plus the latents between them, so all of them together cost one
decoding.
"""

import itertools

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from interp_jax.sae.autoencoder import Batch, Outcome, Sparsity, random_arrays
from interp_jax.sae.batch_topk import BatchTopKSAE, least_kept
from interp_jax.sae.sparse_pairs import decode_largest_on_mesh, decode_pairs

__all__ = ["MatryoshkaSAE"]


class MatryoshkaSAE(BatchTopKSAE):
    """A Matryoshka BatchTopK sparse autoencoder."""

    def __init__(self, *, widths: tuple[int, ...], **arrays):
        """An SAE of given weights.

        Args:
            widths: rising numbers of latents, the last one d_sae: each prefix reconstructs alone.
            **arrays: what a `BatchTopKSAE` has.

        Raises:
            ValueError: if the widths do not rise to d_sae, or for what `BatchTopKSAE` refuses.
        """
        super().__init__(**arrays)
        check_widths(widths, self.d_sae)
        self.widths = tuple(widths)

    @classmethod
    def random(
        cls, d_in: int, d_sae: int, k: int, *, widths: tuple[int, ...], key: PRNGKeyArray, **shape
    ) -> "MatryoshkaSAE":
        """Random unit directions, zero biases and threshold.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            k: latents a row uses on average.
            widths: rising numbers of latents, the last one d_sae.
            key: random key.
            **shape: `d_out` and `has_skip` of a transcoder.
        """
        zeros = {name: jnp.zeros(d_sae) for name in ("b_enc", "threshold")}
        return cls(k=k, widths=widths, **zeros, **random_arrays(d_in, d_sae, key=key, **shape))

    def objective(self, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None) -> Outcome:
        """The mean over prefixes of the squared error; see `SparseAutoencoder.objective`."""
        x = batch.x
        if mesh is None:
            pairs = self.batch_pairs(x)
            segment = jnp.searchsorted(jnp.asarray(self.widths), pairs.columns, side="right").astype(jnp.int32)
            n_segments = len(self.widths)
            decoded, firings = decode_pairs(self, x, pairs, segment * len(x) + pairs.rows, n_segments * len(x))
            decoded = decoded.reshape(n_segments, len(x), -1)
        else:
            decoded, firings, pairs = decode_largest_on_mesh(self, x, len(x) * self.k, self.widths, mesh)
        outputs = jnp.cumsum(decoded, axis=0) + self.b_dec[...] + self.skipped(x)
        errors = batch.target - outputs
        squared = batch.squared_error(errors)
        return Outcome(jnp.mean(squared), squared[-1], errors[-1], firings, least_kept(pairs))


def check_widths(widths: tuple[int, ...], d_sae: int) -> None:
    """Raises ValueError for prefixes that no Matryoshka SAE can have."""
    is_rising = all(0 < first < second for first, second in itertools.pairwise(widths))
    if not widths or not is_rising or widths[-1] != d_sae or widths[0] < 1:
        raise ValueError(f"widths are {widths}; expected rising numbers of latents that end with d_sae = {d_sae}.")

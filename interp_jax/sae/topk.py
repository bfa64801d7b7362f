"""The TopK sparse autoencoder (Gao et al., "Scaling and evaluating sparse autoencoders", 2024).

    codes = top_k(relu((x - b_dec) @ W_enc + b_enc));   reconstruction = codes @ W_dec + b_dec

A row of the batch uses at most k latents: fewer where fewer than k pre-activations are positive.

`TopKSAE.encode` and `decode` are the plain, dense mathematics, differentiable as they stand. Training goes through
`reconstruct`, which computes the same from the k active latents a row alone, with a derivative of its own: neither
forward nor backward pass makes dense codes or multiplies by them, and the one large product that is left is the
encoder's. Its derivative treats the choice of the latents as constant (it is, almost everywhere), and gives nothing to
x: an SAE is trained on fixed activations. To differentiate through a splice, use `__call__`.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from interp_jax.sae.autoencoder import Batch, Outcome, SparseAutoencoder, Sparsity, affine, random_arrays
from interp_jax.sae.encoder_gradients import SparseWeights, encoder_gradients, sparse_weights
from interp_jax.sae.gpu_or_default import gpu_or_default
from interp_jax.sae.grouped_top_k import grouped_top_k
from interp_jax.sae.latent_sums import LatentGroups, gathered_sum, group_by_latent, sum_by_latent
from interp_jax.sae.mesh import DATA, LATENT, WEIGHTS, sum_over_shards

__all__ = ["Reconstruction", "TopKSAE", "reconstruct", "reconstruct_on_mesh"]

_SLICE = 256
"""Rows that are encoded at a time on a CPU: few enough for the cache, enough for a product at full speed."""
_CHUNK = 64
"""Rows whose k dictionary rows are gathered at a time: a few megabytes, which stay in the cache."""


class TopKSAE(SparseAutoencoder):
    """A TopK sparse autoencoder."""

    b_enc: nnx.Param

    def __init__(self, *, b_enc: Float[Array, "_d_sae"], k: int, **arrays):
        """An SAE of given weights.

        Args:
            b_enc: encoder bias.
            k: latents a row may use.
            **arrays: what every `SparseAutoencoder` has.

        Raises:
            ValueError: if the shapes do not fit one another, or k is not within 1..d_sae.
        """
        super().__init__(**arrays)
        self._set_per_latent(b_enc=b_enc)
        check_k(k, self.d_sae)
        self.k = k

    @classmethod
    def random(cls, d_in: int, d_sae: int, k: int, *, key: PRNGKeyArray, **shape) -> "TopKSAE":
        """Random unit directions and zero biases.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            k: latents a row may use.
            key: random key for the directions.
            **shape: `d_out` and `has_skip` of a transcoder.

        Raises:
            ValueError: if k is not within 1..d_sae, or a size is not positive.
        """
        return cls(b_enc=jnp.zeros(d_sae), k=k, **random_arrays(d_in, d_sae, key=key, **shape))

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

    def objective(self, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None) -> Outcome:
        """Squared error; see `SparseAutoencoder.objective`. k alone makes the codes sparse."""
        x = batch.x
        output, firings = reconstruct(self, x) if mesh is None else reconstruct_on_mesh(self, x, mesh)
        error = batch.target - output
        squared_error = batch.squared_error(error)
        return Outcome(squared_error, squared_error, error, firings, jnp.zeros(()))


def check_k(k: int, d_sae: int) -> None:
    """Raises ValueError for a k that no TopK SAE can have."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 1 to d_sae = {d_sae}. Make k smaller or the dictionary wider.")


class Reconstruction(NamedTuple):
    """What the training loss is made of."""

    output: Float[Array, "batch d_out"]
    """The reconstruction."""
    firings: Int[Array, "d_sae"]
    """In how many rows each latent is active."""


def reconstruct(sae: TopKSAE, x: Float[Array, "batch d_in"]) -> Reconstruction:
    """What `sae(x)` gives, from the active latents alone; differentiable with respect to the SAE, not to x.

    Args:
        sae: the autoencoder.
        x: activations.
    """
    fixed = jax.tree.map(jax.lax.stop_gradient, sae)
    x = jax.lax.stop_gradient(x)
    values, indices = jax.lax.platform_dependent(
        x, cpu=functools.partial(_encode_by_slices, fixed), default=fixed.encode_topk
    )
    groups = group_by_latent(indices.ravel(), values.ravel() > 0, sae.d_sae)
    output = _decode(sparse_weights(sae), x, values, indices, groups) + sae.b_dec[...] + sae.skipped(x)
    return Reconstruction(output, groups.counts)


def _encode_by_slices(
    sae: TopKSAE, x: Float[Array, "batch d_in"]
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """`sae.encode_topk(x)`, slice by slice where the batch is made of whole ones.

    On a CPU a slice's pre-activations are still in the cache when the k largest are picked.
    """
    if len(x) % _SLICE or len(x) == _SLICE:
        return sae.encode_topk(x)
    values, indices = jax.lax.map(sae.encode_topk, x.reshape(-1, _SLICE, sae.d_in))
    return values.reshape(-1, sae.k), indices.reshape(-1, sae.k)


@jax.custom_vjp
def _decode(weights: SparseWeights, x: Array, values: Array, indices: Array, groups: LatentGroups) -> Array:
    return gathered_sum(values.T, weights[2], indices.T)


def _decode_forward(weights: SparseWeights, x: Array, values: Array, indices: Array, groups: LatentGroups):
    return _decode(weights, x, values, indices, groups), (weights, x, values, indices, groups)


def _decode_backward(kept, gradient: Array):
    (W_enc, _, W_dec, shift), x, values, indices, groups = kept
    by_value = jnp.where(values > 0, _gathered_products(gradient, W_dec, indices), 0)
    row_of = jnp.arange(values.size, dtype=jnp.int32) // values.shape[1]
    d_W_dec = sum_by_latent(values.ravel(), gradient, row_of, groups)
    d_W_enc, d_b_enc, d_shift = encoder_gradients(W_enc, x - shift, by_value.ravel(), row_of, groups)
    return (d_W_enc, d_b_enc, d_W_dec, d_shift), None, None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _gathered_products(
    rows: Float[Array, "batch d"], matrix: Float[Array, "n d"], indices: Int[Array, "batch k"]
) -> Float[Array, "batch k"]:
    """`rows[b] @ matrix[indices[b, j]]`."""

    def in_chunks(rows: Array, matrix: Array, indices: Array) -> Array:
        run = functools.partial(_products, matrix)
        return jax.lax.map(run, (rows, indices), batch_size=min(_CHUNK, len(rows)))

    def at_once(rows: Array, matrix: Array, indices: Array) -> Array:
        return jnp.sum(matrix[indices] * rows[:, None], axis=2)

    return gpu_or_default(rows, matrix, indices, gpu=at_once, default=in_chunks)


def _products(matrix: Array, row_and_indices: tuple[Array, Array]) -> Array:
    row, indices = row_and_indices
    return matrix[indices] @ row


def reconstruct_on_mesh(sae: TopKSAE, x: Float[Array, "batch d_in"], mesh: Mesh) -> Reconstruction:
    """What `reconstruct` gives, where rows and latents are split over devices.

    The latents of a row are those of one device: each shard's k largest pre-activations, k numbers and not their
    dictionary rows, are shown to all shards, and each keeps those of its own that are among the row's k largest. A tie
    goes to the lower latent, as it does there.

    Each shard works on places for k latents a row, since all of a row's may be its own. So more shards of latents make
    the encoder and the optimiser cheaper and not the sparse sums, which more shards of rows do.

    Args:
        sae: the autoencoder.
        x: activations.
        mesh: the mesh.
    """
    x = jax.lax.stop_gradient(x)
    output, firings = cast(Any, _decode_on_mesh(mesh, sae.k, sparse_weights(sae), x))
    return Reconstruction(output + sae.b_dec[...] + sae.skipped(x), firings)


_CODE = (P(DATA, LATENT), P(DATA, LATENT), P((DATA, LATENT)))
"""Where a sparse code lies: each shard's values, its latents by their numbers within the shard, and their groups."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode_on_mesh(mesh: Mesh, k: int, weights: SparseWeights, x: Array) -> tuple[Array, Array]:
    return _decode_on_mesh_forward(mesh, k, weights, x)[0]


def _decode_on_mesh_forward(mesh: Mesh, k: int, weights: SparseWeights, x: Array):
    def of_shard(weights: SparseWeights, x: Array):
        W_enc, b_enc, _, shift = weights
        values, indices = _own_of_topk(affine(x, shift, W_enc, b_enc), k)
        groups = group_by_latent(indices.ravel(), values.ravel() > 0, W_enc.shape[1])
        output = _decode(weights, x, values, indices, groups)
        sums = jax.lax.psum(output, LATENT), jax.lax.psum(groups.counts, DATA)
        return *sums, (values, indices, groups)

    specs = {"in_specs": (WEIGHTS, P(DATA)), "out_specs": (P(DATA), P(LATENT), _CODE)}
    # The loops inside start from zeros, which are the same on all shards, and end in sums that are not.
    output, firings, code = jax.shard_map(of_shard, mesh=mesh, check_vma=False, **specs)(weights, x)
    return (output, firings), (weights, x, code)


def _decode_on_mesh_backward(mesh: Mesh, k: int, kept, gradients: tuple[Array, Any]):
    def of_shard(weights: SparseWeights, x: Array, code, gradient: Array) -> SparseWeights:
        return sum_over_shards(_decode_backward((weights, x, *code), gradient)[0])

    specs = {"in_specs": (WEIGHTS, P(DATA), _CODE, P(DATA)), "out_specs": WEIGHTS}
    weights, x, code = kept
    by_weights = jax.shard_map(of_shard, mesh=mesh, check_vma=False, **specs)(weights, x, code, gradients[0])
    return by_weights, None


_decode_on_mesh.defvjp(_decode_on_mesh_forward, _decode_on_mesh_backward)


def _own_of_topk(pre: Float[Array, "rows n"], k: int) -> tuple[Float[Array, "rows own"], Int[Array, "rows own"]]:
    """Of each row's k largest pre-activations over all shards, those of this shard; zero in the place of others."""
    values, indices = grouped_top_k(pre, min(k, pre.shape[1]))
    values, n_own = jax.nn.relu(values), values.shape[1]
    # Shards stand in the order of their latents, and so do equal numbers within one: ties in the order of latents.
    everyone = jax.lax.all_gather(values, LATENT, axis=1, tiled=True)
    kth = jax.lax.top_k(everyone, min(k, everyone.shape[1]))[0][:, -1:]
    is_above = ~(everyone <= kth)  # and not `>`, so that NaN is kept and seen in the loss
    room = k - jnp.sum(is_above, axis=1, keepdims=True)
    is_tie = everyone == kth
    is_kept = is_above | (is_tie & (jnp.cumsum(is_tie, axis=1) <= room))
    own = jax.lax.dynamic_slice_in_dim(is_kept, jax.lax.axis_index(LATENT) * n_own, n_own, axis=1)
    return jnp.where(own, values, 0), indices

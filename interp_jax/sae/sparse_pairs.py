"""Training on (row, latent) pairs, as many a row as there happen to be, in place of dense codes.

For BatchTopK and Matryoshka, whose rows use different numbers of latents, and for the kinds with a penalty where it has
made the codes sparse. What `topk.reconstruct` is for k latents a row: neither pass makes dense codes, and the choice of
the pairs is constant for the derivative. Three operations have a derivative as sparse as themselves; what stands
between them is plain arithmetic on one number a pair:

    pre_activations_at   the encoder's output at the pairs
    per_latent_at        a parameter of one number a latent, at the pairs
    decode_at            sums of codes times dictionary rows
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from interp_jax.sae.autoencoder import SparseAutoencoder, affine
from interp_jax.sae.counts_up_to import counts_up_to
from interp_jax.sae.encoder_gradients import SparseWeights, encoder_gradients, sparse_weights
from interp_jax.sae.gpu_or_default import gpu_or_default
from interp_jax.sae.kth_largest import LargestPairs, largest_pairs_of_shard
from interp_jax.sae.latent_sums import LatentGroups, group_by_latent, sum_by_latent
from interp_jax.sae.mesh import DATA, LATENT, WEIGHTS, first_latent, sum_over_shards
from interp_jax.sae.true_places import TruePlaces, first_true

__all__ = [
    "SparsePairs",
    "decode_at",
    "decode_largest_on_mesh",
    "decode_pairs",
    "first_pairs",
    "per_latent_at",
    "pre_activations_at",
    "sum_per_latent",
]

_CHUNK = 2048
"""Pairs whose rows are gathered at a time: a few megabytes, which stay in the cache."""


class SparsePairs(NamedTuple):
    """Which latents count in which rows."""

    rows: Int[Array, "pairs"]
    columns: Int[Array, "pairs"]
    is_active: Bool[Array, "pairs"]
    """False where fewer pairs were found than there are places."""
    by_latent: LatentGroups
    places: Int[Array, "pairs"]
    """Which sum each pair's code goes to: its row's, or that of a part of its row."""
    by_place: LatentGroups


def first_pairs(mask: TruePlaces, shape: tuple[int, int], n_pairs: int) -> SparsePairs:
    """The first true entries of a mask, each pair's code going to its row's sum.

    Args:
        mask: the packed mask of a batch's rows and latents.
        shape: its shape, `(batch, d_sae)`.
        n_pairs: how many pairs there is room for.
    """
    found = first_true(mask, n_pairs)
    batch, d_sae = shape
    is_active, known = found >= 0, jnp.maximum(found, 0)
    rows, columns = known // d_sae, known % d_sae
    # In the order of the rows as they are: nothing is to be sorted.
    starts = jnp.pad(counts_up_to(jnp.where(is_active, rows, batch), batch), (1, 0))
    by_row = LatentGroups(jnp.arange(n_pairs, dtype=jnp.int32), starts)
    return SparsePairs(rows, columns, is_active, group_by_latent(columns, is_active, d_sae), rows, by_row)


@jax.custom_vjp
def pre_activations_at(
    weights: SparseWeights, x: Float[Array, "batch d_in"], values: Float[Array, "pairs"], pairs: SparsePairs
) -> Float[Array, "pairs"]:
    """The encoder's output at the pairs, which is known; differentiable by the weights alone.

    Args:
        weights: of the autoencoder.
        x: activations.
        values: the encoder's output at the pairs, computed before.
        pairs: the pairs.
    """
    return values


def _pre_activations_forward(weights: SparseWeights, x: Array, values: Array, pairs: SparsePairs):
    return values, (weights, x, pairs)


def _pre_activations_backward(kept, gradient: Array):
    (W_enc, _, W_dec, shift), x, pairs = kept
    d_W_enc, d_b_enc, d_shift = encoder_gradients(W_enc, x - shift, gradient, pairs.rows, pairs.by_latent)
    return (d_W_enc, d_b_enc, jnp.zeros_like(W_dec), d_shift), None, None, None


pre_activations_at.defvjp(_pre_activations_forward, _pre_activations_backward)


@jax.custom_vjp
def per_latent_at(parameter: Float[Array, "d_sae"], pairs: SparsePairs) -> Float[Array, "pairs"]:
    """What each pair's latent has of a parameter; the derivative is a sum by sorted pairs, not a scatter.

    Args:
        parameter: one number a latent.
        pairs: the pairs.
    """
    return parameter[pairs.columns]


def _per_latent_backward(pairs: SparsePairs, gradient: Array):
    return sum_per_latent(gradient, pairs), None


def sum_per_latent(numbers: Float[Array, "pairs"], pairs: SparsePairs) -> Float[Array, "d_sae"]:
    """The sum of a number over the pairs of each latent.

    Args:
        numbers: one a pair; those of inactive pairs are not looked at.
        pairs: the pairs.
    """
    one = jnp.ones((1, 1), numbers.dtype)
    return sum_by_latent(numbers, one, jnp.zeros_like(pairs.rows), pairs.by_latent)[:, 0]


per_latent_at.defvjp(lambda parameter, pairs: (per_latent_at(parameter, pairs), pairs), _per_latent_backward)


@jax.custom_vjp
def decode_at(
    codes: Float[Array, "pairs"], W_dec: Float[Array, "d_sae d_out"], pairs: SparsePairs
) -> Float[Array, "n_places d_out"]:
    """For each place, the sum of its pairs' codes times their dictionary rows.

    Args:
        codes: one a pair; those of inactive pairs are not looked at.
        W_dec: the dictionary.
        pairs: the pairs.
    """
    return sum_by_latent(codes, W_dec, pairs.columns, pairs.by_place)


def _decode_at_backward(kept, gradient: Array):
    codes, W_dec, pairs = kept

    def in_chunks(gradient: Array, W_dec: Array, places: Array, columns: Array) -> Array:
        product = functools.partial(_product, gradient, W_dec)
        return jax.lax.map(product, (places, columns), batch_size=min(_CHUNK, len(places)))

    def at_once(gradient: Array, W_dec: Array, places: Array, columns: Array) -> Array:
        return jnp.sum(gradient[places] * W_dec[columns], axis=1)

    products = gpu_or_default(gradient, W_dec, pairs.places, pairs.columns, gpu=at_once, default=in_chunks)
    by_code = jnp.where(pairs.is_active, products, 0)
    return by_code, sum_by_latent(codes, gradient, pairs.places, pairs.by_latent), None


decode_at.defvjp(lambda *given: (decode_at(*given), given), _decode_at_backward)


def _product(gradient: Array, W_dec: Array, place_and_latent: tuple[Array, Array]) -> Array:
    place, latent = place_and_latent
    return gradient[place] @ W_dec[latent]


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
    grouped = _grouped(pairs, places, sae.d_sae, n_places)
    return _decode(sparse_weights(sae), x, pairs.values, grouped), grouped.by_latent.counts


def _decode(weights: SparseWeights, x: Array, values: Array, pairs: SparsePairs) -> Array:
    return decode_at(pre_activations_at(weights, x, values, pairs), weights[2], pairs)


def decode_largest_on_mesh(
    sae: SparseAutoencoder, x: Float[Array, "batch d_in"], n_pairs: int, widths: tuple[int, ...], mesh: Mesh
) -> tuple[Float[Array, "segments batch d_out"], Int[Array, "d_sae"], LargestPairs]:
    """What `decode_pairs` gives of a batch's largest pre-activations, where rows and latents are split over devices.

    The pairs are those of one device: the n_pairs-th largest number of all shards is searched for by counts that are
    summed over the mesh, and of several equal to it those of the first rows are taken, as there.

    All pairs may happen to be one shard's. Where it has no more than twice its share, it works on places for so many;
    else on places for all, which is as slow as one device.

    Args:
        sae: the autoencoder, with an encoder bias `b_enc`.
        x: activations.
        n_pairs: how many pairs are kept.
        widths: rising numbers of latents, the last one d_sae: a row has a sum for the latents from each to the next.
        mesh: the mesh.

    Returns:
        The sums, differentiable with respect to the autoencoder, without the decoder bias; in how many rows each latent
        is active; each shard's pairs.
    """
    return _decode_on_mesh(mesh, n_pairs, widths, sparse_weights(sae), jax.lax.stop_gradient(x))


_SHARD = P((DATA, LATENT))
"""Where pairs lie: those of one shard after those of another."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decode_on_mesh(mesh: Mesh, n_pairs: int, widths: tuple[int, ...], weights: SparseWeights, x: Array) -> Any:
    return _decode_on_mesh_forward(mesh, n_pairs, widths, weights, x)[0]


def _decode_on_mesh_forward(mesh: Mesh, n_pairs: int, widths: tuple[int, ...], weights: SparseWeights, x: Array):
    def of_shard(weights: SparseWeights, x: Array):
        W_enc, b_enc, _, shift = weights
        n_local = W_enc.shape[1]
        pre = affine(x, shift, W_enc, b_enc)
        pairs = largest_pairs_of_shard(pre, n_pairs, rows_axis=DATA, columns_axis=LATENT)
        latents = pairs.columns + first_latent(n_local)
        segments = jnp.searchsorted(jnp.asarray(widths, jnp.int32), latents, side="right").astype(jnp.int32)
        places = segments * len(x) + pairs.rows

        def sums(pairs: LargestPairs, places: Array) -> tuple[Array, Array]:
            grouped = _grouped(pairs, places, n_local, len(widths) * len(x))
            return _decode(weights, x, pairs.values, grouped), grouped.by_latent.counts

        output, firings = _on_as_few(mesh, n_pairs, pairs, places, sums)
        output = jax.lax.psum(output.reshape(len(widths), len(x), -1), LATENT)
        return output, jax.lax.psum(firings, DATA), pairs, places

    specs = {"in_specs": (WEIGHTS, P(DATA)), "out_specs": (P(None, DATA), P(LATENT), _SHARD, _SHARD)}
    # The loops inside start from zeros, which are the same on all shards, and end in sums that are not.
    output, firings, pairs, places = jax.shard_map(of_shard, mesh=mesh, check_vma=False, **specs)(weights, x)
    return (output, firings, pairs), (weights, x, pairs, places)


def _decode_on_mesh_backward(mesh: Mesh, n_pairs: int, widths: tuple[int, ...], kept, gradients: tuple[Any, ...]):
    def of_shard(
        weights: SparseWeights, x: Array, pairs: LargestPairs, places: Array, gradient: Array
    ) -> SparseWeights:
        gradient = gradient.reshape(len(widths) * len(x), -1)

        def by_weights(pairs: LargestPairs, places: Array) -> SparseWeights:
            # Grouped once more, which costs less than to keep groups of either size.
            grouped = _grouped(pairs, places, weights[0].shape[1], len(gradient))
            return jax.vjp(lambda weights: _decode(weights, x, pairs.values, grouped), weights)[1](gradient)[0]

        return sum_over_shards(_on_as_few(mesh, n_pairs, pairs, places, by_weights))

    specs = {"in_specs": (WEIGHTS, P(DATA), _SHARD, _SHARD, P(None, DATA)), "out_specs": WEIGHTS}
    weights, x, pairs, places = kept
    by_weights = jax.shard_map(of_shard, mesh=mesh, check_vma=False, **specs)(weights, x, pairs, places, gradients[0])
    return by_weights, None


_decode_on_mesh.defvjp(_decode_on_mesh_forward, _decode_on_mesh_backward)


def _grouped(pairs: LargestPairs, places: Array, d_sae: int, n_places: int) -> SparsePairs:
    is_active = pairs.values > 0
    by_latent = group_by_latent(pairs.columns, is_active, d_sae)
    by_place = group_by_latent(places, is_active, n_places)
    return SparsePairs(pairs.rows, pairs.columns, is_active, by_latent, places, by_place)


def _on_as_few(mesh: Mesh, n_pairs: int, pairs: LargestPairs, places: Array, work: Callable[..., Any]) -> Any:
    """What a function without collectives gives of a shard's pairs, on twice its share of places if they suffice."""
    few = -(-2 * n_pairs // mesh.size)
    if few >= len(places):
        return work(pairs, places)

    def on_few(pairs: LargestPairs, places: Array) -> Any:
        return work(*jax.tree.map(lambda array: array[:few], (pairs, places)))

    # Pairs that are active come first.
    return jax.lax.cond(pairs.values[few] > 0, work, on_few, pairs, places)

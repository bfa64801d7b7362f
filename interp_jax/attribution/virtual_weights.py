"""Virtual weights: how strongly a latent of one layer writes what a latent of a later layer reads.

The residual stream adds up, so a decoder row of one dictionary meets the encoder columns of every later one:
`W_dec[i] @ W_enc[:, j]`, or `W_dec[i] @ ov @ W_enc[:, j]` where a head carries it from another position. It is a
property of the weights: what would happen if the latent fired, whether or not the two ever fire together.

A norm between the two is not in it. Both dictionaries should be of the stream, or write to it and read from it; for one
that reads normed values (`mlp_in`), fold the model's norms first (`fold_norms`), and a positive factor a position
remains.

All pairs are a matrix `[d_sae, d_sae]`, gigabytes for large dictionaries; `strongest_virtual_weights` never makes it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.attribution.head_circuits import LowRank
from interp_jax.sae.autoencoder import SparseAutoencoder

__all__ = ["StrongestWeights", "strongest_virtual_weights", "virtual_weights"]

_CHUNK = 1024  # upstream latents at a time: 75 MB of products with 18,000 latents downstream


class StrongestWeights(NamedTuple):
    """For each downstream latent, the upstream latents of the largest virtual weights by size, the largest first."""

    latents: Int[np.ndarray, "n_downstream k"]
    """Which upstream latents."""
    weights: Float[np.ndarray, "n_downstream k"]
    """Their virtual weights."""


def virtual_weights(
    upstream: SparseAutoencoder,
    downstream: SparseAutoencoder,
    through: LowRank | None = None,
    *,
    upstream_latents: int | Sequence[int] | None = None,
    downstream_latents: int | Sequence[int] | None = None,
) -> Float[Array, "n_upstream n_downstream"]:
    """What each upstream latent adds, per unit of its code, to each downstream latent's pre-activation.

    Args:
        upstream: The earlier dictionary.
        downstream: The later one.
        through: A head's OV circuit, or a product of several, that carries the one to the other; None for the stream
            itself.
        upstream_latents: Which latents of the one; None for all.
        downstream_latents: Which of the other.

    Returns:
        The virtual weights.

    Raises:
        ValueError: Widths do not fit, or a latent does not exist.
    """
    _check_widths(upstream, downstream, through)
    rows = upstream.W_dec[...][_chosen(upstream_latents, upstream.d_sae, "upstream")]
    columns = downstream.W_enc[...][:, _chosen(downstream_latents, downstream.d_sae, "downstream")]
    return _products(rows, through, columns)


def strongest_virtual_weights(
    upstream: SparseAutoencoder,
    downstream: SparseAutoencoder,
    k: int,
    through: LowRank | None = None,
    *,
    downstream_latents: int | Sequence[int] | None = None,
) -> StrongestWeights:
    """The largest virtual weights into each downstream latent, without a matrix of them all.

    Args:
        upstream: The earlier dictionary.
        downstream: The later one.
        k: How many for each downstream latent.
        through: As in `virtual_weights`.
        downstream_latents: Which latents; None for all.

    Returns:
        Latents and weights.

    Raises:
        ValueError: Widths do not fit, a latent does not exist, or there are no `k` upstream latents.
    """
    _check_widths(upstream, downstream, through)
    if not 1 <= k <= upstream.d_sae:
        raise ValueError(f"k={k}; the upstream dictionary has {upstream.d_sae} latents, so it must be 1 to that.")
    chosen = _chosen(downstream_latents, downstream.d_sae, "downstream")
    factors = None if through is None else (through.left, through.right)
    found = _strongest(upstream.W_dec[...], factors, downstream.W_enc[...][:, chosen], k)
    return StrongestWeights(*map(np.asarray, found))


@functools.partial(jax.jit, static_argnames="k")
def _strongest(
    rows: Array, factors: tuple[Array, Array] | None, columns: Array, k: int
) -> tuple[Int[Array, "columns k"], Float[Array, "columns k"]]:
    through = None if factors is None else LowRank(*factors)
    n, chunk = len(rows), min(_CHUNK, len(rows))
    # The last chunk starts early enough to be full; what it sees again is left out.
    starts = jnp.minimum(jnp.arange(0, n, chunk), n - chunk)

    def merge(kept: tuple[Array, ...], step: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        number, start = step
        weights = _products(jax.lax.dynamic_slice_in_dim(rows, start, chunk), through, columns).T
        latents = start + jnp.arange(chunk)
        sizes = jnp.where(latents >= number * chunk, jnp.abs(weights), -1.0)
        new = jnp.broadcast_to(latents, weights.shape), weights, sizes
        everything = [jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True)]
        _, places = jax.lax.top_k(everything[2], k)
        return tuple(jnp.take_along_axis(each, places, axis=1) for each in everything), None

    shape = (columns.shape[1], k)
    nothing = jnp.zeros(shape, starts.dtype), jnp.zeros(shape, rows.dtype), jnp.full(shape, -1.0, rows.dtype)
    latents, weights, _ = jax.lax.scan(merge, nothing, (jnp.arange(len(starts)), starts))[0]
    return latents, weights


def _products(rows: Array, through: LowRank | None, columns: Array) -> Array:
    if through is None:
        return rows @ columns
    return (rows @ through.left) @ (through.right @ columns)


def _check_widths(upstream: SparseAutoencoder, downstream: SparseAutoencoder, through: LowRank | None) -> None:
    for name, sae in (("upstream", upstream), ("downstream", downstream)):
        if not isinstance(sae, SparseAutoencoder):
            raise ValueError(f"Virtual weights need W_enc and W_dec; {name} is a {type(sae).__name__}.")
    widths = (upstream.d_out, downstream.d_in)
    if widths != ((upstream.d_out,) * 2 if through is None else through.shape):
        via = "" if through is None else f"through a circuit of shape {through.shape} "
        raise ValueError(
            f"The upstream dictionary writes vectors of width {widths[0]}, and {via}the downstream one reads width "
            f"{widths[1]}: they do not meet."
        )


def _chosen(latents: int | Sequence[int] | None, d_sae: int, name: str) -> np.ndarray:
    if latents is None:
        return np.arange(d_sae)
    numbers = np.atleast_1d(np.asarray(latents))
    if not len(numbers) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"{name}_latents={latents!r}; give one latent's number or more, or None for all.")
    wrong = numbers[(numbers < 0) | (numbers >= d_sae)]
    if len(wrong):
        raise ValueError(f"There is no {name} latent {wrong[0]}; they are 0 to {d_sae - 1}.")
    return numbers

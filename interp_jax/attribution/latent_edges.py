"""Attribution between latents: how much of a later latent's code comes from each latent of an earlier place.

    edge(u at p -> d at q) = code_u[p] * d code_d[q] / d code_u[p]

by the model's own derivative: one backward pass a downstream latent gives its edges from every upstream latent and
position, and from the upstream autoencoder's error (Marks et al. 2024; Dunefsky et al. 2024 for the frozen form). A
latent that is not active has no edges into it.

What is held constant decides what an edge means. As it is, an edge counts every path: through values, through where
attention looks, through the size of the stream. With `freeze_attention` the attention patterns are constants, and an
edge is what flows through the heads' values: direct feature attribution through attention. With `freeze_norms` the
sizes that norms divide by are constants too. Between two places with nothing but attention in between, edges then add
up to what the downstream encoder reads. Without it they nearly cancel: a norm's output does not change when all of its
input grows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.attribution.latent_nodes import Place, check_places
from interp_jax.attribution.nodes import sites_of
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import check_ids
from interp_jax.models.transformer import Transformer
from interp_jax.sae.protocol import Autoencoder

__all__ = ["LatentEdges", "latent_edges"]

_AT_ONCE = 8  # backward passes side by side


@dataclasses.dataclass(frozen=True)
class LatentEdges:
    """Edges into some latents of a later place; the first axis of every array is that of `targets`."""

    targets: tuple[tuple[int, int], ...]
    """The downstream latents, as (position, latent)."""
    codes: Float[np.ndarray, "n_targets"]
    """Their codes."""
    latents: Float[np.ndarray, "n_targets seq d_sae"]
    """The edge from each upstream latent at each position, in units of the downstream code."""
    error: Float[np.ndarray, "n_targets seq"]
    """The edge from what the upstream autoencoder misses, at each position."""
    bias: Float[np.ndarray, "n_targets seq"]
    """The edge from its decoder's bias."""

    def ranked(self, k: int = 10, target: int = 0) -> list[tuple[float, int, int]]:
        """The largest edges from latents into one target.

        Args:
            k: How many at most.
            target: Which, as a place in `targets`.

        Returns:
            (edge, position, latent) of each, the largest by size first.
        """
        edges = self.latents[target]
        order = np.argsort(-np.abs(edges), axis=None, kind="stable")[:k]
        places = zip(*np.unravel_index(order, edges.shape), strict=True)
        return [(float(edges[place]), int(place[0]), int(place[1])) for place in places if edges[place]]


def latent_edges(
    language_model: LanguageModel,
    tokens: Int[Array | np.ndarray, "seq"],
    upstream: Place,
    upstream_sae: Autoencoder,
    downstream: Place,
    downstream_sae: Autoencoder,
    targets: Sequence[tuple[int, int]],
    *,
    freeze_attention: bool = False,
    freeze_norms: bool = False,
) -> LatentEdges:
    """The edges into some latents from all latents, and the error, of an earlier place.

    Args:
        language_model: The model.
        tokens: One prompt.
        upstream: Where the earlier autoencoder stands, as (layer, site).
        upstream_sae: The autoencoder.
        downstream: Where the later one stands.
        downstream_sae: The autoencoder.
        targets: The downstream latents, as (position, latent).
        freeze_attention: Whether attention patterns are constants.
        freeze_norms: Whether the sizes that norms divide by are constants. It needs this project's `Transformer`.

    Returns:
        The edges.

    Raises:
        ValueError: A token, a place or a target does not exist, the downstream place does not come after the upstream
            one, or norms cannot be frozen.
    """
    if np.ndim(tokens) != 1:
        raise ValueError(f"tokens has shape {np.shape(tokens)}; edges are of one prompt, [seq]: give tokens[0].")
    tokens = np.asarray(tokens)
    check_ids(tokens, language_model.vocab_size)
    check_places(language_model, {upstream: upstream_sae})
    check_places(language_model, {downstream: downstream_sae})
    order = [(row.layer, row.name) for row in sites_of(language_model, len(tokens))]
    if order.index(upstream) >= order.index(downstream):
        raise ValueError(
            f"{downstream} does not come after {upstream} in the pass, so there are no edges between them."
        )
    given = np.asarray(targets, np.int64).reshape(-1, 2)
    limits = np.array([len(tokens), downstream_sae.d_sae])
    wrong = given[((given < 0) | (given >= limits)).any(axis=1)]
    if len(wrong) or not len(given):
        found = f"There is no target {tuple(map(int, wrong[0]))}" if len(wrong) else "There are no targets"
        raise ValueError(f"{found}; targets are (position, latent), up to ({limits[0] - 1}, {limits[1] - 1}).")
    params = language_model.params
    if freeze_norms and (not isinstance(params, Transformer) or params.config.post_norms):
        raise ValueError(
            "freeze_norms needs this project's Transformer, with norms before attention and MLP only: "
            f"{language_model.name} is another. Leave it out, and read edges as changes."
        )
    # To a power of two, so that other numbers of targets run in the same program.
    n = len(given)
    padded = np.concatenate([given, np.repeat(given[-1:], (1 << (n - 1).bit_length()) - n, axis=0)])
    found = _edges(
        language_model.forward,
        (upstream, downstream),
        freeze_attention,
        freeze_norms,
        params,
        jnp.asarray(tokens, jnp.int32)[None],
        (upstream_sae, downstream_sae),
        jnp.asarray(padded, jnp.int32),
    )
    return LatentEdges(tuple((int(p), int(i)) for p, i in given), *(np.asarray(each)[:n] for each in found))


@functools.partial(jax.jit, static_argnames=("forward", "places", "freeze_attention", "freeze_norms"))
def _edges(
    forward: Callable[..., Array],
    places: tuple[Place, Place],
    freeze_attention: bool,
    freeze_norms: bool,
    params: Any,
    tokens: Array,
    saes: tuple[Autoencoder, Autoencoder],
    targets: Int[Array, "n 2"],
) -> tuple[Array, Array, Array, Array]:
    (upstream, downstream), (sae, later) = places, saes
    sites = {upstream[1], downstream[1]}
    sites |= {"attn_probs"} if freeze_attention else set()
    sites |= {"resid_pre", "attn_in", "mlp_in"} if freeze_norms else set()
    if freeze_norms and not params.config.parallel_residual:
        sites.add("resid_mid")

    def codes_at_targets(change: Array) -> tuple[Array, Array]:
        read = None
        for layer, name, value in (running := iterate(forward, sites=sites)(params, tokens)):
            new = value
            if (layer, name) == upstream:
                running.save("upstream", value)
                new = (value + change).astype(value.dtype)
            if (layer, name) == downstream:
                codes = later.encode(value.astype(jnp.float32))[0]
                running.save("downstream", codes[targets[:, 0], targets[:, 1]])
                del codes
            if freeze_attention and name == "attn_probs":
                new = jax.lax.stop_gradient(value)
            if freeze_norms and name in ("attn_in", "mlp_in"):
                assert read is not None
                assert layer is not None
                new = _with_constant_size(params, name.removesuffix("_in") + "_norm", layer, read, value)
            if freeze_norms and name in ("resid_pre", "resid_mid"):
                read = new
            running.modified_value = new
            del value, new
        del read
        return running.saved["downstream"], running.saved["upstream"][0]

    zeros = jnp.zeros((1, tokens.shape[1], sae.d_out))
    codes, pull, value = jax.vjp(codes_at_targets, zeros, has_aux=True)
    read = value.astype(jnp.float32)
    encoded = sae.encode(read)
    bias = sae.decode(jnp.zeros_like(encoded))
    missed = read - sae.decode(encoded)
    _, to_latents = jax.vjp(sae.decode, encoded)

    def of_target(cotangent: Array) -> tuple[Array, Array, Array]:
        gradient = pull(cotangent)[0][0]
        return encoded * to_latents(gradient)[0], (missed * gradient).sum(axis=-1), (bias * gradient).sum(axis=-1)

    each = jnp.eye(len(targets), dtype=codes.dtype)
    return codes, *jax.lax.map(of_target, each, batch_size=min(_AT_ONCE, len(targets)))


def _with_constant_size(params: Any, norm: str, layer: int, read: Array, normed: Array) -> Array:
    """What a norm gave, with the derivative that it has where the size it divides by is a constant."""
    blocks = params.blocks
    module = getattr(blocks if params.is_stacked else blocks[layer], norm)
    wide = read.astype(jnp.float32)
    bias = 0.0
    if module.is_layer_norm:
        wide = wide - wide.mean(axis=-1, keepdims=True)
        bias = (module.bias[...][layer] if params.is_stacked else module.bias[...]).astype(jnp.float32)
    size = jnp.sqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + module.epsilon)
    # The factor is 1, and its derivative takes back what the division adds.
    factor = size / jax.lax.stop_gradient(size)
    return (bias + (normed.astype(jnp.float32) - bias) * factor).astype(normed.dtype)

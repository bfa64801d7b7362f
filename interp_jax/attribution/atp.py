"""Attribution patching (AtP): the effect of every node at once, to first order.

Patching node n puts `n_corrupted` where `n_clean` was; to first order that changes the metric L by

    (n_corrupted - n_clean) . dL/dn     with the gradient at the clean prompt

(Nanda 2023, "Attribution patching"). Two forward passes and one backward pass give it for all nodes. The product is
formed while the gradient goes by and summed to a number a node, so no gradient is kept.

It is wrong where the model is far from linear between the two values: saturated attention, and effects along several
paths that cancel. `atp_star` mends the worst of both.

`integrated_gradients` takes the mean gradient along a path in place of the clean one. The path is the usual one: the
input embedding goes straight from the clean prompt's to the corrupted one's, and all else follows. Each node's
difference is that of the two prompts. At a cut through the model (`resid_pre` of one layer, all positions) that is
layer 0, the effects add up to the metric's difference; deeper nodes do not move along straight lines, and there it is a
better-behaved gradient, not a decomposition.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.attribution.activation_patching import Forward, site_values
from interp_jax.attribution.measured_pass import measured_on_both, measured_pass
from interp_jax.attribution.metric import Metric, check_varies, metric_of
from interp_jax.attribution.nodes import Effects, Family, Nodes, resolve
from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.instrument import SiteValues, iterate
from interp_jax.instrument.pull_back import Visit, pull_back
from interp_jax.models.language_model import LanguageModel

__all__ = ["atp", "integrated_gradients", "layers_of", "place_of", "sites_and_layers", "stacked_kept"]


def atp(
    language_model: LanguageModel, pair: PromptPair, nodes: Nodes | Sequence[Nodes], *, metric: Metric | None = None
) -> Effects:
    """The effect of every node by attribution patching, an estimate of noising it.

    Args:
        language_model: the model.
        pair: the prompts. For an estimate of denoising give `pair.swapped`.
        nodes: which nodes.
        metric: what is measured; None is the pair's own (see `metric_of`).

    Returns:
        An estimate of metric(patched) - metric(clean), a node.

    Raises:
        ValueError: for nodes that do not exist, or a metric that is the same on both prompts.
    """
    families = resolve(language_model, nodes, pair.seq)
    tokens = jnp.asarray(np.stack([pair.clean, pair.corrupted]), jnp.int32)
    run = measured_pass(language_model, families, metric_of(metric, pair, language_model.vocab_size))
    clean, corrupted, effects = _atp(run.forward, families, run.params, run.metric, tokens)
    check_varies(clean, corrupted)
    return Effects(families, effects, pair.position_labels, clean=float(clean), corrupted=float(corrupted))


def integrated_gradients(
    language_model: LanguageModel,
    pair: PromptPair,
    nodes: Nodes | Sequence[Nodes],
    *,
    metric: Metric | None = None,
    n_steps: int = 16,
    embedding: str = "embed",
) -> Effects:
    """As `atp`, with the mean of the gradients at `n_steps` points between the two prompts' embeddings.

    Args:
        language_model: the model.
        pair: the prompts.
        nodes: which nodes; not of the embedding's own site, for which take `resid_pre` of layer 0.
        metric: what is measured; None is the pair's own.
        n_steps: how many points, in the middle of equal steps.
        embedding: the site where the path is laid; it must stand once in the model.

    Returns:
        An estimate of metric(patched) - metric(clean), a node.

    Raises:
        ValueError: as `atp`; also for fewer than one step, or an embedding that stands in several layers.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
    families = resolve(language_model, nodes, pair.seq)
    if any(family.site == embedding for family in families):
        raise ValueError(f"{embedding} is where the path is laid; name 'resid_pre' of layer 0 in its place.")
    (embedded,) = resolve(language_model, Nodes(embedding), pair.seq)
    if len(embedded.layers) > 1:
        raise ValueError(
            f"{embedding!r} stands in {len(embedded.layers)} layers; the path is laid at a site that stands once, as "
            "'embed' does."
        )
    tokens = jnp.asarray(np.stack([pair.clean, pair.corrupted]), jnp.int32)
    run = measured_pass(language_model, families, metric_of(metric, pair, language_model.vocab_size))
    clean, corrupted = measured_on_both(run, tokens)  # before n_steps passes
    effects = _integrated(run.forward, families, embedded, n_steps, run.params, run.metric, tokens)
    return Effects(families, effects, pair.position_labels, clean=clean, corrupted=corrupted)


def layers_of(families: Sequence[Family]) -> set[int | None]:
    """The layers of all families."""
    return {layer for family in families for layer in family.layers}


def sites_and_layers(families: Sequence[Family]) -> tuple[set[str], set[int | None]]:
    """What a pass over the nodes looks at: the names of the sites, and the layers."""
    return {family.site for family in families}, layers_of(families)


def place_of(family: Family, layer: Any) -> Any:
    """Where a layer stands in `family.layers`, for a layer that may be traced; 0 for others.

    Args:
        family: the nodes.
        layer: a layer, traced or not, or None.
    """
    if layer is None or isinstance(layer, int):
        return family.layers.index(layer) if layer in family.layers else 0
    numbers = [number for number in family.layers if number is not None]
    table = np.zeros(max(numbers) + 1, np.int32)
    table[numbers] = np.arange(len(numbers))
    return jnp.asarray(table)[layer]


def stacked_kept(families: Sequence[Family], kept: SiteValues) -> tuple[Any, ...]:
    """What visits kept, `[n_layers, *by_shape]` a family; zeros for a site that the metric does not depend on.

    Args:
        families: the nodes.
        kept: `[*by_shape]` for each site.
    """
    return tuple(
        jnp.stack([kept.get((layer, family.site), jnp.zeros(family.by_shape)) for layer in family.layers])
        for family in families
    )


def _products(families: Sequence[Family]) -> Visit:
    by_site = {family.site: (number, family) for number, family in enumerate(families)}

    def visit(others: Any, layer: Any, name: str, value: Any, gradient: Any) -> tuple[Any, None]:
        number, family = by_site[name]
        difference = others[number][place_of(family, layer)] - value[0]
        return family.summed(difference.astype(jnp.float32) * gradient[0]), None

    return visit


@functools.partial(jax.jit, static_argnums=(0, 1))
def _atp(forward: Forward, families: tuple[Family, ...], params: Any, metric: Any, tokens: Any) -> Any:
    logits, others = site_values(forward, families, params, tokens[1:])
    visiting = pull_back(
        forward, _products(families), *sites_and_layers(families), objective=lambda logits: metric(logits)[0]
    )
    clean_logits, back = visiting(params, tokens[:1])
    kept = back(tuple(value[:, 0] for value in others))
    return metric(clean_logits)[0], metric(logits)[0], stacked_kept(families, kept)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _integrated(
    forward: Forward,
    families: tuple[Family, ...],
    embedded: Family,
    n_steps: int,
    params: Any,
    metric: Any,
    tokens: Any,
) -> Any:
    by_site = {family.site: (number, family) for number, family in enumerate(families)}
    read = (*families, embedded)
    _, clean = site_values(forward, read, params, tokens[:1])
    _, corrupted = site_values(forward, read, params, tokens[1:])
    differences = tuple(there[:, 0] - here[:, 0] for here, there in zip(clean, corrupted, strict=True))

    def visit(differences: Any, layer: Any, name: str, value: Any, gradient: Any) -> tuple[Any, None]:
        number, family = by_site[name]
        difference = differences[number][place_of(family, layer)]
        return family.summed(difference.astype(jnp.float32) * gradient[0]), None

    def interpolated(params: Any, tokens: Any, embedding: Any) -> Any:
        for _, _, value in (running := iterate(forward, sites=embedded.site)(params, tokens)):
            running.modified_value = embedding
            del value
        return running.retval

    visiting = pull_back(interpolated, visit, *sites_and_layers(families), objective=lambda logits: metric(logits)[0])

    def step(total: Any, share: Any) -> tuple[Any, None]:
        embedding = (clean[-1][0] + share * differences[-1][0]).astype(clean[-1].dtype)
        _, back = visiting(params, tokens[:1], embedding)
        found = stacked_kept(families, back(differences[:-1]))
        return jax.tree.map(jnp.add, total, found), None

    zeros = tuple(jnp.zeros((len(family.layers), *family.by_shape)) for family in families)
    shares = (jnp.arange(n_steps) + 0.5) / n_steps
    total, _ = jax.lax.scan(step, zeros, shares)
    return tuple(each / n_steps for each in total)

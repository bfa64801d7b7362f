"""A small circuit of latents: the nodes whose effects are large, the edges between them, and whether they suffice.

Found as Marks et al. 2024 do ("Sparse Feature Circuits"):

- *nodes*: every latent, and every autoencoder's error, at every position whose effect by attribution patching (on the
  metric, from the clean prompt to the corrupted one) is at least `threshold` of the difference between the two prompts;
- *edges*: between chosen nodes, where at least `edge_threshold` of the downstream latent's code comes from the upstream
  node (`latent_edges`).

Judged by ablation on the clean prompt. An ablated latent has its mean code over a reference text, an ablated error the
mean error; without a reference both have what they are on the corrupted prompt. With `full` the model's metric and
`empty` that with everything ablated,

    faithfulness = (metric with all but the circuit ablated - empty) / (full - empty)      1: the circuit suffices
    completeness = (full - metric with the circuit ablated) / (full - empty)               1: nothing else does

Neither is bound to 0 and 1. Nodes are chosen by what differs between the prompts; what both prompts share is never in a
circuit, and to put means in its place tests the circuit without its surroundings. The corrupted prompt's values leave
them as they are.

The first position is never ablated, nor is it in a circuit: it is where attention rests,
and a mean in its place breaks the model out of all proportion (see `interp_jax.activations.splice`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from interp_jax.attribution.atp import atp
from interp_jax.attribution.latent_edges import latent_edges
from interp_jax.attribution.latent_nodes import Place, check_places, latent_nodes, with_latents
from interp_jax.attribution.metric import Metric, metric_of
from interp_jax.attribution.nodes import Effects, Node, NodeEffect, sites_of
from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import token_rows
from interp_jax.sae.protocol import Autoencoder

__all__ = ["Edge", "LatentCircuit", "latent_circuit"]


_TARGETS = 32  # downstream latents whose edges from everywhere are held at a time


class Edge(NamedTuple):
    """One edge of a circuit."""

    upstream: Node
    """A latent or an error."""
    downstream: Node
    """A latent."""
    share: float
    """How much of the downstream latent's code comes from the upstream node."""


@dataclasses.dataclass(frozen=True)
class LatentCircuit:
    """Nodes and edges, and how far they account for the metric."""

    nodes: tuple[NodeEffect, ...]
    """The chosen nodes, the largest effect first."""
    edges: tuple[Edge, ...]
    """The edges between them, the largest share first."""
    effects: Effects
    """Of every node, chosen or not."""
    full: float
    """The metric on the clean prompt."""
    empty: float
    """With every latent and error ablated."""
    alone: float
    """With all but the circuit ablated."""
    without: float
    """With the circuit ablated."""
    labels: tuple[str, ...]
    """The tokens' labels by position."""

    @property
    def faithfulness(self) -> float:
        """How much of the metric the circuit has by itself: 1 is all."""
        return (self.alone - self.empty) / (self.full - self.empty)

    @property
    def completeness(self) -> float:
        """How much of the metric is lost without the circuit: 1 is all."""
        return (self.full - self.without) / (self.full - self.empty)

    def table(self, k: int = 20) -> str:
        """Nodes, edges and scores as text.

        Args:
            k: How many nodes and how many edges at most.
        """
        lines = [
            f"{len(self.nodes)} nodes, {len(self.edges)} edges; metric {self.full:.4f}, all ablated {self.empty:.4f}",
            f"faithfulness {self.faithfulness:.3f}, completeness {self.completeness:.3f}",
            "    effect  node",
            *(f"{row.effect:>+10.4f}  {row.label}" for row in self.nodes[:k]),
            "     share  edge",
        ]
        for edge in self.edges[:k]:
            ends = (node.in_words(self.labels) for node in (edge.upstream, edge.downstream))
            lines.append(f"{edge.share:>+10.3f}  {' -> '.join(ends)}")
        return "\n".join(lines)


def latent_circuit(
    language_model: LanguageModel,
    pair: PromptPair,
    saes: Mapping[Place, Autoencoder],
    reference: Int[Array | np.ndarray, "n seq"] | None = None,
    *,
    metric: Metric | None = None,
    threshold: float = 0.02,
    edge_threshold: float = 0.05,
) -> LatentCircuit:
    """Finds a circuit of latents and judges it.

    Args:
        language_model: The model.
        pair: The prompts.
        saes: Autoencoders by (layer, site).
        reference: Tokens of ordinary text, for the means that stand in for ablated nodes; None for the values of the
            corrupted prompt.
        metric: What is measured; None is the pair's own (see `metric_of`).
        threshold: The least effect of a node, as a share of the metric's difference between the prompts.
        edge_threshold: The least share of a downstream code that an edge carries.

    Returns:
        The circuit.

    Raises:
        ValueError: As `with_latents` and `atp`; the reference is no rows of tokens; no node reaches the
            threshold, or ablating everything changes nothing.
    """
    check_places(language_model, saes)
    text = token_rows(pair.corrupted[None] if reference is None else reference, language_model.vocab_size, "reference")
    if text.shape[1] < 2:
        raise ValueError("The means of reference leave out each row's first position; give rows of 2 tokens or more.")
    order = [(row.layer, row.name) for row in sites_of(language_model, pair.seq)]
    saes = {place: saes[place] for place in sorted(saes, key=order.index)}
    effects = atp(with_latents(language_model, saes), pair, latent_nodes(saes), metric=metric)
    assert effects.clean is not None
    assert effects.corrupted is not None
    least = threshold * abs(effects.clean - effects.corrupted)
    n_large = int((np.abs(effects.flat) >= least).sum())
    nodes = tuple(row for row in effects.ranked(n_large) if row.node.position)
    if not nodes:
        largest = max((abs(row.effect) for row in effects.ranked() if row.node.position), default=0.0)
        raise ValueError(
            f"No node has an effect of {least:.4g}, {threshold:g} of the metric's difference; the largest after the "
            f"first position is {largest:.4g}. Lower threshold=."
        )
    masks = _masks([row.node for row in nodes], saes, pair.seq)
    nothing = jax.tree.map(np.zeros_like, masks)
    everything = jax.tree.map(np.ones_like, masks)
    others = jax.tree.map(np.logical_not, masks)
    forward, params, places = language_model.forward, language_model.params, tuple(saes)
    instead = _stand_ins(
        forward, places, reference is not None, params, list(saes.values()), jnp.asarray(text, jnp.int32)
    )
    clean, measure = jnp.asarray(pair.clean, jnp.int32)[None], metric_of(metric, pair, language_model.vocab_size)
    full, empty, alone, without = (
        float(_ablated(forward, places, params, list(saes.values()), instead, kept, measure, clean))
        for kept in (everything, nothing, masks, others)
    )
    if abs(full - empty) <= 1e-6 * max(abs(full), abs(empty)):
        raise ValueError(
            f"The metric is {full:.6g} with every latent and error ablated and without: these places carry none of it. "
            "Choose other places."
        )
    edges = _edges(language_model, pair, saes, [row.node for row in nodes], edge_threshold)
    return LatentCircuit(nodes, edges, effects, full, empty, alone, without, pair.labels)


class _Kept(NamedTuple):
    """What is not ablated at one place."""

    latents: Any
    """[seq, d_sae]"""
    errors: Any
    """[seq]"""


def _masks(nodes: list[Node], saes: Mapping[Place, Autoencoder], seq: int) -> list[_Kept]:
    kept = {
        (layer, name): _Kept(np.zeros((seq, sae.d_sae), bool), np.zeros(seq, bool))
        for (layer, name), sae in saes.items()
    }
    for node in nodes:
        if node.site.endswith("_latents"):
            kept[_place(node)].latents[node.position, node.unit] = True
        else:
            kept[_place(node)].errors[node.position] = True
    return list(kept.values())


def _place(node: Node) -> Place:
    return node.layer, node.site.removesuffix("_latents").removesuffix("_error")


@functools.partial(jax.jit, static_argnames=("forward", "places", "is_mean"))
def _stand_ins(
    forward: Callable[..., Array],
    places: tuple[Place, ...],
    is_mean: bool,
    params: Any,
    saes: list[Autoencoder],
    tokens: Array,
) -> list[tuple[Array, Array]]:
    """Codes and error at each place: their means over all positions but the first, or one row's as they are."""
    of_place = dict(zip(places, saes, strict=True))
    start = iterate(forward, sites={name for _, name in places}, layers={layer for layer, _ in places})
    for layer, name, value in (running := start(params, tokens)):
        if (sae := of_place.get((layer, name))) is not None:
            read = value.astype(jnp.float32)
            codes = sae.encode(read)
            both = codes, read - sae.decode(codes)
            running.save((layer, name), tuple(each[:, 1:].mean(axis=(0, 1)) if is_mean else each[0] for each in both))
            del read, codes, both
        del value
    return [running.saved[place] for place in places]


@functools.partial(jax.jit, static_argnames=("forward", "places"))
def _ablated(
    forward: Callable[..., Array],
    places: tuple[Place, ...],
    params: Any,
    saes: list[Autoencoder],
    instead: list[tuple[Array, Array]],
    kept: list[_Kept],
    metric: Any,
    tokens: Array,
) -> Array:
    """The metric of one row with all ablated that is not kept."""
    of_place = dict(zip(places, zip(saes, instead, kept, strict=True), strict=True))
    start = iterate(forward, sites={name for _, name in places}, layers={layer for layer, _ in places})
    for layer, name, value in (running := start(params, tokens)):
        if (found := of_place.get((layer, name))) is not None:
            sae, (other_codes, other_error), (latents, errors) = found
            read = value.astype(jnp.float32)
            codes = sae.encode(read)
            error = jnp.where(errors[:, None], read - sae.decode(codes), other_error)
            new = sae.decode(jnp.where(latents, codes, other_codes)) + error
            is_first = jnp.arange(read.shape[1])[:, None] == 0
            running.modified_value = jnp.where(is_first, value, new.astype(value.dtype))
            del read, codes, error, new
        del value, found
    return metric(running.retval)[0]


def _edges(
    language_model: LanguageModel, pair: PromptPair, saes: Mapping[Place, Autoencoder], nodes: list[Node], least: float
) -> tuple[Edge, ...]:
    edges: list[Edge] = []
    places = list(saes)
    for number, downstream in enumerate(places):
        latents = [node for node in nodes if _place(node) == downstream and node.unit is not None]
        for upstream in places[:number]:
            sources = [node for node in nodes if _place(node) == upstream]
            for start in range(0, len(latents) if sources else 0, _TARGETS):
                targets = latents[start : start + _TARGETS]
                found = latent_edges(
                    language_model,
                    pair.clean,
                    upstream,
                    saes[upstream],
                    downstream,
                    saes[downstream],
                    [(node.position or 0, node.unit or 0) for node in targets],
                )
                everything = np.concatenate([found.latents, found.error[..., None]], axis=-1)
                columns = [-1 if source.unit is None else source.unit for source in sources]
                of_sources = everything[:, np.array([source.position for source in sources]), np.array(columns)]
                shares = of_sources / np.where(found.codes == 0, np.inf, found.codes)[:, None]
                large = np.argwhere(np.abs(shares) >= least)
                edges += [Edge(sources[j], targets[i], float(shares[i, j])) for i, j in large]
    return tuple(sorted(edges, key=lambda edge: -abs(edge.share)))

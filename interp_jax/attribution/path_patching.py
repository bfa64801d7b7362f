"""Path patching: what senders do to the metric through receivers, and along no other way.

The *direct* path from a sender to a receiver runs through the residual stream alone (Wang et al. 2022, arXiv
2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969). Two passes over the base prompt find its effect:

1. The senders get the other prompt's value, and what every attention and MLP adds to the stream is frozen at its base
   value. So the stream carries the senders' change and nothing that later parts made of it. The receivers' values are
   kept, as they are before anything is frozen there.
2. The receivers get these values. All else runs freely, and the metric is taken.

A sender inside a block (a head, a neuron) acts through that block's output. There the block's *input* is frozen instead
of its output, so that the output differs from the base by the sender alone.

As in `activation_patching`: rows of a batch are sets of senders, one program serves all pairs of a length, and the
batch is held to a memory budget.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interp_jax.attribution.activation_patching import (
    DEFAULT_BUDGET,
    Direction,
    Forward,
    by_family,
    check_budget,
    check_direction,
    families_of_sets,
    patch_families,
    rows_that_fit,
    site_values,
)
from interp_jax.attribution.measured_pass import MeasuredPass, measured_on_both
from interp_jax.attribution.metric import Metric, metric_of
from interp_jax.attribution.nodes import Family, Node, Nodes, resolve
from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel

__all__ = ["path_patching"]

_BLOCKS = {
    "attn_out": ("attn_in", {"attn_in", "q", "k", "v", "attn_logits", "attn_probs", "attn_heads"}),
    "mlp_out": ("mlp_in", {"mlp_in", "mlp_pre", "mlp_act"}),
}
"""For each site where a block adds to the stream: the block's input, and the sites inside."""
_STREAM = {"embed", "resid_pre", "resid_mid", "resid_post", *_BLOCKS}


def path_patching(
    language_model: LanguageModel,
    pair: PromptPair,
    senders: Sequence[Collection[Node]],
    receivers: Collection[Node],
    *,
    metric: Metric | None = None,
    direction: Direction = "noising",
    memory_budget: int = DEFAULT_BUDGET,
) -> Float[np.ndarray, "n_sets"]:
    """The effect of sets of senders through the receivers, by direct paths.

    Args:
        language_model: the model.
        pair: the prompts.
        senders: sets of nodes; each is patched at once.
        receivers: the nodes through which they act.
        metric: what is measured; None is the pair's own (see `metric_of`).
        direction: whether the base is the clean prompt (`noising`) or the corrupted one.
        memory_budget: bytes that a batch may take besides the model's parameters.

    Returns:
        metric(patched) - metric(base), a set of senders.

    Raises:
        ValueError: for nodes or a direction that do not exist, senders of a site whose way to the stream is not known,
            a sender and a receiver inside one block, a metric that is the same on both prompts, or too small a budget.
    """
    check_direction(direction)
    sending_nodes, sets = families_of_sets(language_model, senders, pair.seq)
    receiving_nodes, received = families_of_sets(language_model, [receivers], pair.seq)
    sending, receiving = (resolve(language_model, nodes, pair.seq) for nodes in (sending_nodes, receiving_nodes))
    for families in (sending, receiving):  # each by itself, as they need not be held at once
        check_budget(families, memory_budget)
    _check_blocks(senders, receivers)
    frozen, flags = _frozen(language_model, senders, pair.seq)
    tokens = jnp.asarray(np.stack([pair.clean, pair.corrupted]), jnp.int32)
    measured = metric_of(metric, pair, language_model.vocab_size)
    run = MeasuredPass(language_model.forward, language_model.params, measured, None)
    clean, corrupted = measured_on_both(run, tokens)
    if direction == "denoising":
        tokens = tokens[::-1]
    base = clean if direction == "noising" else corrupted

    def arguments(begin: int, rows: int) -> tuple[Any, ...]:
        def part(masks: np.ndarray) -> np.ndarray:
            chosen = masks[begin : begin + rows]
            return np.concatenate([chosen, np.zeros((rows - len(chosen), *masks.shape[1:]), bool)])

        model = language_model
        return (
            model.forward, sending, receiving, frozen, model.params, measured, tokens,
            by_family(sending, part(sets)), by_family(receiving, received), tuple(map(part, flags)),
        )  # fmt: skip

    def needed(rows: int) -> int:
        given = arguments(0, rows)
        found: Any = _through.lower(*given).compile().memory_analysis()
        return int(
            found.temp_size_in_bytes + found.output_size_in_bytes + sum(x.nbytes for x in jax.tree.leaves(given[7:]))
        )

    rows = rows_that_fit(len(senders), needed, memory_budget)
    batches = [np.asarray(_through(*arguments(begin, rows))) for begin in range(0, len(senders), rows)]
    return np.concatenate(batches)[: len(senders)] - np.float32(base)


def _block_of(node: Node) -> str | None:
    """The site where the block that a node stands in adds to the stream; None for a node on the stream."""
    return next((added for added, (_, inside) in _BLOCKS.items() if node.site in inside), None)


def _check_blocks(senders: Sequence[Collection[Node]], receivers: Collection[Node]) -> None:
    for node in (node for each in senders for node in each):
        if _block_of(node) is None and node.site not in _STREAM:
            known = sorted(_STREAM.union(*(inside for _, inside in _BLOCKS.values())))
            raise ValueError(f"How {node.site} comes to the stream is not known; senders are of {', '.join(known)}.")
    inside = {(node.layer, block) for node in receivers if (block := _block_of(node)) is not None}
    for node in (node for each in senders for node in each):
        if (node.layer, _block_of(node)) in inside:
            raise ValueError(
                f"The sender {node.in_words()} and a receiver stand inside one block, between whose parts there is no "
                "path through the stream. Leave one of them out."
            )


def _frozen(
    language_model: LanguageModel, senders: Sequence[Collection[Node]], seq: int
) -> tuple[tuple[Family, ...], list[np.ndarray]]:
    """What is frozen, and for each family in which rows and layers: `[rows, n_layers]`."""
    added = resolve(language_model, [Nodes(site, by=()) for site in _BLOCKS], seq)
    holding = [{(node.layer, _block_of(node)) for node in each} for each in senders]
    families, flags = list(added), []
    for family in added:
        is_free = np.array([[(layer, family.site) in of_set for layer in family.layers] for of_set in holding])
        flags.append(~is_free)
    for family, is_frozen in zip(added, list(flags), strict=True):
        if not is_frozen.all():
            layers = tuple(layer for layer in family.layers if layer is not None)
            families += resolve(language_model, Nodes(_BLOCKS[family.site][0], by=(), layers=layers), seq)
            flags.append(~is_frozen)
    return tuple(families), flags


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _through(
    forward: Forward,
    sending: tuple[Family, ...],
    receiving: tuple[Family, ...],
    frozen: tuple[Family, ...],
    params: Any,
    metric: Any,
    tokens: Any,
    sets: tuple[Any, ...],
    received: tuple[Any, ...],
    flags: tuple[Any, ...],
) -> Float[Array, "rows"]:
    """The metric with the receivers as the senders' direct paths make them."""
    rows = sets[0].shape[0]
    base = jnp.broadcast_to(tokens[0], (rows, tokens.shape[1]))
    _, at_base = site_values(forward, frozen, params, tokens[:1])
    _, others = site_values(forward, sending, params, tokens[1:])
    freeze = patch_families(frozen, flags, [value[:, 0] for value in at_base])
    send = patch_families(sending, sets, [value[:, 0] for value in others])
    wanted = {(layer, family.site) for family in receiving for layer in family.layers}

    watched = (*sending, *receiving, *frozen)
    start = iterate(
        forward, sites={each.site for each in watched}, layers={layer for each in watched for layer in each.layers}
    )
    for layer, name, value in (running := start(params, base)):
        if (layer, name) in wanted:
            running.save((layer, name), value)
        is_changed = False
        for change in (freeze, send):
            if (new := change(layer, name, value)) is not None:
                value, is_changed = new, True
            del new
        if is_changed:
            running.modified_value = value
        del value

    by_site = {family.site: number for number, family in enumerate(receiving)}
    start = iterate(
        forward,
        sites={family.site for family in receiving},
        layers={layer for family in receiving for layer in family.layers},
    )
    saved = running.saved
    for layer, name, value in (running := start(params, base)):
        if (layer, name) in wanted:
            family = receiving[by_site[name]]
            mask = received[by_site[name]][:, family.layers.index(layer)].reshape(-1, *family.spread_shape)
            running.modified_value = jnp.where(mask, saved[layer, name], value)
        del value
    return metric(running.retval)

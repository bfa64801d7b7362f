"""Attention knocked out between positions, and attention patterns.

A knockout takes edges out of the attention: the queries at some positions no longer see the keys at others, in some
layers and heads (Geva et al. 2023, "Dissecting Recall of Factual Associations"). `knocked_out` gives a `LanguageModel`
without those edges, which goes wherever a model does: its loss, its logit lens, its attributions.

The default acts on `attn_probs`: the entries become zero and what is left of a query's attention is scaled to sum to 1
again, which is what masking the edges before the softmax gives. A query that has nothing left attends to nothing, and
its head gives zeros; a mask before the softmax would have it attend to what was to be taken from it. With
`renormalise=False` what is left stays as it was, so that nothing else changes but the edges' own contribution.

Which edges are cut is data: another knockout of as many `Knockout`s does not compile again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from interp_jax.attribution.nodes import sites_of
from interp_jax.instrument import fetch, iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import token_rows

__all__ = ["Knockout", "attention_knockout", "attention_patterns", "knocked_out"]

_NO_PROBS = "{} has no site 'attn_probs' (a model with a knockout shows none), so {}."

Places = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Knockout:
    """Edges to cut: every query of the one set from every key of the other, in these layers and heads."""

    queries: Places | None
    """Positions that no longer see; negative ones count from the end, None is all."""
    keys: Places | None
    """Positions that are no longer seen."""
    layers: Places | None = None
    """In which layers."""
    heads: Places | None = None
    """In which heads of them."""


class _Edges(NamedTuple):
    """The product of four sets, which tells in little space which edges are cut."""

    layers: Bool[Array, "n_layers"]
    heads: Bool[Array, "n_heads"]
    queries: Bool[Array, "seq"]
    keys: Bool[Array, "seq"]

    def at(self, layer: int) -> Bool[Array, "n_heads seq seq"]:
        """One layer's."""
        return self.layers[layer] & self.heads[:, None, None] & self.queries[:, None] & self.keys


def attention_knockout(
    language_model: LanguageModel,
    tokens: Int[Array, "batch seq"],
    knockouts: Knockout | Sequence[Knockout],
    *,
    renormalise: bool = True,
) -> Float[Array, "batch seq vocab"]:
    """The logits of a model some of whose attention is knocked out.

    Args:
        language_model: A model with the site `attn_probs`.
        tokens: The prompts.
        knockouts: The edges to cut.
        renormalise: Whether what is left of a query's attention sums to 1 again.

    Returns:
        The logits.

    Raises:
        ValueError: A token, position, layer or head does not exist, or the model has no attention probabilities.
    """
    tokens = token_rows(tokens, language_model.vocab_size)
    cut = knocked_out(language_model, tokens.shape[1], knockouts, renormalise=renormalise)
    return _run(cut.forward, cut.params, tokens)


def knocked_out(
    language_model: LanguageModel, seq: int, knockouts: Knockout | Sequence[Knockout], *, renormalise: bool = True
) -> LanguageModel:
    """A model without some of its attention, for prompts of one length.

    Args:
        language_model: A model with the site `attn_probs`.
        seq: Tokens of a prompt.
        knockouts: The edges to cut.
        renormalise: Whether what is left of a query's attention sums to 1 again.

    Returns:
        The model, with every site of the other but `attn_probs`, which the knockout takes for itself.

    Raises:
        ValueError: A position, layer or head does not exist, or the model has no attention probabilities.
    """
    shapes = {row.layer: row.shape for row in sites_of(language_model, seq) if row.name == "attn_probs"}
    if not shapes:
        raise ValueError(_NO_PROBS.format(language_model.name, "its attention cannot be knocked out"))
    n_heads = next(iter(shapes.values()))[1]
    given = [knockouts] if isinstance(knockouts, Knockout) else list(knockouts)
    if not given:
        raise ValueError("There is nothing to knock out; give at least one Knockout(queries, keys).")
    edges = [
        _Edges(
            layers=_as_set(each.layers, language_model.n_layers, "layer"),
            heads=_as_set(each.heads, n_heads, "head"),
            queries=_as_set(each.queries, seq, "query position"),
            keys=_as_set(each.keys, seq, "key position"),
        )
        for each in given
    ]
    return dataclasses.replace(
        language_model,
        name=f"{language_model.name} with attention knocked out",
        forward=_KnockedOut(language_model.forward, renormalise),
        params=(language_model.params, edges),
        unembed=_Unembed(language_model.unembed),
    )


def attention_patterns(
    language_model: LanguageModel, tokens: Int[Array, "*batch seq"]
) -> Float[Array, "layers *batch heads query key"]:
    """How much each query attends to each key, in every layer and head.

    Args:
        language_model: A model with the site `attn_probs`, of one shape in all layers.
        tokens: One prompt or several.

    Returns:
        The attention probabilities; a query's sum to 1.

    Raises:
        ValueError: The model has no such site.
    """
    if not any(row.name == "attn_probs" for row in sites_of(language_model, tokens.shape[-1])):
        raise ValueError(_NO_PROBS.format(language_model.name, "there are no attention patterns"))
    rows = tokens.reshape(-1, tokens.shape[-1])
    patterns = _patterns(language_model.forward, language_model.params, rows)
    return patterns.reshape(len(patterns), *tokens.shape[:-1], *patterns.shape[2:])


@dataclasses.dataclass(frozen=True)
class _KnockedOut:
    """A forward pass with edges cut. Equal for equal models, so that programs of it are compiled once."""

    forward: Callable[..., Array]
    renormalise: bool

    def beneath(self, params: tuple[Any, list[_Edges]]) -> tuple[Callable[..., Array], Any]:
        """See `WrappedForward`."""
        return self.forward, params[0]

    def __call__(self, params: tuple[Any, list[_Edges]], tokens: Array) -> Array:
        params, edges = params
        seq = len(edges[0].queries)
        if tokens.shape[1] != seq:
            raise ValueError(
                f"Attention is knocked out for prompts of {seq} tokens, and these have {tokens.shape[1]}; make another "
                "knocked_out(model, seq, ...) for them."
            )
        for layer, _, value in (running := iterate(self.forward, sites="attn_probs")(params, tokens)):
            assert layer is not None
            cut = functools.reduce(jnp.logical_or, [each.at(layer) for each in edges])
            kept = jnp.where(cut, 0, value.astype(jnp.float32))
            if self.renormalise:
                left = kept.sum(axis=-1, keepdims=True)
                kept = kept / jnp.where(left > 0, left, 1.0)
            running.modified_value = jnp.where(cut.any(axis=-1, keepdims=True), kept.astype(value.dtype), value)
            del value, cut, kept
        return running.retval


@dataclasses.dataclass(frozen=True)
class _Unembed:
    unembed: Callable[..., Array]

    def __call__(self, params: tuple[Any, list[_Edges]], directions: Array) -> Array:
        return self.unembed(params[0], directions)


def _as_set(places: Places | None, size: int, what: str) -> Bool[Array, "size"]:
    if places is None:
        return jnp.ones(size, bool)
    given = [places] if isinstance(places, int | np.integer) else list(places)
    wrong = [number for number in given if not -size <= number < size]
    if wrong or not given:
        found = f"{what} {wrong[0]} does not exist" if wrong else f"a knockout of no {what}"
        raise ValueError(f"{found}: they are 0 to {size - 1}, or from {-size} on to count from the end; None is all.")
    mask = np.zeros(size, bool)
    mask[given] = True
    return jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames="forward")
def _run(forward: Callable[..., Array], params: Any, tokens: Array) -> Array:
    return forward(params, tokens)


@functools.partial(jax.jit, static_argnames="forward")
def _patterns(forward: Callable[..., Array], params: Any, tokens: Array) -> Array:
    return jnp.stack(list(fetch(forward, "attn_probs")(params, tokens)[1].values()))

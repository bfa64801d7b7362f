"""AtP*: attribution patching with its two worst errors mended (Kramár, Lieberum, Shah, Nanda 2024, arXiv 2403.00745).

**The QK fix.** A query or key acts through a softmax, which may be saturated: its gradient is then next to nothing
though replacing it changes everything. So the change of the attention probabilities is computed exactly, and only what
follows is taken to first order: effect = (probs' - probs) . dL/dprobs.

- Queries. One pass with every layer's `q` corrupted and `k` clean gives the probabilities under every query node at
  once, for rows of queries and heads do not interact.
- Keys. One pass with `k` corrupted and `q` clean gives, in column t of `attn_logits`, what key t alone would give to
  each query. One changed logit among many has a closed form: with `rest` the log of the summed exponentials of the
  others, the probability of t goes from sigmoid(old - rest) to sigmoid(new - rest), and the others share what is left
  as they did before. So there is no softmax for each key. It is stable where t had all the attention, or none at all:
  `rest` of the largest logit is summed without it, never as a difference from 1.

What a query sees is found by a pass with all logits zero. After each look the clean probabilities are put back, so all
layers are looked at in one pass, each with clean inputs. The sum is over all later queries and over the query heads of
a key's group.

**GradDrop.** A direct and an indirect effect that cancel hide a node. For each layer in turn the gradient that comes
back through what that layer adds to the stream (`attn_out` and `mlp_out`) is dropped, and the node's score is the mean
of the absolute effect over the dropped layers, its own excepted. So scores are not signed. The forward pass runs once,
the backward passes a few layers at a time, in next to no more memory than one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from interp_jax.attribution.activation_patching import Forward, site_values
from interp_jax.attribution.atp import layers_of, place_of
from interp_jax.attribution.measured_pass import measured_on_both, measured_pass
from interp_jax.attribution.metric import Metric, check_varies, metric_of
from interp_jax.attribution.nodes import Effects, Family, Nodes, resolve
from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.instrument import SiteValues, iterate
from interp_jax.instrument.pull_back import Visit, pull_back
from interp_jax.models.language_model import LanguageModel

__all__ = ["atp_star", "changed_by_a_key", "changed_by_keys"]

_ADDED = ("attn_out", "mlp_out")
"""Where a layer writes to the stream."""
_TOGETHER = 3
"""Layers that are dropped at once, each in a row of its own of one backward pass, which reads the weights once."""
_SOFTMAX_TOLERANCE = 2e-2
"""How far the model's probabilities may be from the softmax of its logits: rounding to bfloat16, not another rule."""


def atp_star(
    language_model: LanguageModel,
    pair: PromptPair,
    nodes: Nodes | Sequence[Nodes],
    *,
    metric: Metric | None = None,
    qk_fix: bool = True,
    grad_drop: bool = True,
) -> Effects:
    """The effect of every node by AtP*.

    Args:
        language_model: the model.
        pair: the prompts. For an estimate of denoising give `pair.swapped`.
        nodes: which nodes. Those of `q` and `k` take the QK fix.
        metric: what is measured; None is the pair's own (see `metric_of`).
        qk_fix: whether q and k nodes take the QK fix.
        grad_drop: whether the scores are GradDrop's.

    Returns:
        With `grad_drop` scores that are not negative; without, estimates of metric(patched) - metric(clean).

    Raises:
        ValueError: for nodes that do not exist, a metric that is the same on both prompts, a model without the sites
            that the two need or of one layer, q or k nodes smaller than a head, or attention that is no softmax of its
            logits.
    """
    families = resolve(language_model, nodes, pair.seq)
    fixed = tuple(family for family in families if family.site in ("q", "k")) if qk_fix else ()
    scores: tuple[Family, ...] = ()
    if fixed:
        if by_unit := [family.site for family in fixed if "unit" in family.by]:
            raise ValueError(
                f"The QK fix is for whole heads: name {', '.join(by_unit)} by position and head, or give qk_fix=False."
            )
        layers = tuple(sorted(layer for layer in layers_of(fixed) if layer is not None))
        wanted = [Nodes(site, by=(), layers=layers) for site in ("q", "k", "attn_logits", "attn_probs")]
        scores = resolve(language_model, wanted, pair.seq)
    dropped: tuple[Family, ...] = ()
    if grad_drop:
        dropped = resolve(language_model, [Nodes(site, by=()) for site in _ADDED], pair.seq)
        if len(layers_of(dropped)) < 2:
            raise ValueError(
                f"GradDrop drops one layer after another but a node's own, and {language_model.name} has one alone. "
                "Give grad_drop=False."
            )
    tokens = jnp.asarray(np.stack([pair.clean, pair.corrupted]), jnp.int32)
    run = measured_pass(language_model, families, metric_of(metric, pair, language_model.vocab_size))
    if dropped:  # a backward pass a layer: a metric that tells nothing is refused before them
        measured_on_both(run, tokens)
    clean, corrupted, effects, off = _atp_star(run.forward, families, scores, dropped, run.params, run.metric, tokens)
    check_varies(clean, corrupted)
    if scores and not float(off) <= _SOFTMAX_TOLERANCE:
        raise ValueError(
            f"attn_probs of {language_model.name} differs by up to {float(off):.2g} from the softmax of attn_logits "
            "over what a query sees, which the QK fix for keys relies on. Give qk_fix=False."
        )
    return Effects(families, effects, pair.position_labels, clean=float(clean), corrupted=float(corrupted))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _atp_star(
    forward: Forward,
    families: tuple[Family, ...],
    scores: tuple[Family, ...],
    dropped: tuple[Family, ...],
    params: Any,
    metric: Any,
    tokens: Any,
) -> Any:
    clean, corrupted = tokens[:1], tokens[1:]
    read = (*families, *scores[:2])
    logits, others = site_values(forward, read, params, corrupted)
    others = [value[:, 0] for value in others]
    given: dict[str, Any] = {"others": others[: len(families)]}
    off = jnp.zeros(())
    if scores:
        given["changes"], off = _changes(forward, scores, params, clean, others[len(families) :])
    sites = {family.site for family in (*families, *scores[3:], *dropped)}
    visiting = pull_back(
        forward,
        _effects(families, scores, dropped),
        sites,
        layers_of((*families, *scores, *dropped)),
        objective=lambda logits: metric(logits)[0],
    )
    clean_logits, back = visiting(params, clean)
    values = metric(clean_logits)[0], metric(logits)[0]
    if not dropped:
        return *values, _gathered(families, back(given)), off

    layers = sorted(layer for layer in layers_of(dropped) if layer is not None)
    n_layers = max(layers) + 1

    def without(layer: Any) -> tuple[Any, ...]:
        gates = jnp.ones(n_layers).at[layer].set(0.0, mode="drop")
        found = _gathered(families, back(given | {"gates": gates}))
        return tuple(
            (layer < n_layers) * _counts(family, layer) * jnp.abs(each)
            for family, each in zip(families, found, strict=True)
        )

    def drop(total: Any, together: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda each, new: each + new.sum(0), total, jax.vmap(without)(together)), None

    zeros = tuple(jnp.zeros((len(family.layers), *family.by_shape)) for family in families)
    together = np.pad(layers, (0, -len(layers) % _TOGETHER), constant_values=n_layers)  # no layer, which does not count
    total, _ = jax.lax.scan(drop, zeros, jnp.asarray(together.reshape(-1, _TOGETHER)))
    means = []
    for family, each in zip(families, total, strict=True):
        n_counted = sum(_counts(family, layer) for layer in layers)
        means.append(each / jnp.maximum(n_counted, 1.0))
    return *values, tuple(means), off


def _counts(family: Family, layer: Any) -> Float[Array, "n_layers *ones"]:
    """1 for the family's layers that count when `layer` is dropped, 0 for that layer itself."""
    own = jnp.asarray([-1 if each is None else each for each in family.layers])
    return (own != layer).astype(jnp.float32).reshape(-1, *[1] * len(family.by_shape))


def _gathered(families: Sequence[Family], kept: SiteValues) -> tuple[Any, ...]:
    """What the visits kept, `[n_layers, *by_shape]` a family; it lies by the number of the family."""
    found: dict[tuple[int, int | None], Any] = {}
    for (layer, _), by_family in kept.items():
        found |= {(number, layer): value for number, value in by_family.items()}
    return tuple(
        jnp.stack([found.get((number, layer), jnp.zeros(family.by_shape)) for layer in family.layers])
        for number, family in enumerate(families)
    )


def _effects(families: Sequence[Family], scores: Sequence[Family], dropped: Sequence[Family]) -> Visit:
    """What is done at a site while the gradient goes by."""
    by_site = {family.site: (number, family) for number, family in enumerate(families)}
    fixed = {site: by_site[site] for site in ("q", "k") if scores and site in by_site}
    adding = {family.site for family in dropped}

    def visit(given: Any, layer: Any, name: str, value: Any, gradient: Any) -> tuple[Any, Any]:
        kept: dict[int, Any] = {}
        if name in by_site and name not in fixed:
            number, family = by_site[name]
            difference = given["others"][number][place_of(family, layer)] - value[0]
            kept[number] = family.summed(difference.astype(jnp.float32) * gradient[0])
        if name == "attn_probs" and fixed:
            changes = {key: each[place_of(scores[3], layer)] for key, each in given["changes"].items()}
            slope = gradient[0].astype(jnp.float32)
            for number, family in fixed.values():
                kept[number] = _through_softmax(family, changes, value[0].astype(jnp.float32), slope)
        gated = None
        if name in adding and "gates" in given:
            gated = gradient * given["gates"][layer].astype(gradient.dtype)
        return kept or None, gated

    return visit


def _through_softmax(
    family: Family,
    changes: dict[str, Any],
    probs: Float[Array, "heads query key"],
    slope: Float[Array, "heads query key"],
) -> Float[Array, "*by_shape"]:
    """The effects of one layer's query or key nodes."""
    if family.site == "q":
        of_head = (changes["q"] * slope).sum(-1).T  # [query, heads]
    elif "position" in family.by:
        of_head = changed_by_a_key(changes["k"], probs, changes["rest"], changes["top"], slope).T  # [key, heads]
    else:
        of_head = (changes["all k"] * slope).sum((-2, -1))[None]
    n_groups = family.shape[1]
    grouped = of_head.reshape(len(of_head), n_groups, -1).sum(-1)
    held = tuple(place for place, axis in enumerate(("position", "head")) if axis not in family.by)
    return grouped.sum(held)


def _changes(
    forward: Forward, scores: Sequence[Family], params: Any, tokens: Any, corrupted: Sequence[Any]
) -> tuple[dict[str, Any], Any]:
    """How the probabilities change under each query and each key: `[n_layers, heads, query, key]` each."""
    _, found = site_values(forward, scores, params, tokens)
    q, k, logits, probs = (value[:, 0] for value in found)
    layers = scores[0].layers

    def look(put_in: dict[str, Any], at: Sequence[str]) -> list[Any]:
        sites = {*put_in, *at, "attn_probs"}
        for layer, name, value in (running := iterate(forward, sites=sites, layers=layers)(params, tokens)):
            if layer not in layers:
                continue
            new = put_in[name][layers.index(layer)][None].astype(value.dtype) if name in put_in else None
            if name in at:
                running.save((name, layer), value)
            if name == "attn_probs":
                new = probs[layers.index(layer)][None].astype(value.dtype)
            if new is not None:
                running.modified_value = new
            del value
        return [jnp.concatenate([running.saved[name, layer] for layer in layers]) for name in at]

    (sees,) = look({"attn_logits": jnp.zeros_like(logits)}, ["attn_probs"])
    (of_queries,) = look({"q": corrupted[0], "k": k}, ["attn_probs"])
    of_keys, of_all_keys = look({"q": q, "k": corrupted[1]}, ["attn_logits", "attn_probs"])
    wide = probs.astype(jnp.float32)
    by_key, rest, top, softmax = changed_by_keys(logits, of_keys, sees > 0)
    changes = {
        "q": of_queries.astype(jnp.float32) - wide,
        "all k": of_all_keys.astype(jnp.float32) - wide,
        "k": by_key,
        "rest": rest,
        "top": top,
    }
    return changes, jnp.max(jnp.abs(softmax - wide))


def changed_by_keys(
    logits: Float[Array, "*batch query key"],
    changed: Float[Array, "*batch query key"],
    sees: Bool[Array, "*batch query key"],
) -> tuple[
    Float[Array, "*batch query key"],
    Float[Array, "*batch query key"],
    Bool[Array, "*batch query key"],
    Float[Array, "*batch query key"],
]:
    """The change of each key's probability when its logit alone changes.

    Args:
        logits: the clean logits.
        changed: the logit that each key alone would have.
        sees: which keys a query sees.

    Returns:
        The change of a key's own probability; the softmax over the keys other than the largest; which key is the
        largest; the softmax.
    """
    shown = jnp.where(sees, logits.astype(jnp.float32), -jnp.inf)
    top = jax.nn.one_hot(jnp.argmax(shown, axis=-1), shown.shape[-1], dtype=bool)
    without = jnp.where(top, -jnp.inf, shown)
    total = jax.nn.logsumexp(shown, axis=-1, keepdims=True)
    rest_total = jax.nn.logsumexp(without, axis=-1, keepdims=True)
    probs = jnp.exp(shown - total)
    rest = jnp.where(jnp.isfinite(rest_total), jnp.exp(without - rest_total), 0.0)
    # Only the largest can be so near 1 that a difference from 1 would lose it.
    others = jnp.where(top, rest_total, total + jnp.log1p(-jnp.where(top, 0.0, probs)))
    new, old = jax.nn.sigmoid(changed.astype(jnp.float32) - others), jax.nn.sigmoid(shown - others)
    return jnp.where(sees, new - old, 0.0), rest, top, probs


def changed_by_a_key(
    change: Float[Array, "heads query key"],
    probs: Float[Array, "heads query key"],
    rest: Float[Array, "heads query key"],
    top: Bool[Array, "heads query key"],
    slope: Float[Array, "heads query key"],
) -> Float[Array, "heads key"]:
    """(probs' - probs) . slope for each key, summed over the queries.

    Args:
        change: of `changed_by_keys`.
        probs: the clean probabilities.
        rest: of `changed_by_keys`.
        top: of `changed_by_keys`.
        slope: dL/dprobs.

    Returns:
        The effect of each key.
    """
    products = probs * slope
    of_rest = (rest * slope).sum(-1, keepdims=True)
    remaining = 1.0 - jnp.where(top, 0.0, probs)
    of_others = jnp.where(top, of_rest, (products.sum(-1, keepdims=True) - products) / remaining)
    # What the key gains the others lose in proportion, so their mean slope is what it replaces.
    return (change * (slope - of_others)).sum(-2)

"""Generation over a cache of keys and values: a pass over the prompts, then one-token passes, in one compiled program.

Prompts of different lengths stand flush right, padded on the left; no token sees padding, so each row is what it would
be alone. An intervention is called while the program is traced: once a site in the first pass, where values are
`[batch, prompt, ...]`, and once a site in a step, where they are `[batch, 1, ...]`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from interp_jax.instrument import SiteError, SiteValues, fetch, iterate
from interp_jax.models.decoding import (
    Decoded,
    Place,
    PlacedIntervention,
    Places,
    Sampling,
    by_position,
    check_places,
    ends,
    filters,
    picked,
    usable,
)
from interp_jax.models.step_layout import unstacked
from interp_jax.models.transformer import KeyValueCache, Transformer, empty_cache

__all__ = ["decode_with_cache", "prefill", "step"]


def prefill(model: Transformer, cache: KeyValueCache, tokens: Any, is_token: Any) -> tuple[Array, KeyValueCache]:
    """The pass over the prompts: logits of the last position, and the cache."""
    return model.extend(cache, tokens, is_token=is_token, last_only=True)


def step(model: Transformer, cache: KeyValueCache, tokens: Any) -> tuple[Array, KeyValueCache]:
    """A pass over one token a row."""
    return model.extend(cache, tokens)


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10, 11, 12, 13))
def decode_with_cache(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    is_token: Bool[Array, "batch seq"],
    keys: Any,
    temperature: Any,
    top_p: Any,
    varying: Partial | None,
    fixed: PlacedIntervention | None,
    max_new_tokens: int,
    sampling: Sampling,
    where: str,
    places: Places | None,
    fetch_sites: tuple[str, ...],
    fetch_layers: tuple[int | None, ...] | None,
    for_steps: Transformer | None = None,
) -> Decoded:
    """Continues rows of tokens.

    Args:
        model: the model.
        tokens: the prompts, padded on the left.
        is_token: false at padding.
        keys: a PRNG key a row.
        temperature: as for `picked`.
        top_p: as for `picked`.
        varying: an intervention whose arrays are arguments of the program.
        fixed: an intervention that is part of the program; looked at where `varying` is None.
        max_new_tokens: how many tokens a row gets at most.
        sampling: how a token is picked.
        where: `prompt`, `generated` or `both`: which passes the intervention is called in.
        places: the sites that it is called at; None for all.
        fetch_sites: the sites whose activations are given back.
        fetch_layers: their layers; None for all.
        for_steps: the same model as the steps read it (`step_layout`), where it is another.

    Returns:
        What was generated.
    """
    batch, length = tokens.shape
    n_prompt = is_token.sum(axis=1, dtype=jnp.int32)
    intervention = fixed if varying is None else varying

    def instrumented(function: Callable[..., Any], other: str, place: Place) -> Callable[..., tuple[Any, SiteValues]]:
        acting = None if intervention is None or where == other else intervention
        return _instrumented(function, acting, place, places, fetch_sites, fetch_layers)

    prompt_place = Place(jnp.arange(length) - (length - n_prompt)[:, None], n_prompt)
    cache = empty_cache(model, batch, length + max_new_tokens)
    (logits, cache), found = instrumented(prefill, "generated", prompt_place)(model, cache, tokens, is_token)
    first = picked(logits[:, -1], keys, 0, temperature, top_p, sampling)
    kept = SiteValues()
    for at, value in found.items():
        value = by_position(at[1], value)
        buffer = jnp.zeros((batch, max_new_tokens, *value.shape[2:]), value.dtype)
        kept[at] = _at_step(buffer, value[:, -1:], 0)
    new = jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first)

    stepped = model if for_steps is None else for_steps
    if model.is_stacked and not stepped.is_stacked:
        cache = unstacked(cache)

    def goes_on(state: Any) -> Bool[Array, ""]:
        number, _, _, _, is_done, *_ = state
        return (number < max_new_tokens) & ~is_done.all()

    def body(state: Any) -> Any:
        number, cache, last, new, is_done, n_generated, is_finite, kept = state
        place = Place((n_prompt + number - 1)[:, None], n_prompt)
        (logits, cache), found = instrumented(step, "prompt", place)(stepped, cache, last[:, None])
        kept = SiteValues({at: _at_step(kept[at], by_position(at[1], found[at]), number) for at in kept})
        next_ = picked(logits[:, -1], keys, number, temperature, top_p, sampling)
        new = new.at[:, number].set(jnp.where(is_done, -1, next_))
        n_generated = n_generated + ~is_done
        is_finite = is_finite & (is_done | usable(logits[:, -1]))
        return number + 1, cache, next_, new, is_done | ends(next_, sampling), n_generated, is_finite, kept

    start = (
        jnp.ones((), jnp.int32), cache, first, new, ends(first, sampling), jnp.ones(batch, jnp.int32),
        usable(logits[:, -1]), kept,
    )  # fmt: skip
    _, _, _, new, _, n_generated, is_finite, kept = jax.lax.while_loop(goes_on, body, start)
    return Decoded(new, n_generated, is_finite, kept)


def _instrumented(
    function: Callable[..., Any],
    intervention: PlacedIntervention | None,
    place: Place,
    places: Places | None,
    fetch_sites: tuple[str, ...],
    fetch_layers: tuple[int | None, ...] | None,
) -> Callable[..., tuple[Any, SiteValues]]:
    """One pass, with an intervention in it, that also gives activations as the pass carried on with them."""
    if intervention is None and fetch_sites:
        return fetch(function, fetch_sites, fetch_layers)
    if intervention is None:
        return lambda *args: (function(*args), SiteValues())

    def run(*args: Any) -> tuple[Any, SiteValues]:
        shown: dict[tuple[int | None, str], None] = {}
        # With something to fetch, all of them: what is fetched need not be among the sites of the intervention.
        sites, layers = filters(None if fetch_sites else places)
        for activation in (running := iterate(function, sites=sites, layers=layers)(*args)):
            layer, name, value = activation
            shown[layer, name] = None
            new = intervention(activation, place) if places is None or (layer, name) in places else None
            if new is not None:
                running.modified_value = new
            if name in fetch_sites and (fetch_layers is None or layer in fetch_layers):
                running.save((layer, name), value if new is None else running.modified_value)
            del activation, value, new  # where the site is inside a traced function, nothing of it may outlive the step
        check_places(places or (), shown)
        names, numbers = {name for _, name in shown}, {layer for layer, _ in shown}
        if not set(fetch_sites) <= names:
            raise SiteError(
                f"fetch_sites={fetch_sites} are not all there; the model's sites are {', '.join(sorted(names))}"
            )
        absent = [layer for layer in fetch_layers or () if fetch_sites and layer not in numbers]
        if absent or (fetch_sites and not running.saved):
            last = max(number for number in numbers if number is not None)
            raise SiteError(
                f"fetch_layers={fetch_layers}: none of {', '.join(fetch_sites)} stands in {absent or fetch_layers}; "
                f"layers are 0 to {last}, and None for the sites of no layer"
            )
        return running.retval, SiteValues(running.saved)

    return run


def _at_step(buffer: Array, value: Array, number: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), number, 1)

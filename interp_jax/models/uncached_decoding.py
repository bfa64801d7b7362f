"""Generation with any causal model: each step runs the whole text through it, in one compiled program.

For models of other libraries, whose code has no cache that is known here. The prompts lie in a buffer of fixed width
that also has room for what is generated, padded on the right. The model is causal, so what lies behind a row's last
token changes nothing before it, and a row gives the same tokens alone as beside longer ones.

An intervention sees `[batch, buffer, ...]` values in every step. It gives what it would give with a cache as long as
it is a function of a value, of where it stands and of its own arrays. One that mixes positions (a mean over the
sequence, say) sees padding too: token 0.

The width is rounded up to a multiple of `BUCKET`, so that prompts of similar lengths share a program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from interp_jax.instrument import SiteValues, iterate
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

__all__ = ["BUCKET", "decode_without_cache"]

BUCKET = 16
"""Buffers are a multiple of this many tokens wide, unless the model's context is narrower."""


@functools.partial(jax.jit, static_argnums=(0, 8, 9, 10, 11, 12))
def decode_without_cache(
    forward: Callable[[Any, Any], Any],
    params: Any,
    buffer: Int[Array, "batch buffer"],
    n_prompt: Int[Array, "batch"],
    keys: Any,
    temperature: Any,
    top_p: Any,
    varying: Partial | None,
    fixed: PlacedIntervention | None,
    max_new_tokens: int,
    sampling: Sampling,
    where: str,
    places: Places | None,
) -> Decoded:
    """Continues rows of tokens.

    Args:
        forward: the model, causal.
        params: its parameters.
        buffer: the prompts, with room for `max_new_tokens` behind the longest.
        n_prompt: how many tokens each has.
        keys: a PRNG key a row.
        temperature: as for `picked`.
        top_p: as for `picked`.
        varying: an intervention whose arrays are arguments of the program.
        fixed: an intervention that is part of the program; looked at where `varying` is None.
        max_new_tokens: how many tokens a row gets at most.
        sampling: how a token is picked.
        where: `prompt`, `generated` or `both`: the positions that the intervention acts on.
        places: the sites that it is called at; None for all.

    Returns:
        What was generated, with no activations.
    """
    n_rows, width = buffer.shape
    rows = jnp.arange(n_rows)
    place = Place(jnp.broadcast_to(jnp.arange(width), buffer.shape), n_prompt)
    is_acted_on = {"prompt": place.is_prompt, "generated": place.is_generated, "both": None}[where]
    intervention = fixed if varying is None else varying

    def logits_of(tokens: Int[Array, "batch buffer"]) -> Array:
        if intervention is None:
            return forward(params, tokens)
        sites, layers = filters(places)
        shown: dict[tuple[int | None, str], None] = {}
        for activation in (running := iterate(forward, sites=sites, layers=layers)(params, tokens)):
            shown[activation.layer, activation.name] = None
            is_called = places is None or (activation.layer, activation.name) in places
            value = intervention(activation, place) if is_called else None
            if value is not None and is_acted_on is not None and jnp.shape(value) == activation.value.shape:
                value = _where(is_acted_on, activation.name, value, activation.value)
            if value is not None:
                running.modified_value = value
        check_places(places or (), shown)
        return running.retval

    def body(state: Any) -> Any:
        number, tokens, new, n_generated, is_finite, is_done = state
        last = n_prompt + number - 1
        logits = logits_of(tokens)[rows, last].astype(jnp.float32)
        next_ = picked(logits, keys, number, temperature, top_p, sampling)
        tokens = tokens.at[rows, last + 1].set(jnp.where(is_done, 0, next_))
        new = new.at[:, number].set(jnp.where(is_done, -1, next_))
        is_finite = is_finite & (is_done | usable(logits))
        n_generated = n_generated + ~is_done
        return number + 1, tokens, new, n_generated, is_finite, is_done | ends(next_, sampling)

    def goes_on(state: Any) -> Bool[Array, ""]:
        return (state[0] < max_new_tokens) & ~jnp.all(state[-1])

    none = jnp.zeros(n_rows, bool)
    new = jnp.full((n_rows, max_new_tokens), -1, jnp.int32)
    start = (jnp.zeros((), jnp.int32), buffer, new, jnp.zeros_like(n_prompt), ~none, none)
    _, _, new, n_generated, is_finite, _ = jax.lax.while_loop(goes_on, body, start)
    return Decoded(new, n_generated, is_finite, SiteValues())


def _where(is_edited: Bool[Array, "batch seq"], site: str, new: Array, old: Array) -> Array:
    new, old = by_position(site, jnp.asarray(new)), by_position(site, old)
    edited = jnp.where(is_edited.reshape(*is_edited.shape, *(1,) * (old.ndim - 2)), new, old)
    return by_position(site, edited.astype(old.dtype))

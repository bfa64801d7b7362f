"""What the two ways of generating share: the draw of a token, and where in its row a value stands.

`cached_decoding` runs a `Transformer` over a cache of keys and values; `uncached_decoding` runs any causal model over
the whole text for each token. Both call an intervention as `intervention(activation, place)` and give the same tokens.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from interp_jax.instrument import Activation, SiteError, SiteValues

__all__ = [
    "Decoded",
    "NonFiniteLogitsError",
    "Place",
    "PlacedIntervention",
    "Places",
    "Sampling",
    "SelfPlaced",
    "by_position",
    "check_places",
    "ends",
    "filters",
    "picked",
    "usable",
]


class NonFiniteLogitsError(FloatingPointError):
    """No token can be picked.

    Attributes:
        row: the first row of the batch of which that is so.
    """

    def __init__(self, row: int, n_rows: int, *, is_edited: bool):
        """Says which row.

        Args:
            row: the row.
            n_rows: how many there are.
            is_edited: whether an intervention may be the reason.
        """
        self.row = row
        why = ": the edit is too large for its number format, use a smaller one" if is_edited else ""
        super().__init__(f"The logits are not finite in row {row} of {n_rows}{why}.")


class Place(NamedTuple):
    """Where the values of one pass stand in their rows."""

    position: Int[Array, "batch seq"]
    """Each value's position in its own row, from 0; negative at padding on the left."""
    n_prompt: Int[Array, "batch"]
    """How many tokens each row's prompt has."""

    @property
    def is_prompt(self) -> Bool[Array, "batch seq"]:
        """Whether it is the prompt's; padding on the left is not."""
        return (self.position >= 0) & (self.position < self.n_prompt[:, None])

    @property
    def is_generated(self) -> Bool[Array, "batch seq"]:
        """Whether it stands after the prompt."""
        return self.position >= self.n_prompt[:, None]


PlacedIntervention = Callable[[Activation, Place], Any]
"""From an activation, and where it stands, to its new value; None leaves it alone."""


Places = tuple[tuple[int | None, str], ...]
"""The layers and names of some sites."""


def filters(places: Places | None) -> tuple[Any, Any]:
    """What a pass is narrowed to: the names and the layers; among their pairs there may be more than the places."""
    if places is None:
        return None, None
    return tuple(dict.fromkeys(name for _, name in places)), tuple(dict.fromkeys(layer for layer, _ in places))


def check_places(places: Places, seen: Collection[tuple[int | None, str]]) -> None:
    """Refuses places that a pass did not come by: what is to be done there would else silently not be done.

    Args:
        places: where something is to be done.
        seen: the layers and names that the pass showed.

    Raises:
        SiteError: if there is one.
    """
    for layer, name in places:
        if (layer, name) in seen:
            continue
        layers = [str(other) for other, of in seen if of == name]
        if layers:
            where = f"it stands in layer {', '.join(layers)}"
        else:
            where = f"the sites are {', '.join(sorted({of for _, of in seen}))}"
        raise SiteError(f"There is no site {name!r} in layer {layer}; {where}.")


@runtime_checkable
class SelfPlaced(Protocol):
    """A `PlacedIntervention` that says where it acts and what it is not for; a pytree, whose arrays may differ."""

    @property
    def places(self) -> Places:
        """The sites that it is called at."""
        ...

    def check(self, model: Any, n_prompt: Sequence[int]) -> None:
        """Raises where it is not for a model, or for prompts of so many tokens."""
        ...

    def __call__(self, activation: Activation, place: Place) -> Any:
        """A site's new value; None leaves it alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is picked, as far as it decides the program."""

    is_greedy: bool
    top_k: int | None
    has_top_p: bool
    stop_tokens: tuple[int, ...]


class Decoded(NamedTuple):
    """What a run gives, still on the device."""

    tokens: Int[Array, "batch max_new_tokens"]
    """The new tokens, a stop token included; what stands after it is -1."""
    n_generated: Int[Array, "batch"]
    """How many they are."""
    is_finite: Bool[Array, "batch"]
    """Whether all logits that a token was picked from were usable."""
    activations: SiteValues
    """What was fetched, `[batch, max_new_tokens, ...]`."""


def usable(logits: Float[Array, "batch vocab"]) -> Bool[Array, "batch"]:
    """Whether tokens can be picked: there is no NaN, no positive infinity, and something above minus infinity."""
    return jnp.isfinite(logits.max(axis=-1))


def ends(tokens: Int[Array, "batch"], sampling: Sampling) -> Bool[Array, "batch"]:
    """Whether a token ends its row."""
    return jnp.isin(tokens, jnp.asarray(sampling.stop_tokens, jnp.int32))


def picked(
    logits: Float[Array, "batch vocab"], keys: Any, number: Any, temperature: Any, top_p: Any, sampling: Sampling
) -> Int[Array, "batch"]:
    """The next token of each row.

    Args:
        logits: of the row's last position.
        keys: a PRNG key a row. Rows with equal keys and logits get the same token.
        number: how many tokens were picked before.
        temperature: what the logits are divided by; not looked at where the likeliest token is taken.
        top_p: draw among the fewest likeliest tokens that reach it; not looked at unless `sampling` says so.
        sampling: the rest.
    """
    if sampling.is_greedy:
        return _likeliest(logits)
    logits = logits.astype(jnp.float32) / temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.has_top_p:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # Those before which the sum has not yet reached top_p; the likeliest is always among them.
        is_in = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.where(is_in, descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """`argmax`, by the maxima of blocks: on a CPU a maximum is computed with vectors and an argmax is not."""
    block = 128
    padded = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % block)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(logits), -1, block)
    which = jnp.argmax(jnp.max(blocks, axis=2), axis=1)
    best = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]
    return (which * block + jnp.argmax(best, axis=1)).astype(jnp.int32)


def by_position(site: str, value: Array) -> Array:
    """A site's value with the axis of positions second; over what is attended to, it stands third."""
    return value.swapaxes(1, 2) if site in ("attn_logits", "attn_probs") else value

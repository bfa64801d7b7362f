"""The decoding loop that every kind of generation shares: prefill and all steps in one compiled program.

The prompts lie right-padded in a buffer of fixed size that also has room for what is generated. Each step runs the
whole buffer through the model and writes one token a row, inside a `jax.lax.while_loop` that ends when every row has
met a stop token. The model is causal, so what lies behind a row's last token (padding, and nothing else) changes
nothing before it, and a row gives the same tokens alone as beside longer ones.

The running pass lives inside the body of the loop, around the model's plain forward function: its sites are at the
level of the loop body's own trace, so an intervention sees `[batch, buffer, ...]` values and their static layer.

What this costs: a step is as dear as a pass over the whole buffer. A cache of keys and values makes it cheaper and
changes nothing of what is promised here: an edit is a function of a value, of the positions that it covers and of
traced arguments.

Hazards:

- `forward`, `intervention` and the filters are static: they are part of the compiled program's key, by identity or by
  equality. What an intervention needs to vary without a new compilation goes into `intervention_args`.
- A buffer is rounded up to a multiple of `BUCKET` so that prompts of similar lengths share a program.
- Padding is token 0. An intervention that mixes positions (a mean over the sequence, say) sees the padding too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel

__all__ = ["BUCKET", "Decoded", "PositionedIntervention", "decode"]

BUCKET = 16
"""Buffers are a multiple of this many tokens long, unless the model's context is shorter."""

PositionedIntervention = Callable[..., Any]
"""`(activation, is_prompt, *args) -> value | None`; `is_prompt`, `[batch seq]`, is true at the prompt's positions."""


class Decoded(NamedTuple):
    """What one run of the loop gives, still on the device."""

    buffer: Int[Array, "batch buffer"]
    """Prompt, generated tokens, padding."""
    n_generated: Int[Array, "batch"]
    """How many tokens each row has after its prompt, a stop token included."""
    is_finite: Bool[Array, "batch"]
    """Whether all logits that a token was picked from were finite."""


def decode(
    language_model: LanguageModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    keys: Any,
    intervention: PositionedIntervention | None = None,
    intervention_args: tuple[Any, ...] = (),
    sites: tuple[str, ...] | None = None,
    layers: tuple[int | None, ...] | None = None,
) -> list[list[int]]:
    """Continues rows of tokens; checks what can be checked first.

    Args:
        language_model: the model.
        prompt_ids: one row of ids a continuation, each at least one long; lengths may differ.
        max_new_tokens: how many tokens are generated at most, a row.
        temperature: 0 picks the most likely token; above it, tokens are drawn from softmax(logits / temperature).
        keys: one PRNG key a row, or None at temperature 0. Rows with equal keys get equal random numbers.
        intervention: called at every site that the filters let through, with the activation, the mask of prompt
            positions and `intervention_args`; None as its result leaves the value alone.
        intervention_args: pytrees of arrays, traced: other values of them need no new compilation.
        sites: as for `iterate`.
        layers: as for `iterate`.

    Returns:
        The generated ids of each row, without a stop token.

    Raises:
        ValueError: when a row does not fit the model's context, an id is outside its vocabulary, the numbers make no
            sense, or the filters match no site.
        FloatingPointError: when the model's logits are not finite, which a too large edit brings about.
    """
    if not prompt_ids:
        raise ValueError("There is no prompt to continue; give at least one.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"The temperature must be 0 (the most likely token) or above, and finite; got {temperature}.")
    if keys is None:
        if temperature > 0:
            raise ValueError(
                f"Drawing tokens at temperature {temperature} needs randomness: pass key=jax.random.key(0)."
            )
        keys = jax.random.split(jax.random.key(0), len(prompt_ids))
    buffer, lengths = _buffer(language_model, prompt_ids, max_new_tokens)
    decoded: Decoded = _decode_compiled(
        language_model.forward,
        intervention,
        sites,
        layers,
        language_model.stop_tokens,
        language_model.params,
        jnp.asarray(buffer),
        jnp.asarray(lengths),
        jnp.asarray(max_new_tokens),
        jnp.asarray(temperature, jnp.float32),
        keys,
        intervention_args,
    )
    rows, n_generated, is_finite = (np.asarray(field) for field in decoded)
    if not is_finite.all():
        raise FloatingPointError(
            f"{language_model.name} gave logits that are not finite in row {int(np.argmin(is_finite))} of {len(rows)}: "
            "the edit is too large for its number format. Use a smaller coefficient."
        )
    stops = language_model.stop_tokens
    generated = [row[n : n + m].tolist() for row, n, m in zip(rows, lengths, n_generated, strict=True)]
    return [ids[:-1] if ids[-1] in stops else ids for ids in generated]


def _buffer(
    language_model: LanguageModel, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Int[np.ndarray, "batch buffer"], Int[np.ndarray, "batch"]]:
    """The padded rows and their lengths."""
    lengths = np.asarray([len(ids) for ids in prompt_ids], np.int32)
    if lengths.min() == 0:
        raise ValueError(f"Prompt {int(lengths.argmin())} of {len(lengths)} is empty; give it at least one token.")
    needed = int(lengths.max()) + max_new_tokens
    if needed > language_model.context:
        raise ValueError(
            f"A prompt of {int(lengths.max())} tokens and {max_new_tokens} new ones need {needed} positions, and "
            f"{language_model.name} has {language_model.context}. Shorten the prompt or lower max_new_tokens."
        )
    width = min(-(-needed // BUCKET) * BUCKET, language_model.context)
    buffer = np.zeros((len(lengths), width), np.int32)
    for row, ids in zip(buffer, prompt_ids, strict=True):
        row[: len(ids)] = ids
    if buffer.min() < 0 or buffer.max() >= language_model.vocab_size:
        wrong = int(buffer.min()) if buffer.min() < 0 else int(buffer.max())
        raise ValueError(
            f"Token id {wrong} is outside {language_model.name}'s vocabulary of {language_model.vocab_size}."
        )
    return buffer, lengths


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _decode_compiled(
    forward: Callable[[Any, Any], Any],
    intervention: PositionedIntervention | None,
    sites: tuple[str, ...] | None,
    layers: tuple[int | None, ...] | None,
    stops: tuple[int, ...],
    params: Any,
    buffer: Int[Array, "batch buffer"],
    lengths: Int[Array, "batch"],
    max_new_tokens: Int[Array, ""],
    temperature: Float[Array, ""],
    keys: Any,
    intervention_args: tuple[Any, ...],
) -> Decoded:
    n_rows, width = buffer.shape
    rows = jnp.arange(n_rows)
    is_prompt = jnp.arange(width)[None, :] < lengths[:, None]

    def logits_of(tokens: Int[Array, "batch buffer"]) -> Float[Array, "batch buffer vocab"]:
        if intervention is None:
            return forward(params, tokens)
        for activation in (running := iterate(forward, sites=sites, layers=layers)(params, tokens)):
            value = intervention(activation, is_prompt, *intervention_args)
            if value is not None:
                running.modified_value = value
        return running.retval

    def pick(logits: Float[Array, "vocab"], key: Any) -> Int[Array, ""]:
        # Both are computed and one is kept, so that one program serves every temperature. The bound keeps the
        # division finite.
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, tokens, n_generated, is_finite, is_done = state
        last = lengths + i - 1
        logits = logits_of(tokens)[rows, last].astype(jnp.float32)
        picked = jax.vmap(pick)(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i))
        tokens = tokens.at[rows, last + 1].set(jnp.where(is_done, 0, picked))
        is_finite = is_finite & (is_done | jnp.all(jnp.isfinite(logits), axis=-1))
        n_generated = n_generated + ~is_done
        is_done = is_done | jnp.isin(picked, jnp.asarray(stops, jnp.int32))
        return i + 1, tokens, n_generated, is_finite, is_done

    def goes_on(state: tuple[Any, ...]) -> Bool[Array, ""]:
        return (state[0] < max_new_tokens) & ~jnp.all(state[4])

    n_rows_false = jnp.zeros(n_rows, bool)
    start = (jnp.zeros_like(max_new_tokens), buffer, jnp.zeros_like(lengths), ~n_rows_false, n_rows_false)
    _, tokens, n_generated, is_finite, _ = jax.lax.while_loop(goes_on, step, start)
    return Decoded(tokens, n_generated, is_finite)

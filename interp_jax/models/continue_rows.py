"""Rows of tokens continued: what `generate`, the loop over a generation and steering are made of.

It checks what can be checked first, pads, and runs the model over a cache where it is ours and without one where it is
another library's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Bool, Int

from interp_jax.models.cached_decoding import decode_with_cache
from interp_jax.models.decoding import Decoded, NonFiniteLogitsError, PlacedIntervention, Places, Sampling
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.step_layout import laid_out_for_steps
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer
from interp_jax.models.uncached_decoding import BUCKET, decode_without_cache

__all__ = ["Prompts", "Settings", "as_rows", "checked_rows", "checked_settings", "continue_rows", "padded", "row_keys"]

Prompts = str | Sequence[str] | Sequence[Sequence[int]]
"""A text, texts, or rows of ids."""


class Settings(NamedTuple):
    """How tokens are drawn, checked."""

    temperature: float
    """1 where nothing is drawn."""
    top_p: float
    """1 where it is not asked for."""
    sampling: Sampling
    """What decides the program."""


def checked_settings(
    temperature: float, top_k: int | None, top_p: float | None, key: Any, stop_tokens: Sequence[int], vocab: int
) -> Settings:
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature}; it must be at least 0, and finite.")
    if temperature > 0 and key is None:
        raise ValueError("Sampling needs key=jax.random.key(seed); temperature=0 takes the most likely token.")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k={top_k}; it must be from 1 to the vocabulary's {vocab}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; it must be above 0 and at most 1.")
    wrong = [stop for stop in stop_tokens if not (isinstance(stop, int | np.integer) and 0 <= stop < vocab)]
    if wrong:
        raise ValueError(f"stop_tokens holds {wrong}; the model's tokens are 0 to {vocab - 1}.")
    return Settings(
        temperature or 1.0, 1.0 if top_p is None else top_p,
        Sampling(temperature == 0, top_k, top_p is not None, tuple(stop_tokens)),
    )  # fmt: skip


def row_keys(key: Any, n_rows: int) -> Any:
    """A key a row; those of `jax.random.key(0)` where nothing is drawn."""
    key = jax.random.key(0) if key is None else key
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(n_rows))


def as_rows(
    model: Transformer | LanguageModel, prompts: Prompts, stop_tokens: Sequence[int] | None
) -> tuple[Sequence[Sequence[int]], Sequence[int], Tokenizer | None]:
    """Prompts as ids, stop tokens, and the tokenizer."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(model, LanguageModel):
        rows = [model.encode_prompt(each) if isinstance(each, str) else each for each in texts]
        return rows, model.stop_tokens if stop_tokens is None else stop_tokens, model.tokenizer
    if any(isinstance(each, str) for each in texts):
        raise ValueError("A Transformer has no tokenizer for texts; give generate the LanguageModel, or token ids.")
    return cast(Any, texts), stop_tokens or (), None


def _limits(model: Transformer | LanguageModel) -> tuple[int, int]:
    """Vocabulary and context."""
    of = model if isinstance(model, LanguageModel) else model.config
    return of.vocab_size, of.context


def checked_rows(
    model: Transformer | LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Any]:
    """The rows as arrays."""
    vocab_size, context = _limits(model)
    rows = [_ids(i, prompt) for i, prompt in enumerate(prompts)]
    if not rows:
        raise ValueError("There are no prompts.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1.")
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"Prompt {i} is empty: begin it with the tokenizer's bos_id or end_of_text_id.")
        wrong = row[(row < 0) | (row >= vocab_size)]
        if len(wrong):
            raise ValueError(f"Prompt {i} holds {wrong[0]}; the model's tokens are 0 to {vocab_size - 1}.")
        if len(row) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {i} has {len(row)} tokens; with {max_new_tokens} new ones that exceeds the context of "
                f"{context}. Shorten the prompt or lower max_new_tokens."
            )
    return rows


def _ids(i: int, prompt: Any) -> np.ndarray:
    """A row as an array of whole numbers; an empty one has no dtype of its own."""
    row = np.asarray(prompt)
    if row.ndim != 1:
        raise ValueError(
            f"Prompt {i} has shape {row.shape}; prompts are texts, or a list of ids for each row: [[5, 7], [9]]."
        )
    if row.size and not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"Prompt {i} holds {row.dtype} values; token ids are whole numbers.")
    return row.astype(np.int64)


def padded(
    rows: Sequence[Any], multiple: int = 1
) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
    """Rows padded on the left, to a multiple of tokens."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    tokens, is_token = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], is_token[i, width - len(row) :] = row, True
    return tokens, is_token


def continue_rows(
    model: Transformer | LanguageModel,
    prompts: Sequence[Sequence[int]],
    keys: Any,
    settings: Settings,
    *,
    max_new_tokens: int,
    intervention: PlacedIntervention | None = None,
    where: str = "both",
    places: Places | None = None,
    fetch_sites: tuple[str, ...] = (),
    fetch_layers: tuple[int | None, ...] | None = None,
    multiple: int = 1,
) -> Decoded:
    """What `generate` and steering run: rows of ids, a key a row, and an intervention that is told where it stands.

    Args:
        model: the model; without a cache where it is another library's.
        prompts: rows of ids.
        keys: a PRNG key a row.
        settings: how tokens are drawn.
        max_new_tokens: how many tokens a row gets at most.
        intervention: see `decoding`. The arrays of a `Partial` are arguments of the program.
        where: the positions that the intervention acts on.
        places: the sites that it is called at; None for all.
        fetch_sites: the sites whose activations are given back.
        fetch_layers: their layers; None for all.
        multiple: prompts are padded to a multiple of so many tokens, so that those of similar lengths share a program.

    Returns:
        What was generated.

    Raises:
        ValueError: as `generate`.
        SiteError: there is no such site.
        NonFiniteLogitsError: the logits are not finite.
    """
    rows = checked_rows(model, prompts, max_new_tokens)
    varying, fixed = (intervention, None) if isinstance(intervention, Partial) else (None, intervention)
    shared = (settings.temperature, settings.top_p, varying, fixed, max_new_tokens, settings.sampling, where)
    transformer = model.params if isinstance(model, LanguageModel) else model
    if isinstance(transformer, Transformer):
        tokens, is_token = padded(rows, multiple)
        for_steps = laid_out_for_steps(transformer, len(rows), max_new_tokens)
        decoded = decode_with_cache(
            transformer, tokens, is_token, keys, *shared, places, fetch_sites, fetch_layers, for_steps
        )
    else:
        assert isinstance(model, LanguageModel)
        if fetch_sites:
            raise ValueError(
                f"{model.name} runs on another library's code, for which fetch_sites does not work. Load its files "
                "with ij.load(path), or put the rows that were generated through ij.fetch."
            )
        n_prompt = np.asarray([len(row) for row in rows], np.int32)
        width = min(-(-(int(n_prompt.max()) + max_new_tokens) // BUCKET) * BUCKET, model.context)
        buffer = np.zeros((len(rows), width), np.int32)
        for at, row in zip(buffer, rows, strict=True):
            at[: len(row)] = row
        decoded = decode_without_cache(model.forward, model.params, buffer, n_prompt, keys, *shared, places)
    is_finite = np.asarray(decoded.is_finite)
    if not is_finite.all():
        raise NonFiniteLogitsError(int(np.argmin(is_finite)), len(is_finite), is_edited=intervention is not None)
    return decoded

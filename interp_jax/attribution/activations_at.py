"""Activations of many prompts at a few positions: what probes and comparisons between prompts are made of.

Prompts may be of different lengths. They are padded on the right, where a causal model does not see it, so all run in
one compiled program, and a negative position counts from each prompt's own end.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.splice import unheaded
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import check_ids

__all__ = ["activations_at", "padded"]

Prompts = Int[Array | np.ndarray, "n seq"] | Sequence[Any]


def activations_at(
    language_model: LanguageModel,
    prompts: Prompts,
    *,
    site: str = "resid_post",
    layers: int | Collection[int | None] | None = None,
    positions: int | Sequence[int] = -1,
    batch_size: int = 32,
    pad_to: int | None = None,
) -> Float[np.ndarray, "layers positions n d"]:
    """Reads a site for many prompts.

    Args:
        language_model: A causal model that has the site.
        prompts: Token ids, a row a prompt; rows may differ in length.
        site: A site with one value a position. A value per head is flattened.
        layers: Which layers; None for all that have the site.
        positions: Which positions of each prompt; negative ones count from its end.
        batch_size: Prompts a pass.
        pad_to: The width that rows are padded to; None for the longest prompt's.

    Returns:
        The values, layer by layer in the order of the pass, and in that of `positions`, in float32.

    Raises:
        ValueError: There are no prompts, one holds an id that is no token or is shorter than a position asks for, or a
            site has no value a position.
        SiteError: The model has no such site or layer.
    """
    rows, lengths = padded(prompts, pad_to)
    check_ids(rows, language_model.vocab_size, "prompts")
    if rows.shape[1] > language_model.context:
        raise ValueError(f"Prompts of {rows.shape[1]} tokens; {language_model.name} has {language_model.context}.")
    wanted = [positions] if isinstance(positions, int | np.integer) else list(positions)
    for position in wanted:
        short = np.flatnonzero((lengths <= position) | (lengths < -position))
        if len(short):
            raise ValueError(f"Prompt {short[0]} has {lengths[short[0]]} tokens, so it has no position {position}.")
    places = np.stack([np.full(len(rows), p) if p >= 0 else lengths + p for p in wanted], axis=1)
    if layers is not None:
        layers = (int(layers),) if isinstance(layers, int | np.integer) else tuple(dict.fromkeys(layers))
    batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # few prompts are not padded to a whole batch
    found = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        filling = ((0, batch_size - len(rows[part])), (0, 0))  # the last batch runs in the same program
        run = (np.pad(rows[part], filling), np.pad(places[part], filling))
        values = _values(language_model.forward, site, layers, language_model.params, *map(jnp.asarray, run))
        found.append(np.asarray(values)[:, :, : len(rows[part])])
    return np.concatenate(found, axis=2)


def padded(prompts: Prompts, pad_to: int | None = None) -> tuple[Int[np.ndarray, "n width"], Int[np.ndarray, "n"]]:
    """Prompts as one array, padded on the right with token 0.

    Args:
        prompts: Token ids, a row a prompt.
        pad_to: The width; None for the longest prompt's.

    Returns:
        The array, and each prompt's length.

    Raises:
        ValueError: There are no prompts, they are no rows of ids, one is empty, or one is longer than `pad_to`.
    """
    if any(isinstance(row, str) or not hasattr(row, "__len__") for row in prompts):
        raise ValueError("Prompts are rows of token ids, [[464, 1748], ...]; tokenizer.encode gives a text's.")
    lengths = np.asarray([len(row) for row in prompts])
    if not len(lengths) or not lengths.min():
        raise ValueError("There are no prompts." if not len(lengths) else f"Prompt {lengths.argmin()} has no tokens.")
    width = int(lengths.max()) if pad_to is None else pad_to
    if lengths.max() > width:
        raise ValueError(f"Prompt {lengths.argmax()} has {lengths.max()} tokens, more than pad_to={width}.")
    rows = np.zeros((len(lengths), width), np.int32)
    for row, length, prompt in zip(rows, lengths, prompts, strict=True):
        row[:length] = np.asarray(prompt)
    return rows, lengths


@functools.partial(jax.jit, static_argnames=("forward", "site", "layers"))
def _values(
    forward: Callable[..., Array], site: str, layers: Any, params: Any, tokens: Array, places: Array
) -> Float[Array, "layers positions batch d"]:
    for layer, _, value in (running := iterate(forward, sites=site, layers=layers)(params, tokens)):
        flat = unheaded(value, tokens, site)
        running.save(layer, jnp.take_along_axis(flat, places[:, :, None], axis=1).astype(jnp.float32))
        del value, flat
    return jnp.stack(list(running.saved.values())).swapaxes(1, 2)

"""Activations of a few texts at one site, of which steering vectors are made."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interp_jax.activations.splice import unheaded
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.steering.prompts import begun, n_begin

__all__ = ["Read", "activations_of", "read_activations"]

Read = Literal["last", "mean"]
"""Which activation stands for a text: that of its last token, or the mean over its own tokens."""

_BATCH, _BUCKET = 16, 16


def activations_of(
    language_model: LanguageModel, rows: Sequence[Sequence[int]], *, site: str, layer: int | None
) -> list[Float[np.ndarray, "_seq width"]]:
    """The activations of rows of ids at one site; what comes after the site is not computed.

    Args:
        language_model: the model.
        rows: the ids; lengths may differ.
        site: the site's name.
        layer: its layer.

    Returns:
        For each row one vector a token; a value per head is flattened to one.

    Raises:
        SiteError: if there is no such site.
        ValueError: if a row is longer than the model's context.
    """
    longest = max(map(len, rows))
    if longest > language_model.context:
        raise ValueError(
            f"A text has {longest} tokens, and {language_model.name} was made for {language_model.context}; shorten it."
        )
    found = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        width = min(-(-max(map(len, part)) // _BUCKET) * _BUCKET, language_model.context)
        tokens = np.zeros((_BATCH if len(rows) > _BATCH else len(part), width), np.int32)
        for at, row in zip(tokens, part, strict=False):
            at[: len(row)] = row
        values = np.asarray(_values(language_model.forward, site, layer, language_model.params, jnp.asarray(tokens)))
        found += [value[: len(row)] for value, row in zip(values, part, strict=False)]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _values(
    forward: Callable[[Any, Array], Array], site: str, layer: int | None, params: Any, tokens: Array
) -> Float[Array, "batch seq width"]:
    for _, _, value in (running := iterate(forward, sites=site, layers=(layer,))(params, tokens)):
        running.save("value", unheaded(value, tokens, site).astype(jnp.float32))
        del value
    return running.saved["value"]


def read_activations(
    language_model: LanguageModel, texts: Sequence[str], *, site: str, layer: int | None, read: Read
) -> Float[np.ndarray, "texts width"]:
    """One activation a text.

    Args:
        language_model: the model.
        texts: the texts.
        site: the site's name.
        layer: its layer.
        read: which activation stands for a text.

    Raises:
        ValueError: if there is no text, or `read` is no known word.
    """
    if not texts or isinstance(texts, str):
        raise ValueError("Give a list of at least one text.")
    if read not in ("last", "mean"):
        raise ValueError(f"read is {read!r}; expected 'last' or 'mean'.")
    rows = [begun(language_model, text) for text in texts]
    values = activations_of(language_model, rows, site=site, layer=layer)
    start = n_begin(language_model)
    return np.stack([value[-1] if read == "last" else value[start:].mean(axis=0) for value in values])

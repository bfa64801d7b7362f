"""Rows of tokens to train on and rows of other documents to judge by, the same split for every command."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from interp_jax.activations.text_files import read_documents
from interp_jax.activations.tokens import pack, split_documents
from interp_jax.models.known import load
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import working

__all__ = ["BATCH_ROWS", "ModelAndRows", "documents_of", "model_and_rows"]

BATCH_ROWS = 8
"""Rows of tokens a forward pass."""


def documents_of(text: str) -> list[str]:
    """The documents of a text, read before anything that takes long.

    Args:
        text: `wikipedia`, a text file, a .jsonl file with {"text": ...} a line, or a folder of such files.

    Raises:
        ValueError: if there is no text in it.
    """
    if text == "wikipedia":
        from interp_jax.activations.wikipedia import articles

        return [article.text for article in articles()]
    documents = read_documents(text)
    if not any(document.strip() for document in documents):
        raise ValueError(f"{text} holds no text.")
    return documents


class ModelAndRows(NamedTuple):
    """A model, and the tokens that it is to run on."""

    model: LanguageModel
    layer: int
    rows: Int[np.ndarray, "rows context"]
    """To train on, drawn from all over the text."""
    held_out: Int[np.ndarray, "held context"]
    """Of other documents, to judge by; of a text of one document its end."""


def model_and_rows(
    model_name: str,
    layer: int | None,
    text: str,
    *,
    context: int,
    n_tokens: int,
    n_held_out: int,
    dtype: str = "float32",
) -> ModelAndRows:
    """Loads a model, and divides a text into rows to train on and rows to judge by; with progress.

    Args:
        model_name: what `load` takes.
        layer: the layer; None is the middle one.
        text: what `documents_of` takes.
        context: tokens a row.
        n_tokens: tokens to train on; zero for none.
        n_held_out: tokens to judge by.
        dtype: of the model's weights and activations.

    Returns:
        The model with its rows; of either kind a multiple of `BATCH_ROWS`.

    Raises:
        ValueError: before the model is loaded for a text that is empty; after it for a layer that is not there, or a
            text that is too short.
    """
    documents = documents_of(text)
    with working(f"Loading {model_name}"):
        model = load(model_name, dtype=dtype)
    layer = model.layer_or_middle(layer)
    if len(documents) > 1:
        train_rows, held_out = (pack(part, model.tokenizer, context) for part in split_documents(documents))
    else:
        rows = pack(documents, model.tokenizer, context)
        cut = max(1, len(rows) * 9 // 10)
        train_rows, held_out = rows[:cut], rows[cut:]
    found = []
    for what, rows, count in (("to train on", train_rows, n_tokens), ("held out", held_out, n_held_out)):
        n_rows = max(BATCH_ROWS, count // context) if count else 0
        if len(rows) < n_rows:
            raise ValueError(
                f"{text} gives {len(rows) * context:,} tokens {what} in rows of {context}; {n_rows * context:,} were "
                "asked for. Pass more text, or lower n_tokens or n_held_out."
            )
        found.append(rows[np.random.default_rng(0).permutation(len(rows))[: n_rows // BATCH_ROWS * BATCH_ROWS]])
    return ModelAndRows(model, layer, *found)

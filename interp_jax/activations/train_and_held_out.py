"""Rows of tokens to train on and rows of other documents to judge by, the same split for every command."""

import numpy as np
from jaxtyping import Int

from interp_jax.activations.text_files import read_documents
from interp_jax.activations.tokens import pack, split_documents
from interp_jax.models.language_model import LanguageModel

__all__ = ["documents_of", "train_and_held_out"]


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


def train_and_held_out(
    text: str,
    documents: list[str],
    model: LanguageModel,
    *,
    context: int,
    n_tokens: int | None,
    n_held_out: int,
    batch_rows: int,
) -> tuple[Int[np.ndarray, "rows context"], Int[np.ndarray, "held context"]]:
    """Rows to train on, drawn from all over the text, and rows of other documents.

    Args:
        text: what the documents are of, for messages.
        documents: of `documents_of`. Of one document the end is held out.
        model: whose tokenizer is used.
        context: tokens a row.
        n_tokens: tokens to train on; None for none.
        n_held_out: tokens to judge by.
        batch_rows: rows a batch, of which either number is a multiple.

    Raises:
        ValueError: if the text is too short.
    """
    if len(documents) > 1:
        train_rows, held_out = (pack(part, model.tokenizer, context) for part in split_documents(documents))
    else:
        rows = pack(documents, model.tokenizer, context)
        cut = max(1, len(rows) * 9 // 10)
        train_rows, held_out = rows[:cut], rows[cut:]
    found = []
    for what, rows, count in (("to train on", train_rows, n_tokens), ("held out", held_out, n_held_out)):
        n_rows = 0 if count is None else max(batch_rows, count // context)
        if len(rows) < n_rows:
            raise ValueError(
                f"{text} gives {len(rows) * context:,} tokens {what} in rows of {context}; {n_rows * context:,} were "
                "asked for. Pass more text, or lower n_tokens or n_held_out."
            )
        found.append(rows[np.random.default_rng(0).permutation(len(rows))[: n_rows // batch_rows * batch_rows]])
    return found[0], found[1]

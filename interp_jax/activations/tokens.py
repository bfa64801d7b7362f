"""Documents to rows of tokens, all of one length, for a language model to run on.

Rows are cut from one long stream with no padding, so every position is real text. Train and held-out text are divided
by document, never by row: rows of one article share its names and phrases, and a dictionary would be judged on text
that it has as good as seen.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from interp_jax.models.tokenizer import Tokenizer

__all__ = ["pack", "split_documents"]

Document = TypeVar("Document")


def pack(documents: Sequence[str], tokenizer: Tokenizer, context: int) -> Int[np.ndarray, "n context"]:
    """Cuts documents into rows of `context` tokens.

    The documents are joined into one stream, each followed by the tokenizer's `end_of_text_id` (by nothing where there
    is none). Where the tokenizer has a `bos_id`, every row starts with it, followed by `context - 1` tokens of the
    stream. What is left over at the end and fills no row is dropped.

    Args:
        documents: texts, in the order in which they are to stand.
        tokenizer: the model's tokenizer.
        context: tokens a row, at least 2.

    Returns:
        int32 ids, one row a context.

    Raises:
        ValueError: when `context` is under 2, or the documents do not fill one row.
    """
    if context < 2:
        raise ValueError(f"A row needs at least 2 tokens to hold a prediction, got context={context}.")
    if isinstance(documents, str):
        raise TypeError("pack takes a list of documents, got one string; put it into a list.")
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stream = np.concatenate(
        [np.zeros(0, np.int32), *(np.asarray(tokenizer.encode(text) + end, np.int32) for text in documents)]
    )
    width = context - len(begin)
    n_rows = len(stream) // width
    if n_rows == 0:
        raise ValueError(
            f"{len(documents)} documents give {len(stream)} tokens, which do not fill one row of {context}. "
            "Pass more text or a smaller context."
        )
    rows = stream[: n_rows * width].reshape(n_rows, width)
    return np.concatenate([np.full((n_rows, len(begin)), begin, np.int32), rows], axis=1)


def split_documents(documents: Sequence[Document], held_out: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Divides documents into those to train on and those to judge by.

    The same documents are always divided alike: the held-out ones lie evenly spread over the sequence, so that a
    sorted collection (an encyclopedia) gives both parts all of its range.

    Args:
        documents: anything, one item a document.
        held_out: the share of documents, between 0 and 1, that is held out; rounded so that neither part is empty.

    Returns:
        (train, held out), each in the given order.

    Raises:
        ValueError: when there are fewer than two documents, or the share is not strictly between 0 and 1.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is the share of documents held out and must be between 0 and 1, got {held_out}.")
    if len(documents) < 2:
        raise ValueError(f"Dividing documents into two parts needs at least 2 of them, got {len(documents)}.")
    n_held_out = min(max(round(len(documents) * held_out), 1), len(documents) - 1)
    # The middle of each of n_held_out equal stretches.
    chosen = {int((i + 0.5) * len(documents) / n_held_out) for i in range(n_held_out)}
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]

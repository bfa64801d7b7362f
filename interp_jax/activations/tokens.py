"""Documents to rows of tokens, all of one length, for a language model to run on.

Rows are cut from one long stream with no padding, so every position is real text. Text that does not fit in memory is
packed as it comes: straight into batches for a model (`stream_rows`), or into a file that is mapped into memory
(`pack_file`), which is four bytes a token and can be divided, counted and gone on from like any array.

Train and held-out text are divided by document, never by row: rows of one article share its names and phrases, and a
dictionary would be judged on text that it has as good as seen.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from interp_jax.models.tokenizer import Tokenizer
from interp_jax.whole_file import open_whole

__all__ = ["pack", "pack_file", "split_documents", "stream_rows"]

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
    blocks = list(_blocks(documents, tokenizer, context))
    if not blocks:
        raise _no_row(context, f"{len(documents)} documents")
    return np.concatenate(blocks)


def stream_rows(
    documents: Iterable[str], tokenizer: Tokenizer, context: int, batch_rows: int
) -> Iterator[Int[np.ndarray, "batch context"]]:
    """Packs documents as they come, into batches for a model: the rows of `pack`, one after another.

    Args:
        documents: texts; any iterable, as `stream_documents` or `hugging_face_documents` gives.
        tokenizer: the model's tokenizer.
        context: tokens a row, at least 2.
        batch_rows: rows a batch; the last rows that fill no batch are left out.

    Yields:
        int32 ids. The same for the same documents: a run that goes on skips as many as it had.

    Raises:
        ValueError: when `context` is under 2, or `batch_rows` under 1.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; expected at least one row a batch.")
    return _regrouped(_blocks(documents, tokenizer, context), batch_rows)


def pack_file(
    documents: Iterable[str], tokenizer: Tokenizer, context: int, path: str | os.PathLike[str]
) -> Int[np.ndarray, "n context"]:
    """Packs documents into a file of rows, of which no more than a document is in memory at a time.

    Args:
        documents: texts; any iterable.
        tokenizer: the model's tokenizer.
        context: tokens a row, at least 2.
        path: a `.npy` file, whole or not there; one that is there is replaced. `numpy.load(path, mmap_mode="r")` opens
            it another time.

    Returns:
        The rows of `pack`, mapped into memory.

    Raises:
        ValueError: when `context` is under 2, or the documents do not fill one row.
        OSError: if the file cannot be written.
    """
    blocks = _blocks(documents, tokenizer, context)
    with open_whole(path) as file:
        n_rows = 0
        _write_header(file, n_rows, context)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<i4").data)
            n_rows += len(block)
        if n_rows == 0:
            raise _no_row(context, "the documents")
        file.seek(0)
        _write_header(file, n_rows, context)
    return np.load(path, mmap_mode="r")


def _write_header(file: Any, n_rows: int, context: int) -> None:
    """Of a `.npy` file. NumPy leaves room for the first axis to grow, so that it is as long whatever the rows."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (n_rows, context)}
    np.lib.format.write_array_header_1_0(file, header)


def _blocks(documents: Iterable[str], tokenizer: Tokenizer, context: int) -> Iterator[Int[np.ndarray, "n context"]]:
    """The rows that each document completes."""
    if context < 2:
        raise ValueError(f"A row needs at least 2 tokens to hold a prediction, got context={context}.")
    if isinstance(documents, str):
        raise TypeError("Expected documents one by one, got one string; put it into a list.")
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return _cut(documents, tokenizer, begin, context - len(begin))


def _cut(
    documents: Iterable[str], tokenizer: Tokenizer, begin: list[int], width: int
) -> Iterator[Int[np.ndarray, "n context"]]:
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    left = np.zeros(0, np.int32)
    for text in documents:
        stream = np.concatenate([left, np.asarray(tokenizer.encode(text) + end, np.int32)])
        n_rows = len(stream) // width
        left = stream[n_rows * width :]
        if n_rows:
            rows = stream[: n_rows * width].reshape(n_rows, width)
            yield np.concatenate([np.full((n_rows, len(begin)), begin, np.int32), rows], axis=1)


def _regrouped(
    blocks: Iterable[Int[np.ndarray, "n context"]], batch_rows: int
) -> Iterator[Int[np.ndarray, "batch context"]]:
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= batch_rows:
            rows = np.concatenate(waiting)
            whole = len(rows) // batch_rows * batch_rows
            yield from rows[:whole].reshape(-1, batch_rows, rows.shape[1])
            waiting = [rows[whole:]]


def _no_row(context: int, what: str) -> ValueError:
    return ValueError(f"{what} do not fill one row of {context}. Pass more text or a smaller context.")


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

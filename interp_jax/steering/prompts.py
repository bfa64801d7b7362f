"""Texts as steering sees them: rows of ids that begin as the model's training texts did.

A model parks attention at the first token of a row, whose activation is huge and says nothing about the text. So a
text begins with a token that is there for that: the tokenizer's `bos_id`, or else the token between documents. Then a
text's own first token reads and steers like any other, and two texts of different beginnings differ where they should.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from interp_jax.models.language_model import LanguageModel

__all__ = ["begin_id", "begun", "n_begin", "padded_pair"]


def begin_id(language_model: LanguageModel) -> int | None:
    """The id that a text begins with, None where the tokenizer knows none."""
    tokenizer = language_model.tokenizer
    return tokenizer.end_of_text_id if tokenizer.bos_id is None else tokenizer.bos_id


def n_begin(language_model: LanguageModel) -> int:
    """How many ids stand before a text's own: 1, or 0 where the tokenizer knows no such token."""
    return int(begin_id(language_model) is not None)


def begun(language_model: LanguageModel, text: str | Sequence[int]) -> list[int]:
    """A text's ids after the token that begins one.

    Args:
        language_model: the model.
        text: the text; ids are taken as they are.

    Raises:
        ValueError: when it is empty.
    """
    if not isinstance(text, str):
        if not len(text):
            raise ValueError("The prompt has no ids; give at least one.")
        if any(isinstance(id_, str) for id_ in text):
            raise ValueError(f"A prompt is one text or the ids of one, got {list(text)!r}; roll_out takes several.")
        return [int(id_) for id_ in text]
    ids = language_model.encode_prompt(text)
    first = begin_id(language_model)
    return ids if language_model.tokenizer.bos_id is not None or first is None else [first, *ids]


def padded_pair(
    language_model: LanguageModel, first: str, second: str, pad: str | None
) -> tuple[Int[np.ndarray, "seq"], Int[np.ndarray, "seq"]]:
    """Two texts as rows of the same length.

    Args:
        language_model: the model.
        first: a text.
        second: another.
        pad: what the shorter one is filled up with at its end, a text of one token; None if they must be equally long.

    Raises:
        ValueError: when they are not, or `pad` is no single token.
    """
    rows = [begun(language_model, text) for text in (first, second)]
    if len(rows[0]) != len(rows[1]):
        if pad is None:
            shown = [language_model.tokenizer.readable(row) for row in rows]
            raise ValueError(
                f"The texts have {len(rows[0])} and {len(rows[1])} tokens: {shown[0]} and {shown[1]}. "
                "Say what fills up the shorter one at its end, pad=' ' for example, or reword one."
            )
        ids = language_model.tokenizer.encode(pad)
        if len(ids) != 1:
            raise ValueError(f"pad={pad!r} is {len(ids)} tokens; give a text that is one.")
        length = max(map(len, rows))
        rows = [row + ids * (length - len(row)) for row in rows]
    return np.asarray(rows[0], np.int32), np.asarray(rows[1], np.int32)

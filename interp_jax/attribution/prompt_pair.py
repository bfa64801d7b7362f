"""Two prompts of one length, and the answer that tells them apart: what every attribution starts from.

The *clean* prompt shows the behaviour, the *corrupted* one does not. A node of the one run is compared with the same
node of the other, position by position, so both must be of equally many tokens. `align` is the one remedy offered here,
and a plain one: a token that is put before the shorter prompt (after the tokenizer's first token) until both are
equally long. What stands at one position then still stands at another place in its sentence; writing the prompts to the
same length by hand is better, and the error for unequal lengths shows where they differ.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Array, Int

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import check_ids

__all__ = ["PromptPair", "prompt_pair"]

Token = str | int | np.integer | Array
"""A token's text or its id, which may be an array of one number."""


@dataclasses.dataclass(frozen=True)
class PromptPair:
    """Two prompts of one length, with the ids of the answers that are compared."""

    clean: Int[np.ndarray, "seq"]
    """The prompt that shows the behaviour."""
    corrupted: Int[np.ndarray, "seq"]
    """The one that does not."""
    answer: int | None
    """The token that the clean prompt should be followed by; None if the metric needs none."""
    wrong: int | None
    """The token that it is compared with, say the corrupted prompt's answer; None without one."""
    labels: tuple[str, ...]
    """A readable string for each position: the clean token, spaces and line breaks visible."""
    corrupted_labels: tuple[str, ...]
    """The same of the corrupted prompt."""

    @property
    def seq(self) -> int:
        """How many tokens a prompt has."""
        return len(self.clean)

    @property
    def position_labels(self) -> tuple[str, ...]:
        """One string a position: the token, or `clean → corrupted` where the two differ."""
        pairs = zip(self.labels, self.corrupted_labels, strict=True)
        return tuple(one if one == other else f"{one} → {other}" for one, other in pairs)

    @property
    def swapped(self) -> "PromptPair":
        """The same with the prompts exchanged; answer and wrong token stay."""
        return dataclasses.replace(
            self, clean=self.corrupted, corrupted=self.clean,
            labels=self.corrupted_labels, corrupted_labels=self.labels,
        )  # fmt: skip


def prompt_pair(
    language_model: LanguageModel,
    clean: str,
    corrupted: str,
    *,
    answer: Token | None = None,
    wrong: Token | None = None,
    align: str | None = None,
) -> PromptPair:
    """Encodes two prompts and their answers.

    Args:
        language_model: the model that they are for.
        clean: the prompt that shows the behaviour.
        corrupted: the prompt that does not.
        answer: what should follow the clean prompt, a text of one token (mind its space: `" Paris"`) or an id.
        wrong: the token that it is compared with, likewise.
        align: a text of one token that is put before the shorter prompt until both are equally long; None makes
            unequal lengths an error.

    Returns:
        The pair.

    Raises:
        ValueError: for prompts of different lengths without `align`, prompts that are the same or longer than the
            model's context, an answer that is not one token, or two answers that are the same.
    """
    rows = [language_model.encode_prompt(clean), language_model.encode_prompt(corrupted)]
    if len(rows[0]) != len(rows[1]):
        rows = _aligned(language_model, rows, align)
    if len(rows[0]) > language_model.context:
        raise ValueError(
            f"The prompts have {len(rows[0])} tokens; {language_model.name} was made for at most "
            f"{language_model.context}. Shorten them."
        )
    if rows[0] == rows[1]:
        raise ValueError("Both prompts are the same tokens, so no node differs between them. Change one of them.")
    ids = [_one_token(language_model, text, what) for text, what in ((answer, "answer"), (wrong, "wrong"))]
    if ids[0] is not None and ids[0] == ids[1]:
        raise ValueError(f"The answer and the wrong token are the same, {_shown(language_model, [ids[0]])[0]!r}.")
    if ids[0] is None and ids[1] is not None:
        raise ValueError("There is a wrong token but no answer to compare it with; give answer= too.")
    labels = [tuple(_shown(language_model, row)) for row in rows]
    return PromptPair(np.asarray(rows[0]), np.asarray(rows[1]), ids[0], ids[1], labels[0], labels[1])


def _shown(language_model: LanguageModel, ids: list[int]) -> list[str]:
    return [token.replace(" ", "·") for token in language_model.tokenizer.readable(ids)]


def _aligned(language_model: LanguageModel, rows: list[list[int]], align: str | None) -> list[list[int]]:
    lengths = [len(row) for row in rows]
    if align is None:
        shown = [_shown(language_model, row) for row in rows]
        width = max(len(token) for token in [*shown[0], "clean"])
        lines = [f"  {'':>3}  {'clean':<{width}}  corrupted"]
        pairs = itertools.zip_longest(*shown, fillvalue="-")
        lines += [f"  {place:>3}  {one:<{width}}  {other}" for place, (one, other) in enumerate(pairs)]
        raise ValueError(
            f"The clean prompt has {lengths[0]} tokens and the corrupted one {lengths[1]}; they are compared position "
            "by position, so they must be equally long:\n" + "\n".join(lines) + "\n"
            "Word them alike, or give align=, a text of one token that is put before the shorter one."
        )
    filler = _one_token(language_model, align, "align")
    assert filler is not None  # None comes of None alone
    start = 0 if language_model.tokenizer.bos_id is None else 1
    return [[*row[:start], *[filler] * (max(lengths) - len(row)), *row[start:]] for row in rows]


def _one_token(language_model: LanguageModel, text: Token | None, what: str) -> int | None:
    if text is None:
        return None
    if not isinstance(text, str):
        if np.ndim(text) or not np.issubdtype(np.asarray(text).dtype, np.integer):
            raise ValueError(f"{what}={text!r} is not one token: give its text or its id.")
        check_ids(text, language_model.vocab_size, what)
        return int(text)
    ids = language_model.tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise ValueError(f"{what}={text!r} is no token at all; give a text of one token.")
    other = text[1:] if text.startswith(" ") else f" {text}"
    hint = "Take a word that is one token, or its first token."
    if len(language_model.tokenizer.encode(other)) == 1:
        hint = f"But {other!r} is one token: is that meant?"
    raise ValueError(
        f"{what}={text!r} is {len(ids)} tokens: {', '.join(map(repr, _shown(language_model, ids)))}. {hint}"
    )

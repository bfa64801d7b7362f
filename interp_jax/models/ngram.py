"""Unigram and bigram language models: the baselines that say what a transformer's loss is worth.

A loss in nats a token means nothing on its own: it depends on the vocabulary and on the text. Beside the loss of a
model that knows only how frequent tokens are, and of one that also knows the token before, it tells how much the
transformer gets from anything longer.

The bigram model is interpolated Kneser-Ney (Kneser and Ney 1995; the interpolated form of Chen and Goodman 1999), with
c(h, w) how often w follows h, c(h) = sum_w c(h, w), N(w) the number of different tokens that precede w, T(h) the number
of different tokens that follow h, and V tokens in the vocabulary:

    p(w | h)   = max(c(h, w) - D, 0) / c(h)  +  D T(h) / c(h) * p_lower(w)          p_lower(w) for an unseen h
    p_lower(w) = (N(w) + 1) / sum_w' (N(w') + 1)

The lower distribution counts contexts and not occurrences: "Francisco" is frequent, but only ever after "San". The
discount D is chosen by the loss on text that the counts have not seen and the judgement does not use.

Hazard: the table of a bigram model is dense, vocab_size squared in float64; 32 MB at 2048 tokens, 19 GB at 49152.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

__all__ = ["DISCOUNTS", "BigramModel", "UnigramModel", "fit_bigram", "fit_unigram"]

DISCOUNTS = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))
"""Discounts from 0.3 to 0.95 that `fit_bigram` chooses among."""


@dataclasses.dataclass(frozen=True)
class UnigramModel:
    """Every token drawn by itself."""

    log_probs: Float[np.ndarray, " vocab"]
    """Natural log-probability of each token."""

    def loss(self, tokens: Int[np.ndarray, "n context"]) -> float:
        """Mean nats a token over positions 1 and on of every row: the predictions that a transformer's loss counts."""
        return float(-self.log_probs[_checked(tokens, len(self.log_probs))[:, 1:]].mean())


@dataclasses.dataclass(frozen=True)
class BigramModel:
    """Every token drawn given the one before."""

    log_probs: Float[np.ndarray, "vocab vocab"]
    """Natural log-probability of the column's token after the row's."""
    discount: float
    """D of the formula."""

    def loss(self, tokens: Int[np.ndarray, "n context"]) -> float:
        """Mean nats a token over positions 1 and on of every row: the predictions that a transformer's loss counts."""
        tokens = _checked(tokens, len(self.log_probs))
        return float(-self.log_probs[tokens[:, :-1], tokens[:, 1:]].mean())


def fit_unigram(rows: Int[np.ndarray, "n context"], vocab_size: int) -> UnigramModel:
    """Relative frequencies, with one occurrence added to every token so that none is impossible.

    Args:
        rows: Token ids to count.
        vocab_size: How many ids there are.

    Returns:
        The model.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    counts = np.bincount(_checked(rows, vocab_size).ravel(), minlength=vocab_size) + 1.0
    return UnigramModel(np.log(counts / counts.sum()))


def fit_bigram(
    rows: Int[np.ndarray, "n context"],
    vocab_size: int,
    *,
    tuning: Int[np.ndarray, "m context"],
    discounts: Sequence[float] = DISCOUNTS,
) -> BigramModel:
    """Counts pairs within rows and takes the discount with the lowest loss on `tuning`.

    Args:
        rows: Token ids to count.
        vocab_size: How many ids there are.
        tuning: Token ids of other documents, which choose the discount and are not counted.
        discounts: What to choose among, each over 0 and under 1.

    Returns:
        The best model.

    Raises:
        ValueError: An id is outside the vocabulary, or a discount outside (0, 1).
    """
    if not discounts or not all(0 < discount < 1 for discount in discounts):
        raise ValueError(f"Discounts must lie over 0 and under 1, and there must be one; got {list(discounts)}.")
    rows = _checked(rows, vocab_size)
    pair = rows[:, :-1].astype(np.int64) * vocab_size + rows[:, 1:]
    counts = np.bincount(pair.ravel(), minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    candidates = (_kneser_ney(counts, discount) for discount in discounts)
    return min(candidates, key=lambda model: model.loss(tuning))


def _kneser_ney(counts: Int[np.ndarray, "vocab vocab"], discount: float) -> BigramModel:
    seen = counts > 0
    lower = seen.sum(axis=0) + 1.0
    lower /= lower.sum()
    total = counts.sum(axis=1, keepdims=True)
    followers = seen.sum(axis=1, keepdims=True)
    probs = np.maximum(counts - discount, 0) + discount * followers * lower
    probs = np.where(total > 0, probs / np.maximum(total, 1), lower)
    return BigramModel(np.log(probs), discount)


def _checked(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Tokens as they are, or an error: NumPy would take negative ids from the end of the vocabulary."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(
            f"Token ids run from {tokens.min()} to {tokens.max()}; expected ids from 0 to {vocab_size - 1}."
        )
    return tokens

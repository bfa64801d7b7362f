"""The baselines against Counter-based arithmetic and against what a probability must be."""

import itertools
from collections import Counter

import numpy as np
import pytest

from interp_jax.models.ngram import fit_bigram, fit_unigram

VOCAB = 7


@pytest.fixture
def rows():
    # Token 6 never occurs; token 5 only as the last of a row, so nothing is ever seen after it.
    rng = np.random.default_rng(0)
    rows = np.minimum(rng.geometric(0.4, size=(20, 9)) - 1, 4)
    rows[3, -1] = 5
    return rows


@pytest.fixture
def other_rows():
    return np.minimum(np.random.default_rng(1).geometric(0.4, size=(30, 9)) - 1, 4)


def test_unigram_is_the_smoothed_frequency(rows):
    model = fit_unigram(rows, VOCAB)
    counts = Counter(rows.ravel().tolist())
    expected = [np.log((counts[token] + 1) / (rows.size + VOCAB)) for token in range(VOCAB)]
    np.testing.assert_allclose(model.log_probs, expected)
    assert model.loss(rows) == pytest.approx(-np.mean([expected[token] for token in rows[:, 1:].ravel()]))


def test_bigram_equals_the_formula_pair_by_pair(rows):
    model = fit_bigram(rows, VOCAB, tuning=rows[:2], discounts=[0.6])
    pairs = Counter((int(h), int(w)) for row in rows for h, w in itertools.pairwise(row))
    precede = Counter(w for _, w in pairs)
    for h in range(VOCAB):
        after_h = {w: n for (before, w), n in pairs.items() if before == h}
        for w in range(VOCAB):
            expected = (precede[w] + 1) / (len(pairs) + VOCAB)
            if after_h:
                total = sum(after_h.values())
                expected = max(after_h.get(w, 0) - 0.6, 0) / total + 0.6 * len(after_h) / total * expected
            assert model.log_probs[h, w] == pytest.approx(np.log(expected)), (h, w)


def test_every_row_of_the_bigram_is_a_distribution(rows, other_rows):
    model = fit_bigram(rows, VOCAB, tuning=other_rows)
    np.testing.assert_allclose(np.exp(model.log_probs).sum(axis=1), 1.0)
    assert np.isfinite(model.log_probs).all()


def test_the_discount_is_the_best_on_the_tuning_rows(rows, other_rows):
    discounts = [0.1, 0.5, 0.9]
    chosen = fit_bigram(rows, VOCAB, tuning=other_rows, discounts=discounts)
    losses = {d: fit_bigram(rows, VOCAB, tuning=other_rows, discounts=[d]).loss(other_rows) for d in discounts}
    assert chosen.discount == min(losses, key=losses.__getitem__)


def test_a_bigram_recovers_a_markov_chain():
    rng = np.random.default_rng(2)
    chain = rng.dirichlet(np.full(VOCAB, 0.3), size=VOCAB)

    def walk(n_rows):
        rows = np.zeros((n_rows, 50), int)
        for t in range(1, 50):
            rows[:, t] = [rng.choice(VOCAB, p=chain[token]) for token in rows[:, t - 1]]
        return rows

    train, tuning, judged = walk(200), walk(20), walk(100)
    entropy = -np.log(chain[judged[:, :-1], judged[:, 1:]]).mean()
    assert fit_bigram(train, VOCAB, tuning=tuning).loss(judged) == pytest.approx(entropy, abs=0.02)
    assert fit_unigram(train, VOCAB).loss(judged) > entropy + 0.2


def test_ids_outside_the_vocabulary_are_refused(rows):
    with pytest.raises(ValueError, match="ids from 0 to 3"):
        fit_unigram(rows, 4)
    with pytest.raises(ValueError, match="run from -1"):
        fit_unigram(rows, VOCAB).loss(np.array([[0, -1]]))


@pytest.mark.parametrize("discounts", [[], [0.0], [0.5, 1.0]])
def test_discounts_outside_their_range_are_refused(rows, discounts):
    with pytest.raises(ValueError, match="over 0 and under 1"):
        fit_bigram(rows, VOCAB, tuning=rows, discounts=discounts)

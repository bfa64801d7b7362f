import dataclasses
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from two_layer_model import reference_logits

from interp_jax.models.tokenizer import Tokenizer
from interp_jax.steering import from_pair, mean_difference, principal_component
from interp_jax.steering.reading_activations import Read

POSITIVES, NEGATIVES = ["the river", "a stone mill", "water"], ["a king", "the long war", "an army here"]


def by_hand(language_model, ids, layer, site="resid_post"):
    found = {}

    def keep(value, name, at):
        found[at, name] = value
        return value

    reference_logits(language_model.params, ids, keep)
    return found[layer, site]


def begun_by(language_model, id_):
    return dataclasses.replace(
        language_model, tokenizer=Tokenizer(language_model.tokenizer._backend, end_of_text_id=id_)
    )


@pytest.mark.parametrize(("layer", "site"), [(0, "resid_post"), (1, "mlp_act")])
def test_a_pair_position_by_position(language_model, layer, site):
    encode = language_model.tokenizer.encode
    vector = from_pair(language_model, "love", "hate", layer=layer, site=site)
    love, hate = (by_hand(language_model, encode(text), layer, site) for text in ("love", "hate"))
    np.testing.assert_allclose(vector.direction, love - hate, atol=1e-4)
    assert vector.positions == (0, 1, 2, 3)
    assert vector.source == "'love' minus 'hate'"


def test_the_shorter_text_is_filled_up_and_both_begin_as_texts_do(language_model):
    model = begun_by(language_model, 7)
    encode = model.tokenizer.encode
    vector = from_pair(model, "lovely", "hate", layer=1, pad=" ")
    rows = [7, *encode("lovely")], [7, *encode("hate"), *encode("  ")]
    expected = by_hand(model, rows[0], 1) - by_hand(model, rows[1], 1)
    np.testing.assert_allclose(vector.direction, expected[1:], atol=1e-4)
    assert vector.positions == (1, 2, 3, 4, 5, 6)
    some = from_pair(model, "lovely", "hate", layer=1, pad=" ", positions=(2, -1))
    np.testing.assert_allclose(some.direction, expected[[2, 6]], atol=1e-4)
    assert some.positions == (2, 6)


def test_a_mean_difference(language_model):
    model = begun_by(language_model, 7)
    encode = model.tokenizer.encode

    def mean(texts: list[str], read):
        return np.mean([read(by_hand(model, [7, *encode(text)], 1)[1:]) for text in texts], axis=0)

    reads: dict[Read, Any] = {"mean": lambda rows: rows.mean(axis=0), "last": lambda rows: rows[-1]}
    for name, read in reads.items():
        vector = mean_difference(model, POSITIVES, NEGATIVES[:2], layer=1, read=name)
        np.testing.assert_allclose(vector.direction, mean(POSITIVES, read) - mean(NEGATIVES[:2], read), atol=1e-4)
        assert vector.positions == "all"


def test_a_principal_component_is_scikit_learn_s(language_model):
    encode = language_model.tokenizer.encode
    pairs = zip(POSITIVES, NEGATIVES, strict=True)
    differences = np.stack(
        [by_hand(language_model, encode(a), 0)[-1] - by_hand(language_model, encode(b), 0)[-1] for a, b in pairs]
    )
    expected = TruncatedSVD(1, algorithm="arpack").fit(differences).components_[0]  # pyright: ignore[reportOptionalSubscript]
    vector = principal_component(language_model, POSITIVES, NEGATIVES, layer=0)
    assert abs(expected @ vector.direction) / vector.norm == pytest.approx(1, abs=1e-4)
    assert (differences @ vector.direction).sum() > 0
    assert vector.norm == pytest.approx(np.sqrt(np.mean((differences @ expected) ** 2)), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: from_pair(m, "lovely", "hate", layer=0), r"6 and 4 tokens: \['l', 'o'.*pad=' '"),
        (lambda m: from_pair(m, "lovely", "hate", layer=0, pad="ab"), "pad='ab' is 2 tokens"),
        (lambda m: from_pair(m, "love", "hate", layer=0, positions=(4,)), r"not all in the texts, which have 4 tokens"),
        (lambda m: from_pair(m, "love", "hate", layer=0, positions=(1, -3)), "name a token of the texts' 4 twice"),
        (lambda m: from_pair(m, "", "hate", layer=0, pad=" "), "no token to continue from"),
        (lambda m: from_pair(m, "love", "hate", layer=2), "no layer 2"),
        (lambda m: from_pair(m, "love", "hate", layer=0, site="resid_pst"), "did you mean 'resid_post'"),
        (lambda m: mean_difference(m, [], ["a"], layer=0), "at least one text"),
        (lambda m: mean_difference(m, ["a" * 60], ["a"], layer=0), "60 tokens, and two-layer model was made for 48"),
        (lambda m: principal_component(m, ["a", "b"], ["a"], layer=0), "2 positive and 1 negative texts make no pairs"),
        (lambda m: principal_component(m, ["a"], ["a"], layer=0), "equal activations"),
    ],
)
def test_bad_input(language_model, make, message):
    with pytest.raises(ValueError, match=message):
        make(language_model)

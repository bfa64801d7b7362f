import dataclasses

import jax
import numpy as np
import pytest
from test_contrast import by_hand

from interp_jax.sae import ReLUSAE
from interp_jax.steering import SteeringVector, Vocabulary, from_pair, mean_difference
from interp_jax.steering.study import BUILT_IN, Concept, Strengths, methods_of, run_method

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

FILE = """
positive = "love"
negative = "hat"
pad = " "
prompts = ["Oak piles", "The river"]
positives = ["a lovely day", "love"]
negatives = ["a cold day", "hate"]
vocabulary = ["lov*"]
"""


@pytest.fixture
def concept(tmp_path):
    (tmp_path / "love.toml").write_text(FILE)
    return Concept.load(tmp_path / "love.toml")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(97, 123, size=(4, 20)).astype(np.int32)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_comes_with_the_package_is_whole(name):
    concept = Concept.load(name)
    assert concept.name == name
    assert len(concept.positives) == len(concept.negatives) >= 8
    assert not any(concept.judge(text) for text in concept.prompts)
    assert isinstance(concept.judge, Vocabulary)
    assert "written by hand" in concept.judge.provenance


def test_every_way_is_there_and_as_long_as_activations_are(concept, language_model, tokens):
    sae = ReLUSAE.random(16, 40, key=jax.random.key(1))
    methods = {m.name: m for m in methods_of(concept, language_model, sae, tokens, layer=0, usual_norm=5.0)}
    for method in methods.values():
        if isinstance(method.edit, SteeringVector):
            assert np.linalg.norm(method.edit.rows, axis=1).mean() == pytest.approx(5.0, rel=1e-4)
            assert method.adds_once == (method.edit.positions != "all")
    pair = from_pair(language_model, "love", "hat", pad=" ", layer=0)
    assert methods["difference of the pair"].edit.cosine(pair) == pytest.approx(1, abs=1e-5)
    mean = mean_difference(language_model, concept.positives, concept.negatives, layer=0)
    assert methods["mean difference"].edit.cosine(mean) == pytest.approx(1, abs=1e-5)
    assert {"SAE(positive) - SAE(negative)", "its 6 largest parts", "gradient pursuit of the difference"} <= set(
        methods
    )
    assert any(name.endswith("clamped") for name in methods)
    assert [m.name for m in methods_of(concept, language_model, None, tokens, layer=0, usual_norm=5.0)] == [
        "difference of the pair", "the same without its padding", "mean difference", "principal component",
    ]  # fmt: skip


def test_the_padding_is_projected_out(concept, language_model, tokens):
    methods = {m.name: m for m in methods_of(concept, language_model, None, tokens, layer=0, usual_norm=5.0)}
    encode = language_model.tokenizer.encode
    space = by_hand(language_model, encode("hat "), 0)[-1]
    space -= np.concatenate([by_hand(language_model, row, 0) for row in tokens]).mean(axis=0)
    pair = from_pair(language_model, "love", "hat", pad=" ", layer=0)
    assert np.abs(pair.direction @ space).max() > 1
    left = methods["the same without its padding"].edit
    assert left.cosine(pair.without(space)) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(left.direction @ space / np.linalg.norm(space), 0, atol=1e-3)
    even = dataclasses.replace(concept, negative="hate")
    names = [m.name for m in methods_of(even, language_model, None, tokens, layer=0, usual_norm=5.0)]
    assert "the same without its padding" not in names


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": ("The river", "Oak")}, r"has 4 tokens: .* The prompt 'Oak' has only 3\. Give longer prompts"),
        ({"positives": ("a", "b", "c")}, "love has 3 positives and 2 negatives"),
        ({"pad": None}, "4 and 3 tokens"),
    ],
)
def test_what_would_fail_later_is_told_first(concept, language_model, changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(concept, **changed).check(language_model)


def test_strength_zero_is_the_same_model_whatever_the_way(concept, language_model, tokens):
    sae = ReLUSAE.random(16, 40, key=jax.random.key(1))
    results = [
        run_method(
            method, concept, language_model, sae, tokens, strengths=Strengths((0.0, 2.0), (0.0, 2.0)), n_seeds=2,
            key=jax.random.key(0), max_new_tokens=4,
        )
        for method in methods_of(concept, language_model, sae, tokens, layer=1, usual_norm=5.0)
        if method.name in ("difference of the pair", "principal component", "gradient pursuit of the difference")
    ]  # fmt: skip
    assert len({result.rollouts.texts[0] for result in results}) == 1
    losses = [result.points[0].loss for result in results]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    for result in results:
        assert [p.loss for p in result.points] == pytest.approx(result.losses.mean(axis=1).tolist())
    assert results[2].reading is not None
    assert results[2].reading.rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("positive = 3 = 4", "is no TOML"),
        (FILE.replace("negatives", "others"), "has no entry 'negatives'"),
        (FILE.replace('["lov*"]', "[]"), r"vocabulary of .* is \[\]; expected a list of at least one text"),
        (FILE.replace('["lov*"]', '"lov*"'), r"vocabulary of .* is 'lov\*'; expected a list"),
        (FILE.replace('"hat"', "3"), "negative of .* is 3; expected a text"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, message):
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Concept.load(tmp_path / "study.toml")
    with pytest.raises(ValueError, match="There is no study joy; expected anger, wedding or a TOML file"):
        Concept.load("joy")

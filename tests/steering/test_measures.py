"""Rollouts, losses and frontiers against the same numbers worked out by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from two_layer_model import reference_logits

from interp_jax.steering import (
    Rollouts,
    SteeringVector,
    Vocabulary,
    add_vector,
    frontier,
    roll_out,
    steered_forward,
    steered_losses,
)
from interp_jax.steering.frontier import is_pareto

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

DIRECTION = np.asarray(jax.random.normal(jax.random.key(5), (16,)))
PROMPTS = ["The town where", "Oak"]


def test_a_word_of_a_list_counts_whole_and_in_any_case():
    words = Vocabulary.of(["wed", "marri*", "best man"])
    assert [text for text in ("They WED.", "Married!", "the best man", "a wed") if words(text)] == [
        "They WED.", "Married!", "the best man", "a wed",
    ]  # fmt: skip
    assert not any(words(text) for text in ("wedge", "remarried", "best mane", "", "Wedding"))


def test_a_list_from_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("# of mills\nmill*\n\n water # wet\n")
    words = Vocabulary.from_file(tmp_path / "words.txt")
    assert words.words == ("mill*", "water")
    assert words.provenance.endswith("words.txt")
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"none\.txt has 0 words"):
        Vocabulary.from_file(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="none may be blank"):
        Vocabulary.of(["*"])
    with pytest.raises(ValueError, match="'mill' is one text; give a list of words"):
        Vocabulary.of("mill")


def test_rollouts_are_sampled_from_the_steered_model(language_model):
    n, prompt = 1500, "Oak"
    ids = language_model.tokenizer.encode(prompt)
    rollouts = roll_out(
        language_model, prompt, SteeringVector(DIRECTION, 1), coefficients=(0.0, 2.0), n_seeds=n, max_new_tokens=1,
        key=jax.random.key(0), temperature=2.0, batch_rows=400,
    )  # fmt: skip
    for coefficient, row in zip(rollouts.coefficients, rollouts.texts, strict=True):

        def edit(value, name, layer, coefficient=coefficient):
            return value + coefficient * DIRECTION if (layer, name) == (1, "resid_post") else value

        logits = reference_logits(language_model.params, ids, edit)[-1] / 2.0
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        tokens = np.asarray([language_model.tokenizer.encode(text)[0] for text in row[0] if text.isascii() and text])
        # Bytes that are no character of their own decode to a sign that stands for all of them.
        likely = [int(i) for i in np.flatnonzero(probabilities * n > 5) if chr(i).isascii()]
        counts = np.asarray([(tokens == i).sum() for i in likely])
        observed, expected = np.append(counts, n - counts.sum()), probabilities[likely] * n
        assert stats.chisquare(observed, np.append(expected, n - expected.sum())).pvalue > 1e-3


def test_a_seed_has_the_same_luck_at_every_strength_and_in_every_batch(language_model):
    def rollouts(batch_rows, coefficients=(0.0, 1.0, 0.0)):
        return roll_out(
            language_model, PROMPTS, SteeringVector(DIRECTION, 1), coefficients=coefficients, n_seeds=3,
            key=jax.random.key(4), max_new_tokens=5, batch_rows=batch_rows,
        )  # fmt: skip

    whole = rollouts(128)
    assert whole.texts[0] == whole.texts[2] != whole.texts[1]
    assert rollouts(4).texts == whole.texts
    assert rollouts(128, (1.0,)).texts[0] == whole.texts[1]
    assert len({text for of_prompt in whole.texts[0] for text in of_prompt}) == 6


def test_a_sweep_compiles_once(language_model):
    traced = []

    def forward(params, tokens):
        traced.append(tokens.shape)
        return language_model.forward(params, tokens)

    model = dataclasses.replace(language_model, forward=forward)
    for scale in (1.0, 2.0):
        vector = SteeringVector(scale * DIRECTION, 1)
        roll_out(
            model, PROMPTS, vector, coefficients=(0.0, scale, 5.0), n_seeds=3, key=jax.random.key(0),
            max_new_tokens=4, batch_rows=7,
        )  # fmt: skip
        steered_losses(model, np.ones((5, 12), np.int32), vector, coefficients=(0.0, scale), n_prompt=4, batch_rows=2)
    # Once to find the sites and once to compile, of each of the two programs.
    assert len(traced) <= 4


def test_rollouts_survive_the_disk(tmp_path):
    rollouts = Rollouts(("a", "b"), (0.0, 2.0), ((("x ☃",), ("y",)), (("<b>",), ("",))))
    rollouts.save(tmp_path / "rollouts.json")
    assert Rollouts.load(tmp_path / "rollouts.json") == rollouts
    assert json.loads((tmp_path / "rollouts.json").read_text())["texts"][1][0] == ["<b>"]
    np.testing.assert_array_equal(rollouts.successes(lambda text: "b" in text), [[False, False], [True, False]])
    (tmp_path / "other.json").write_text('{"prompts": []}')
    with pytest.raises(ValueError, match=r"other\.json holds no rollouts: KeyError\('texts'\)"):
        Rollouts.load(tmp_path / "other.json")


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_losses_are_those_of_the_model_written_by_hand(language_model, positions):
    tokens = np.random.default_rng(0).integers(97, 123, size=(5, 14)).astype(np.int32)
    n_prompt, coefficients = 6, (0.0, 1.5)
    where = {"all": slice(None), "prompt": slice(None, n_prompt), "generated": slice(n_prompt, None)}[positions]
    expected = []
    for coefficient in coefficients:

        def edit(value, name, layer, coefficient=coefficient):
            if (layer, name) == (0, "resid_post"):
                value[where] += coefficient * DIRECTION
            return value

        losses = []
        for row in tokens:
            logits = reference_logits(language_model.params, row, edit)[:-1]
            log_probabilities = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            log_probabilities -= logits.max(1, keepdims=True)
            losses.append(-log_probabilities[np.arange(13), row[1:]][n_prompt:].mean())
        expected.append(losses)
    vector = SteeringVector(DIRECTION, 0, positions=positions)
    done = []
    found = steered_losses(
        language_model, tokens, vector, coefficients=coefficients, n_prompt=n_prompt, batch_rows=2, advance=done.append
    )
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert sum(done) == 2 * tokens.size


def test_a_frontier_by_hand():
    success, loss = np.array([0.0, 0.5, 0.5, 0.4, 1.0]), np.array([3.0, 3.2, 3.1, 3.05, 9.0])
    assert is_pareto(success, loss).tolist() == [True, False, True, True, True]
    assert is_pareto(np.array([0.5, 0.5]), np.array([1.0, 1.0])).tolist() == [True, True]


def test_intervals_are_scipy_s():
    rng = np.random.default_rng(0)
    successes, losses = rng.random((3, 40)) < 0.3, rng.normal(3, 1, (3, 30))
    # The tolerance is that of two draws of the bootstrap.
    points = frontier("one", (0.0, 1.0, 2.0), successes, losses, n_resamples=9999)
    for point, hits, row in zip(points, successes, losses, strict=True):
        assert point.success == pytest.approx(hits.mean())
        assert point.loss == pytest.approx(row.mean())
        reference = stats.bootstrap((row,), np.mean, method="percentile", rng=np.random.default_rng(1))
        assert point.loss_interval == pytest.approx(tuple(reference.confidence_interval), abs=0.03)
        reference = stats.bootstrap((hits.astype(float),), np.mean, method="percentile", rng=np.random.default_rng(1))
        assert point.success_interval == pytest.approx(tuple(reference.confidence_interval), abs=0.03)


def test_bad_input(language_model):
    tokens, vector = np.ones((2, 8), np.int32), SteeringVector(DIRECTION, 1)
    with pytest.raises(ValueError, match="nothing to predict after a prompt of 7"):
        steered_losses(language_model, tokens, vector, coefficients=(1.0,), n_prompt=7)
    with pytest.raises(ValueError, match=r"tokens\[\d+, \d+\] is 10000; the model's tokens are 0 to \d+\."):
        steered_losses(
            language_model, np.where(np.arange(8) < 7, tokens, 10_000), vector, coefficients=(1.0,), n_prompt=2
        )
    with pytest.raises(FloatingPointError, match=r"coefficient 3e\+38"):
        steered_losses(language_model, tokens, SteeringVector(DIRECTION, 0), coefficients=(3e38,), n_prompt=2)
    # The square of what is added overflows, so the norm makes nothing of everything: a loss that is finite, and wrong.
    with pytest.raises(FloatingPointError, match=r"coefficient 1e\+20.*the square of its length overflows"):
        steered_losses(language_model, tokens, vector, coefficients=(1.0, 1e20), n_prompt=2)
    with pytest.raises(FloatingPointError, match=r"coefficient 1e\+20"):
        roll_out(language_model, PROMPTS, vector, coefficients=(1e20,), n_seeds=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"give key=jax\.random\.key\(seed\)"):
        roll_out(language_model, PROMPTS, vector, coefficients=(1.0,), n_seeds=3, key=None)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and losses \(2, 4\) for 3 coefficients"):
        frontier("one", (0.0, 1.0, 2.0), np.ones((2, 3), bool), np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least one rollout"):
        frontier("one", (0.0,), np.ones((1, 0), bool), np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"losses of the coefficients \[2.0\] are not all finite"):
        frontier("one", (0.0, 2.0), np.ones((2, 3), bool), np.array([[1.0, 1.0], [1.0, np.nan]]))
    with pytest.raises(ValueError, match="nothing to sample"):
        roll_out(language_model, [], vector, coefficients=(1.0,), n_seeds=3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="outside the prompt, which has 3 tokens"):
        roll_out(
            language_model, PROMPTS, SteeringVector(DIRECTION, 1, positions=(5,)), coefficients=(1.0,), n_seeds=1,
            key=jax.random.key(0),
        )  # fmt: skip
    edit = (add_vector(SteeringVector(np.ones(7), 1)),)
    with pytest.raises(ValueError, match="7 entries"):
        steered_forward(language_model.forward)(language_model.params, jnp.asarray(tokens), edit)

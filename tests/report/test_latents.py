import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from interp_jax.activations.top_windows import top_windows
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.promoted_tokens import promoted_tokens
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.report import choose_latents, latent_dashboards

VOCAB, D_MODEL = 11, 4


W_U = np.random.default_rng(0).normal(size=(D_MODEL, VOCAB)).astype(np.float32)
W_U[:, -1] = 100.0  # the padded id has enormous logits, and must never be shown


def letters() -> Tokenizer:
    """Id i is the i-th letter of the alphabet; the model's vocabulary has one id more."""
    return Tokenizer(tokenizers.Tokenizer(models.BPE(vocab={chr(97 + i): i for i in range(VOCAB - 1)}, merges=[])))


@pytest.fixture
def language_model():
    return LanguageModel(
        name="letters",
        forward=lambda params, tokens: jnp.zeros((*tokens.shape, VOCAB)),
        params=jnp.asarray(W_U),
        tokenizer=letters(),
        n_layers=1,
        d_model=D_MODEL,
        vocab_size=VOCAB,
        context=9,
        unembed=lambda params, directions: directions @ params,
    )


def test_windows_stand_around_the_highest_peak_of_each_row():
    activations = np.zeros((5, 9), np.float32)
    activations[0, 4], activations[0, 8] = 3.0, 2.9  # the second peak of a row is not shown
    activations[1, 0] = 5.0
    activations[3, 8] = 4.0
    activations[4, 2] = activations[4, 6] = 1.0
    assert top_windows(activations, count=10, before=2, after=1) == [
        (1, 0, 2, 0),
        (3, 6, 9, 8),
        (0, 2, 6, 4),
        (4, 0, 4, 2),
    ]
    assert [window[0] for window in top_windows(activations, count=2)] == [1, 3]


def test_no_windows_where_nothing_is_active():
    assert top_windows(np.zeros((3, 4))) == []
    assert top_windows(np.zeros((0, 4))) == []


def test_promoted_tokens_are_those_of_the_sorted_logits(language_model):
    directions = np.random.default_rng(1).normal(size=(3, D_MODEL)).astype(np.float32)
    found = promoted_tokens(language_model, directions, count=4)
    for direction, (promoted, suppressed) in zip(directions, found, strict=True):
        logits = sorted(((float(direction @ W_U[:, i]), chr(97 + i)) for i in range(VOCAB - 1)), reverse=True)
        assert [t.token for t in promoted] == [token for _, token in logits[:4]]
        assert [t.token for t in suppressed] == [token for _, token in logits[::-1][:4]]
        np.testing.assert_allclose([t.logit for t in promoted], [logit for logit, _ in logits[:4]], rtol=1e-4)


def test_dashboards_join_tokens_and_activations(language_model):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCAB - 1, (6, 9))
    activations = np.maximum(rng.normal(size=(6, 9, 2)), 0).astype(np.float32)
    activations[..., 1] = 0.0
    directions = rng.normal(size=(2, D_MODEL)).astype(np.float32)
    alive, dead = latent_dashboards(
        language_model, tokens, activations, [40, 7], directions, snippets=3, before=2, after=2
    )
    assert (alive.latent, dead.latent) == (40, 7)
    assert alive.density == pytest.approx((activations[..., 0] > 0).mean())
    assert alive.max_activation == pytest.approx(activations[..., 0].max())
    assert len(alive.snippets) == 3
    peaks = [snippet.activations[snippet.peak] for snippet in alive.snippets]
    assert peaks == pytest.approx(sorted(activations[..., 0].max(axis=1), reverse=True)[:3])
    text = ["".join(chr(97 + i) for i in row) for row in tokens]
    for snippet in alive.snippets:
        assert len(snippet.tokens) == len(snippet.activations) <= 5
        (row,) = (r for r in range(6) if activations[r, :, 0].max() == np.float32(snippet.activations[snippet.peak]))
        start = int(activations[row, :, 0].argmax()) - snippet.peak
        assert "".join(snippet.tokens) == text[row][start : start + len(snippet.tokens)]
        np.testing.assert_array_equal(
            np.float32(snippet.activations), activations[row, start : start + len(snippet.tokens), 0]
        )
    assert (dead.density, dead.max_activation, dead.snippets) == (0.0, 0.0, ())
    assert len(dead.promoted) == len(dead.suppressed) == 10


def test_shapes_that_do_not_fit(language_model):
    # A TypeError where the annotations are checked, as they are in these tests.
    with pytest.raises((TypeError, ValueError), match="activations"):
        latent_dashboards(
            language_model, np.zeros((2, 9), int), np.zeros((2, 8, 2)), [1, 2], np.zeros((2, D_MODEL), np.float32)
        )


def test_latents_are_drawn_from_those_that_are_alive_and_sparse():
    densities = np.array([0.0, 0.5, 0.01, 0.02, 0.0, 0.1, 0.03])
    assert set(choose_latents(densities, 10)) == {2, 3, 5, 6}
    chosen = choose_latents(densities, 2, seed=1)
    assert len(chosen) == 2
    assert list(chosen) == sorted(chosen)
    np.testing.assert_array_equal(chosen, choose_latents(densities, 2, seed=1))
    drawn = {int(i) for seed in range(50) for i in choose_latents(densities, 1, seed=seed)}
    assert drawn == {2, 3, 5, 6}

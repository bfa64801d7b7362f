"""Similarity to a truncated context, against the same by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import all_sites, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.truncated_context import truncated_context_similarity

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def by_hand(whole, short):
    whole, short = whole - whole.mean(0), short - short.mean(0)
    return (whole * short).sum(-1) / np.linalg.norm(whole, axis=-1) / np.linalg.norm(short, axis=-1)


@pytest.mark.usefixtures("without_type_checks")
def test_similarities_by_hand():
    model, tokens = small_model(), small_tokens(batch=6)
    found = truncated_context_similarity(model, tokens, [3, 7])
    assert found.similarity.shape == (2, 2, 6)
    whole = all_sites(model, tokens)
    short = all_sites(model, tokens[:, -3:])
    for layer in range(2):
        expected = by_hand(whole[layer, "resid_post"][:, -1], short[layer, "resid_post"][:, -1])
        np.testing.assert_allclose(found.similarity[0, layer], expected, atol=1e-4)
    np.testing.assert_allclose(found.similarity[1], 1, atol=1e-5)
    np.testing.assert_allclose(found.mean, found.similarity.mean(-1))
    assert found.standard_error.shape == (2, 2)
    assert len(found.table().splitlines()) == 3
    of_one = truncated_context_similarity(model, tokens, [3], layers=np.int64(1))
    assert of_one.layers == (1,)
    assert of_one.table().splitlines()[1].split() == ["1", f"{found.mean[0, 1]:.3f}"]


def test_more_context_is_more_alike_in_a_trained_model():
    tiny = ij.load("tiny")
    text = tiny.tokenizer.encode("The history of the city begins in the early years of the empire. " * 12)
    rows = jnp.asarray(np.lib.stride_tricks.sliding_window_view(np.asarray(text), 24)[:40])
    mean = truncated_context_similarity(tiny, rows, [1, 4, 12]).mean
    assert (np.diff(mean, axis=0) > 0).all()  # in every layer
    assert mean[0, 0] > mean[0, 3]  # the first layer is the most local


def test_bad_input_is_told():
    model, tokens = small_model(), small_tokens(batch=4)
    with pytest.raises(ValueError, match="2 texts; the mean over texts is subtracted"):
        truncated_context_similarity(model, tokens[:2])
    with pytest.raises(ValueError, match=r"lengths=\(1, 8\); the texts have 7 tokens"):
        truncated_context_similarity(model, tokens, [1, 8])

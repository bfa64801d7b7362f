"""The logit lens, against the model's own logits and the final norm and unembedding by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import all_sites, foreign, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.logit_lens import logit_lens
from interp_jax.models.transformer import named_parameters

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


@pytest.mark.parametrize(
    ("family", "is_known"),
    [
        ("gpt2", True),
        pytest.param("gemma", True, marks=pytest.mark.slow),
        pytest.param("gpt2", False, marks=pytest.mark.slow),
        ("gemma", False),
    ],
)
def test_the_last_layer_is_the_models_own_prediction(family, is_known):
    model, tokens = small_model(family), small_tokens()
    probabilities = jax.nn.softmax(all_sites(model, tokens)[None, "logits"])
    lens = logit_lens(model if is_known else foreign(model), tokens, top=23, target=[3, 4])
    assert lens.layers == (0, 1)
    np.testing.assert_allclose(lens.kl[1], 0, atol=1e-5)
    assert lens.kl[0].min() > 1e-3
    expected = np.take_along_axis(probabilities, lens.top_tokens[1], axis=-1)
    np.testing.assert_allclose(lens.top_probabilities[1], expected, atol=1e-5)
    assert (np.diff(lens.top_probabilities, axis=-1) <= 0).all()
    of_target = np.asarray(probabilities)[[0, 1], :, [3, 4]]
    np.testing.assert_allclose(lens.target_probability[1], of_target, atol=1e-5)
    np.testing.assert_array_equal(lens.target_rank[1], (probabilities > of_target[..., None] + 1e-7).sum(-1))


def test_an_earlier_layer_by_hand():
    model, tokens = small_model("gpt2"), small_tokens()
    p = {name: np.asarray(value, np.float64) for name, value in named_parameters(model.params).items()}
    stream = np.asarray(all_sites(model, tokens)[0, "resid_mid"], np.float64)
    centred = stream - stream.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["final_norm.scale"]
    logits = (normed + p["final_norm.bias"]) @ p["W_embed"].T
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    lens = logit_lens(model, tokens, site="resid_mid", layers=0, top=1)
    assert lens.layers == (0,)
    assert lens.target_rank is None
    np.testing.assert_allclose(lens.top_probabilities[0, ..., 0], probabilities.max(-1), atol=1e-4)
    np.testing.assert_array_equal(lens.top_tokens[0, ..., 0], probabilities.argmax(-1))
    final = np.asarray(jax.nn.log_softmax(all_sites(model, tokens)[None, "logits"]))
    expected = (np.exp(final) * (final - np.log(probabilities))).sum(-1)
    np.testing.assert_allclose(lens.kl[0], expected, atol=1e-4)


def test_tables():
    tiny = ij.load("tiny")
    tokens = jnp.array([tiny.encode_prompt("The city is one")])
    lens = logit_lens(tiny, tokens, top=2, target=11)
    word = tiny.tokenizer.readable([int(lens.top_tokens[3, 0, -1, 0])])[0]
    lines = lens.table(position=-1).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:3] == ["layer", "KL", "rank"]
    assert lines[1].split()[:3] == ["3", "0.000", str(lens.target_rank[3, 0, -1])]
    assert repr(word) in lines[1]
    whole = lens.table().splitlines()
    assert str(lens) == lens.table()
    assert whole[0].split()[0] == "layer"
    assert whole[1].rstrip().endswith(word)


def test_bad_input_is_told():
    model, tokens = small_model(), small_tokens()
    for message, options in [
        (r"'q' is none of them", {"site": "q"}),
        (r"top=24; it must be 1 to 23", {"top": 24}),
        (r"target is 23; the model's tokens are 0 to 22", {"target": 23}),
    ]:
        with pytest.raises(ValueError, match=message):
            logit_lens(model, tokens, **options)
    with pytest.raises(ij.SiteError, match="layer 5"):
        logit_lens(model, tokens, layers=5)

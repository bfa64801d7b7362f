"""Splices against the same forward pass written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.activations.splice import mean_loss, splice
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer

VOCAB, D = 11, 6


def forward(params, tokens):
    x = params["embed"][tokens]
    x = ij.site(jnp.tanh(x @ params["w"]), "resid_post", layer=0)
    return x @ params["embed"].T


def make_model():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"embed": jax.random.normal(keys[0], (VOCAB, D)), "w": jax.random.normal(keys[1], (D, D))}
    return LanguageModel(
        name="toy",
        forward=forward,
        params=params,
        tokenizer=Tokenizer.__new__(Tokenizer),  # text is not touched here
        n_layers=1,
        d_model=D,
        vocab_size=VOCAB,
        context=8,
        unembed=lambda params, directions: directions @ params["embed"].T,
    )


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 8), dtype=np.int32)


def by_hand(params, replace):
    x = np.tanh(np.asarray(params["embed"], np.float64)[TOKENS] @ np.asarray(params["w"], np.float64))
    x = np.concatenate([x[:, :1], replace(x)[:, 1:]], axis=1)
    logits = x @ np.asarray(params["embed"], np.float64).T
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probabilities[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    return losses[:, 1:].mean()


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_losses_clean_and_spliced(factor):
    model = make_model()
    seen = []
    spliced = mean_loss(
        model,
        TOKENS,
        lambda value, factor: value * factor,
        jnp.float32(factor),
        layer=0,
        batch_size=2,
        advance=seen.append,
    )
    np.testing.assert_allclose(spliced, by_hand(model.params, lambda x: x * factor), rtol=1e-5)
    assert seen == [16, 16]
    if factor == 1.0:
        np.testing.assert_allclose(mean_loss(model, TOKENS, batch_size=2), spliced, rtol=1e-6)


def test_the_first_position_is_left_alone():
    model = make_model()
    clean = forward(model.params, TOKENS)
    zeroed = splice(forward, jnp.zeros_like, site="resid_post", layer=0)(model.params, jnp.asarray(TOKENS))
    np.testing.assert_array_equal(zeroed[:, 0], clean[:, 0])
    assert not np.any(zeroed[:, 1:])


def test_activations_of_a_huge_norm_are_left_alone():
    model = make_model()
    params = model.params | {"embed": model.params["embed"].at[3].multiply(100.0)}
    limit = 2.3

    def linear(params, tokens):
        x = ij.site(params["embed"][tokens], "resid_post", layer=0)
        return x @ params["w"]

    tokens = jnp.asarray(TOKENS)
    out = splice(linear, jnp.zeros_like, site="resid_post", layer=0, keep_above=limit)(params, tokens)
    norms = np.linalg.norm(np.asarray(params["embed"])[TOKENS], axis=-1)
    kept = norms > limit
    kept[:, 0] = True
    assert 0 < kept[:, 1:].sum() < kept[:, 1:].size
    np.testing.assert_array_equal(np.any(np.asarray(out) != 0, axis=-1), kept)


def test_values_of_heads_are_replaced_as_one_vector_a_position():
    def headed(params, tokens):
        heads = (params["embed"][tokens] @ params["w"]).reshape(*tokens.shape, 2, D // 2)
        return ij.site(heads, "attn_heads", layer=0)

    model = make_model()
    before = np.asarray(headed(model.params, TOKENS))
    limit = float(np.median(np.linalg.norm(before.reshape(*TOKENS.shape, D), axis=-1)))
    spliced = splice(headed, lambda value: value[..., ::-1], site="attn_heads", layer=0, keep_above=limit)
    after = np.asarray(spliced(model.params, jnp.asarray(TOKENS)))
    flat = before.reshape(*TOKENS.shape, D)
    kept = np.linalg.norm(flat, axis=-1) > limit
    kept[:, 0] = True
    expected = np.where(kept[..., None], flat, flat[..., ::-1]).reshape(before.shape)
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_mistakes():
    model = make_model()
    with pytest.raises(ValueError, match="4 rows do not fill a batch of 8"):
        mean_loss(model, TOKENS)
    with pytest.raises(ij.SiteError, match="no site stands in layer 3"):
        mean_loss(model, TOKENS, jnp.zeros_like, layer=3, batch_size=2)

    def pooled(params, tokens):
        return ij.site(params["embed"][tokens].mean(axis=1), "pooled", layer=0)

    with pytest.raises(ValueError, match=r"site 'pooled' has shape \(4, 6\) for tokens of shape \(4, 8\)"):
        splice(pooled, jnp.zeros_like, site="pooled", layer=0)(model.params, jnp.asarray(TOKENS))

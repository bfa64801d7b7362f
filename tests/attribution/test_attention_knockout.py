"""Attention knockout, against an attention written by hand with the entries masked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import all_sites, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.attention_knockout import Knockout, attention_knockout, attention_patterns, knocked_out
from interp_jax.attribution.direct_logit_attribution import direct_logit_attribution
from interp_jax.attribution.latent_nodes import with_latents
from interp_jax.attribution.logit_lens import logit_lens
from interp_jax.models import transformer
from interp_jax.models.transformer import stacked
from interp_jax.sae import ReLUSAE

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


@jax.jit
def masked_before_the_softmax(params, tokens, masks):
    """The model with edges cut the other way: their logits are far below all others."""
    for layer, _, value in (running := ij.iterate(transformer.apply, sites="attn_logits")(params, tokens)):
        running.modified_value = jnp.where(masks[layer], -1e30, value)
    return running.retval


@jax.jit
def with_zeroed_probabilities(params, tokens, masks):
    for layer, _, value in (running := ij.iterate(transformer.apply, sites="attn_probs")(params, tokens)):
        running.modified_value = jnp.where(masks[layer], 0.0, value)
    return running.retval


def mask(layers, heads, queries, keys):
    masks = np.zeros((2, 4, 7, 7), bool)
    masks[np.ix_(layers, heads, queries, keys)] = True
    return masks


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma", marks=pytest.mark.slow)])
def test_a_knockout_is_a_mask_before_the_softmax(family):
    model, tokens = small_model(family), small_tokens()
    masks = mask([1], [0, 2], [6, 4], [1, 2])
    logits = attention_knockout(model, tokens, Knockout([-1, 4], [1, 2], layers=1, heads=[0, 2]))
    np.testing.assert_allclose(logits, masked_before_the_softmax(model.params, tokens, masks), atol=2e-5)
    clean = all_sites(model, tokens)[None, "logits"]
    assert np.abs(logits - clean)[:, 6].max() > 1e-3
    np.testing.assert_allclose(logits[:, [0, 1, 2, 3, 5]], clean[:, [0, 1, 2, 3, 5]], atol=1e-5)


@pytest.mark.slow
def test_several_at_once_without_renormalising_in_stacked_layers():
    model, tokens = small_model(), small_tokens()
    model = dataclasses.replace(model, params=stacked(model.params))
    masks = mask([0, 1], [0, 1, 2, 3], [5], [0]) | mask([0], [3], range(7), [2])
    cuts = [Knockout(5, 0), Knockout(None, 2, layers=[0], heads=3)]
    logits = attention_knockout(model, tokens, cuts, renormalise=False)
    np.testing.assert_allclose(logits, with_zeroed_probabilities(model.params, tokens, masks), atol=2e-5)


@pytest.mark.slow
def test_a_query_with_nothing_left_attends_to_nothing():
    model, tokens = small_model(), small_tokens()
    cut = knocked_out(model, 7, Knockout(3, None, layers=0))
    at = jax.tree.map(np.asarray, jax.jit(ij.fetch(cut.forward, ["attn_heads", "attn_out"]))(cut.params, tokens)[1])
    clean = all_sites(model, tokens)
    np.testing.assert_array_equal(at[0, "attn_heads"][:, 3], 0)
    np.testing.assert_array_equal(at[0, "attn_out"][:, 3], 0)
    others = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(at[0, "attn_heads"][:, others], clean[0, "attn_heads"][:, others], atol=1e-5)


def test_a_model_with_a_knockout_goes_where_a_model_does():
    model, tokens = small_model(), small_tokens()
    cut = knocked_out(model, 7, Knockout(-1, [0, 1, 2]))
    lens = logit_lens(cut, tokens, top=23)
    np.testing.assert_allclose(lens.kl[1], 0, atol=1e-5)
    logits = attention_knockout(model, tokens, Knockout(-1, [0, 1, 2]))
    np.testing.assert_array_equal(lens.top_tokens[1, :, -1, 0], logits[:, -1].argmax(-1))
    attributed = direct_logit_attribution(cut, tokens, answer=3)
    np.testing.assert_allclose(attributed.total, logits[:, -1, 3], atol=1e-5)
    np.testing.assert_allclose(attributed.rest, 0, atol=1e-4)
    saes = {(0, "resid_post"): ReLUSAE.random(12, 5, key=jax.random.key(0))}
    spliced = with_latents(cut, saes)
    np.testing.assert_allclose(spliced.forward(spliced.params, tokens), logits, atol=1e-4)
    with pytest.raises(ValueError, match="knocked out for prompts of 7 tokens, and these have 6"):
        logit_lens(cut, tokens[:, :6])
    directions = jnp.ones((1, 12))
    np.testing.assert_allclose(cut.unembed(cut.params, directions), model.unembed(model.params, directions))


@pytest.mark.slow
def test_another_knockout_does_not_compile_again():
    traces = []

    def forward(params, tokens):
        traces.append(1)
        return transformer.apply(params, tokens)

    model, tokens = dataclasses.replace(small_model(), forward=forward), small_tokens()
    first = attention_knockout(model, tokens, Knockout(-1, 2, layers=0))
    count = len(traces)
    second = attention_knockout(model, tokens, Knockout([4, 5], [1, 3], heads=2))
    assert len(traces) == count
    assert not np.allclose(first, second)


def test_patterns_are_those_of_the_site():
    model, tokens = small_model(), small_tokens()
    patterns = attention_patterns(model, tokens)
    assert patterns.shape == (2, 2, 4, 7, 7)
    np.testing.assert_allclose(patterns[1], all_sites(model, tokens)[1, "attn_probs"], atol=1e-6)
    one = attention_patterns(model, tokens[0])
    np.testing.assert_allclose(one, patterns[:, 0], atol=1e-6)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_told():
    model, tokens = small_model(), small_tokens()
    for message, cut in [
        (r"query position 7 does not exist: they are 0 to 6", Knockout(7, 0)),
        (r"head 4 does not exist: they are 0 to 3", Knockout(0, 0, heads=4)),
        (r"layer 2 does not exist", Knockout(0, 0, layers=[1, 2])),
        (r"a knockout of no key position", Knockout(0, [])),
        (r"nothing to knock out", []),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_knockout(model, tokens, cut)
    np.testing.assert_array_equal(
        attention_knockout(model, tokens, Knockout(np.int64(-1), 0)), attention_knockout(model, tokens, Knockout(-1, 0))
    )
    bare = dataclasses.replace(model, forward=lambda params, tokens: jnp.zeros((*tokens.shape, 23)))
    with pytest.raises(ValueError, match="no site 'attn_probs'"):
        attention_knockout(bare, tokens, Knockout(0, 0))
    with pytest.raises(ValueError, match="a model with a knockout shows none"):
        attention_patterns(knocked_out(model, 7, Knockout(0, 0)), tokens)

"""Edges between latents, against finite differences and against sums that must come out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import LAYERS, WIDTH, as_model, linear_forward, linear_params
from small_models import all_sites, small_model, small_tokens
from test_latent_nodes import random_sae

import interp_jax as ij
from interp_jax.attribution.latent_edges import latent_edges
from interp_jax.models import transformer
from interp_jax.models.transformer import stacked

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def active(codes, n=3):
    """Some latents that are active, as (position, latent), of late positions."""
    places = np.argwhere(np.asarray(codes) > 0.1)
    return [tuple(map(int, place)) for place in places[-n:]]


def test_an_edge_is_the_codes_value_times_a_finite_difference():
    model, tokens = small_model(), small_tokens(batch=1)
    up, down = (0, "mlp_out"), (1, "resid_post")
    sae, later = random_sae(12, 20, 0), random_sae(12, 16, 1)
    at = all_sites(model, tokens)
    codes = sae.encode(jnp.asarray(at[up]))[0]
    targets = active(later.encode(jnp.asarray(at[down]))[0])
    found = latent_edges(model, tokens[0], up, sae, down, later, targets)
    run = jax.jit(lambda value: later.encode(ij.fetch(ij.inject(model.forward), *down[::-1])(
        {up: value}, model.params, tokens)[1][down])[0])  # fmt: skip
    np.testing.assert_allclose(found.codes, [run(at[up])[target] for target in targets], atol=1e-4)
    step = 1e-2
    for number, target in enumerate(targets):
        for edge, position, latent in found.ranked(3, number):
            change = np.zeros_like(at[up])
            change[0, position] = step * np.asarray(sae.W_dec[...])[latent]
            slope = float(run(at[up] + change)[target] - run(at[up] - change)[target]) / (2 * step)
            assert edge == pytest.approx(float(codes[position, latent]) * slope, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_with_patterns_and_sizes_frozen_edges_add_up_to_what_the_encoder_reads(family):
    """From a layer's input to what its attention writes: what is not from the stream is biases."""
    model, tokens = small_model(family), small_tokens(batch=1)
    up, down = (1, "resid_pre"), (1, "attn_out")
    sae, later = random_sae(12, 20, 0), random_sae(12, 16, 1)
    at = all_sites(model, tokens)
    targets = active(later.encode(jnp.asarray(at[down]))[0])
    found = latent_edges(model, tokens[0], up, sae, down, later, targets, freeze_attention=True, freeze_norms=True)
    written = at[down][0]
    if family == "gpt2":
        attn, norm = model.params.blocks[1].attn, model.params.blocks[1].attn_norm
        of_biases = jnp.einsum("d,dhk->hk", norm.bias[...], attn.W_v[...]) + attn.b_v[...]
        written = written - jnp.einsum("hk,hkd->d", of_biases, attn.W_o[...]) - attn.b_o[...]
    for number, (position, latent) in enumerate(targets):
        total = found.latents[number].sum() + found.error[number].sum() + found.bias[number].sum()
        expected = float(written[position] @ np.asarray(later.W_enc[...])[:, latent])
        assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_without_frozen_norms_they_nearly_cancel():
    model, tokens = small_model(), small_tokens(batch=1)
    up, down = (1, "resid_pre"), (1, "attn_out")
    sae, later = random_sae(12, 20, 0), random_sae(12, 16, 1)
    targets = active(later.encode(jnp.asarray(all_sites(model, tokens)[down]))[0], 1)
    found = latent_edges(model, tokens[0], up, sae, down, later, targets, freeze_attention=True)
    assert found.latents.sum() + found.error.sum() + found.bias.sum() == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_frozen_attention_is_attention_with_its_pattern_planted():
    model, tokens = small_model(), small_tokens(batch=1)
    up, down = (0, "resid_post"), (1, "resid_mid")
    sae, later = random_sae(12, 20, 0), random_sae(12, 16, 1)
    at = all_sites(model, tokens)
    targets = active(later.encode(jnp.asarray(at[down]))[0], 2)
    found = latent_edges(model, tokens[0], up, sae, down, later, targets, freeze_attention=True)
    patterns = {key: jnp.asarray(value) for key, value in at.items() if key[1] == "attn_probs"}

    def read(value):
        planted = {up: value} | patterns
        return later.encode(ij.fetch(ij.inject(model.forward), *down[::-1])(planted, model.params, tokens)[1][down])[0]

    codes = sae.encode(jnp.asarray(at[up]))[0]
    for number, target in enumerate(targets):
        gradient = jax.jit(jax.grad(lambda value, target=target: read(value)[target]))(jnp.asarray(at[up]))[0]
        expected = codes * (gradient @ sae.W_dec[...].T)
        np.testing.assert_allclose(found.latents[number], expected, atol=1e-4)


@pytest.mark.slow
def test_stacked_layers_give_the_same():
    model, tokens = small_model("gpt2"), small_tokens(batch=1)
    places = (0, "resid_post"), random_sae(12, 20, 0), (1, "resid_mid"), random_sae(12, 16, 1)
    frozen = {"freeze_attention": True, "freeze_norms": True}
    one = latent_edges(model, tokens[0], *places, [(6, 1), (5, 2), (3, 3)], **frozen)
    other = dataclasses.replace(model, params=stacked(model.params))
    found = latent_edges(other, tokens[0], *places, [(6, 1), (5, 2), (3, 3)], **frozen)
    np.testing.assert_allclose(found.latents, one.latents, atol=1e-5)
    np.testing.assert_allclose(found.error, one.error, atol=1e-5)


def test_in_a_linear_model_edges_are_virtual_weights_times_codes():
    """Only what the stream carries at the same position: an mlp_out that the next layer's input holds as it is."""
    model = as_model(linear_forward, linear_params(), n_layers=LAYERS, d_model=WIDTH)
    tokens = jnp.array([1, 2, 3, 4])
    up, down = (0, "mlp_out"), (1, "resid_pre")
    sae, later = random_sae(WIDTH, 9, 0), random_sae(WIDTH, 7, 1)
    at = ij.fetch(model.forward, ["mlp_out", "resid_pre"])(model.params, tokens[None])[1]
    targets = active(later.encode(at[down])[0], 2)
    found = latent_edges(model, tokens, up, sae, down, later, targets)
    codes = sae.encode(at[up])[0]
    for number, (position, latent) in enumerate(targets):
        expected = np.zeros_like(found.latents[number])
        expected[position] = codes[position] * (sae.W_dec[...] @ later.W_enc[...][:, latent])
        np.testing.assert_allclose(found.latents[number], expected, atol=1e-5)


@pytest.mark.slow
def test_another_prompt_and_fewer_targets_do_not_compile_again():
    traces = []

    def forward(params, tokens):
        traces.append(1)
        return transformer.apply(params, tokens)

    model, tokens = dataclasses.replace(small_model(), forward=forward), small_tokens()
    places = (0, "resid_post"), random_sae(12, 20, 0), (1, "resid_post"), random_sae(12, 16, 1)
    latent_edges(model, tokens[0], *places, [(6, 1), (5, 2), (4, 1), (3, 3)])
    count = len(traces)
    assert latent_edges(model, tokens[1], *places, [(6, 1), (5, 2), (4, 1)]).latents.shape == (3, 7, 20)
    assert len(traces) == count


def test_bad_input_is_told():
    model, tokens, sae = small_model("gemma"), small_tokens(), random_sae(12, 5, 0)
    for message, up, down, targets, options in [
        (r"\(0, 'mlp_out'\) does not come after \(1, 'resid_pre'\)", (1, "resid_pre"), (0, "mlp_out"), [(0, 0)], {}),
        (r"There is no target \(7, 0\); targets are \(position, latent\), up to \(6, 4\)",
         (0, "mlp_out"), (1, "mlp_out"), [(0, 0), (7, 0)], {}),
        (r"There are no targets", (0, "mlp_out"), (1, "mlp_out"), [], {}),
        (r"no site 'mlp' in layer 0", (0, "mlp"), (1, "mlp_out"), [(0, 0)], {}),
        (r"freeze_norms needs", (0, "mlp_out"), (1, "mlp_out"), [(0, 0)], {"freeze_norms": True}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            latent_edges(model, tokens[0], up, sae, down, sae, targets, **options)

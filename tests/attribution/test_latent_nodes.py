"""Latents and errors as nodes: the same model, effects by gradient against patching and against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import LAYERS, SEQ, VOCAB, WIDTH, as_model, linear_forward, linear_params, pair_of
from small_models import all_sites, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.activation_patching import activation_patching
from interp_jax.attribution.atp import atp
from interp_jax.attribution.latent_nodes import latent_nodes, with_latents
from interp_jax.attribution.nodes import Nodes
from interp_jax.models import transformer
from interp_jax.models.transformer import stacked
from interp_jax.sae import ReLUSAE

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def random_sae(width, d_sae, seed):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (width, d_sae), "W_dec": (d_sae, width), "b_dec": (width,), "b_enc": (d_sae,)}
    return ReLUSAE(**{name: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32) for name, shape in shapes.items()})


def test_the_model_is_the_same_and_shows_codes_and_errors():
    model, tokens = small_model("gpt2"), small_tokens()
    model = dataclasses.replace(model, params=stacked(model.params))
    saes = {(0, "mlp_out"): random_sae(12, 20, 0), (1, "resid_post"): random_sae(12, 16, 1)}
    spliced = with_latents(model, saes)
    logits, found = jax.jit(ij.fetch(spliced.forward))(spliced.params, tokens)
    clean = all_sites(model, tokens)
    np.testing.assert_allclose(logits, clean[None, "logits"], atol=1e-5)
    assert {key for key in found if key not in clean} == {
        (layer, f"{name}_{kind}") for layer, name in saes for kind in ("latents", "error")
    }
    for (layer, name), sae in saes.items():
        codes = sae.encode(jnp.asarray(clean[layer, name]))
        np.testing.assert_allclose(found[layer, f"{name}_latents"], codes, atol=1e-4)
        rebuilt = sae.decode(codes) + found[layer, f"{name}_error"]
        np.testing.assert_allclose(rebuilt, clean[layer, name], atol=1e-4)
        np.testing.assert_allclose(found[layer, name], clean[layer, name], atol=1e-5)


def squared(logits):
    """Far from linear, so that a gradient is one at a point."""
    return (logits[:, -1] ** 2).sum(axis=-1)


@pytest.fixture(scope="module")
def linear():
    model = as_model(linear_forward, linear_params(), n_layers=LAYERS, d_model=WIDTH)
    saes = {(0, "mlp_out"): random_sae(WIDTH, 9, 0), (2, "resid_post"): random_sae(WIDTH, 7, 1)}
    return model, saes, with_latents(model, saes), pair_of([1, 2, 3, 4], [5, 2, 0, 4], answer=2, wrong=3)


def test_in_a_linear_model_attribution_by_latent_is_patching(linear):
    _, saes, spliced, pair = linear
    assert (SEQ, VOCAB) == (4, 6)
    nodes = latent_nodes(saes)
    estimated, exact = atp(spliced, pair, nodes), activation_patching(spliced, pair, nodes)
    assert estimated[0, "mlp_out_latents"].shape == (SEQ, 9)
    assert estimated[0, "mlp_out_error"].shape == (SEQ,)
    for key in exact:
        np.testing.assert_allclose(estimated[key], exact[key], atol=2e-5)
    # Latents and errors of the whole last stream carry all that there is.
    whole = exact[2, "resid_post_latents"].sum() + exact[2, "resid_post_error"].sum()
    assert whole == pytest.approx(exact.corrupted - exact.clean, abs=1e-4)


def test_a_latents_effect_by_hand(linear):
    model, saes, spliced, pair = linear
    exact = activation_patching(spliced, pair, Nodes("mlp_out_latents", by=("position", "unit")))
    sae, key = saes[0, "mlp_out"], (0, "mlp_out")
    forward = jax.jit(ij.inject(model.forward))
    values, logits = {}, {}
    for which in ("clean", "corrupted"):
        tokens = jnp.asarray(getattr(pair, which))[None]
        logits[which], found = ij.fetch(model.forward, "mlp_out", 0)(model.params, tokens)
        values[which] = found[key]
    codes = {which: sae.encode(value) for which, value in values.items()}
    for position, latent in ((0, 3), (2, 5)):
        change = codes["corrupted"][0, position, latent] - codes["clean"][0, position, latent]
        patched = values["clean"].at[0, position].add(change * sae.W_dec[...][latent])
        after = forward({key: patched}, model.params, jnp.asarray(pair.clean)[None])
        difference = (after - logits["clean"])[0, -1]
        expected = float(difference[2] - difference[3])
        assert exact[0, "mlp_out_latents"][position, latent] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_gradients_are_finite_differences():
    model, saes = small_model(), {(0, "resid_post"): random_sae(12, 16, 3)}
    spliced = with_latents(model, saes)
    tokens, key = small_tokens(batch=1), (0, "resid_post_latents")
    objective = jax.jit(lambda codes, params: squared(ij.inject(spliced.forward)({key: codes}, params, tokens))[0])
    gradients = jax.jit(ij.gradients(spliced.forward, "resid_post_latents", objective=lambda out: squared(out)[0]))
    gradient = gradients(spliced.params, tokens)[1][key]
    codes = saes[0, "resid_post"].encode(jnp.asarray(all_sites(model, tokens)[0, "resid_post"]))
    step = 1e-2
    for position, latent in ((6, 1), (2, 9), (0, 4)):
        ends = [objective(codes.at[0, position, latent].add(sign * step), spliced.params) for sign in (1, -1)]
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert float(gradient[0, position, latent]) == pytest.approx(slope, rel=2e-2, abs=2e-2)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_told():
    model, sae = small_model(), random_sae(12, 5, 0)
    for message, saes in [
        (r"no site 'mlp_uot' in layer 0; there is resid_pre", {(0, "mlp_uot"): sae}),
        (r"no site 'mlp_out' in layer 3; there is nothing", {(3, "mlp_out"): sae}),
        (r"reads width 12 and gives 12; the site has shape \(1, 2, 10\)", {(0, "mlp_act"): sae}),
        (r"given by \(layer, site\).*got 'mlp_out'", {"mlp_out": sae}),
        (r"There is no autoencoder", {}),
    ]:
        with pytest.raises(ValueError, match=message):
            with_latents(model, saes)


def test_a_model_of_other_code_that_scans_over_its_layers_has_latents_too():
    model, saes = small_model(), {(0, "mlp_out"): random_sae(12, 5, 0), (1, "resid_post"): random_sae(12, 7, 1)}
    scanned = dataclasses.replace(model, forward=_of_a_box, params={"model": stacked(model.params)})
    pair = pair_of(*np.asarray(small_tokens()), 3, 11)
    found, expected = (atp(with_latents(each, saes), pair, latent_nodes(saes)) for each in (scanned, model))
    # A scan and a Python loop round the sums of gradients differently.
    np.testing.assert_allclose(found.flat, expected.flat, rtol=0, atol=1e-5 * np.abs(expected.flat).max())


def _of_a_box(params, tokens):
    return transformer.apply(params["model"], tokens)

"""Direct logit attribution: the pieces add up, and each is what the weights say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, all_sites, foreign, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.direct_logit_attribution import direct_latent_attribution, direct_logit_attribution
from interp_jax.attribution.read_out import read_out
from interp_jax.models import transformer
from interp_jax.models.transformer import named_parameters
from interp_jax.sae import ReLUSAE

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]

ALL = {"coarse": ("embed", "attn_out", "mlp_out"), "fine": ("embed", "attn_heads", "mlp_act")}


def summed(found):
    """All pieces, added up here."""
    return found.constant + sum(np.asarray(value).reshape(len(value), -1).sum(1) for value in found.pieces.values())


FAST = {("gemma", "coarse"), ("gpt2", "fine")}  # each is a compilation of seconds
CASES = [
    pytest.param(family, sites, marks=() if (family, sites) in FAST else pytest.mark.slow)
    for family in CONFIGS
    for sites in ALL
]


@pytest.mark.parametrize(("family", "sites"), CASES)
def test_the_pieces_add_up_to_the_models_own_logits(family, sites):
    model, tokens = small_model(family), small_tokens()
    logits = all_sites(model, tokens)[None, "logits"]
    found = direct_logit_attribution(model, tokens, [3, 5], 8, sites=ALL[sites], position=4)
    expected = logits[[0, 1], 4, [3, 5]] - logits[:, 4, 8]
    np.testing.assert_allclose(found.total, expected, atol=1e-5)
    np.testing.assert_allclose(summed(found), expected, atol=1e-4)
    np.testing.assert_allclose(found.rest, 0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_layers_that_are_stacked_give_the_same_pieces(family):
    stacked, unrolled = (
        direct_logit_attribution(small_model(family, layers=layers), small_tokens(), 3, 8, sites=ALL["fine"])
        for layers in ("stacked", "unrolled")
    )
    for key, value in stacked.pieces.items():
        np.testing.assert_allclose(unrolled.pieces[key], value, atol=1e-5)


def weights_of(family):
    model = small_model(family)
    return {name: np.asarray(value, np.float64) for name, value in named_parameters(model.params).items()}


def test_every_piece_is_what_the_weights_say_with_the_norms_scale_frozen():
    """GPT-2's kind, with LayerNorm and biases, by hand in float64."""
    model, tokens, p = small_model("gpt2"), small_tokens(), weights_of("gpt2")
    at = {key: np.asarray(value[0, -1], np.float64) for key, value in all_sites(model, tokens).items()}
    stream, unembedding = at[1, "resid_post"], p["W_embed"][3] - p["W_embed"][8]
    scale = np.sqrt(stream.var() + model.params.config.norm_epsilon)

    def piece(vector):
        return float((vector - vector.mean()) / scale * p["final_norm.scale"] @ unembedding)

    found = direct_logit_attribution(model, tokens, 3, 8, sites=ALL["fine"])
    assert float(found.constant[0]) == pytest.approx(p["final_norm.bias"] @ unembedding, abs=1e-4)
    assert float(found.pieces[None, "embed"][0]) == pytest.approx(piece(at[None, "embed"]), abs=1e-4)
    for layer in range(2):
        heads, neurons = at[layer, "attn_heads"], at[layer, "mlp_act"]
        expected = [piece(heads[h] @ p[f"blocks.{layer}.attn.W_o"][h]) for h in range(4)]
        np.testing.assert_allclose(found.pieces[layer, "attn_heads"][0], expected, atol=1e-4)
        expected = [piece(neurons[i] * p[f"blocks.{layer}.mlp.W_out"][i]) for i in range(10)]
        np.testing.assert_allclose(found.pieces[layer, "mlp_act"][0], expected, atol=1e-4)
        for site, bias in (("attn_bias", "attn.b_o"), ("mlp_bias", "mlp.b_out")):
            expected = piece(p[f"blocks.{layer}.{bias}"])
            assert float(found.pieces[layer, site][0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_heads_behind_a_post_norm_by_hand():
    """Gemma's kind: RMSNorms with an offset, after attention too, and a cap on the logits."""
    model, tokens, p = small_model("gemma"), small_tokens(), weights_of("gemma")
    at = {key: np.asarray(value[0, -1], np.float64) for key, value in all_sites(model, tokens).items()}
    stream, heads = at[1, "resid_post"], at[0, "attn_heads"]
    epsilon = model.params.config.norm_epsilon
    written = np.einsum("hk,hkd->hd", heads, p["blocks.0.attn.W_o"])
    out_scale = np.sqrt((written.sum(0) ** 2).mean() + epsilon)
    normed = written / out_scale * (1 + p["blocks.0.attn_post_norm.scale"])
    expected = np.zeros(4)
    for token, sign in ((5, 1), (8, -1)):
        reading = (1 + p["final_norm.scale"]) * p["W_embed"][token] / np.sqrt((stream**2).mean() + epsilon)
        uncapped = stream @ reading
        expected += sign * normed @ reading * (8 * np.tanh(uncapped / 8) / uncapped)
    found = direct_logit_attribution(model, tokens, 5, 8, sites=ALL["fine"])
    np.testing.assert_allclose(found.pieces[0, "attn_heads"][0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "family", [pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("gemma", marks=pytest.mark.slow)]
)
def test_a_model_that_nothing_is_known_of_gives_the_same(family):
    model, tokens = small_model(family), small_tokens()
    known = direct_logit_attribution(model, tokens, 3, 8)
    unknown = direct_logit_attribution(foreign(model), tokens, 3, 8)
    for key, value in known.pieces.items():
        np.testing.assert_allclose(unknown.pieces[key], value, atol=1e-5)
    np.testing.assert_allclose(unknown.constant, known.constant, atol=1e-5)


@pytest.mark.parametrize("family", ["neox", "gemma"])
def test_the_read_out_gives_the_models_logits(family):
    model, tokens = small_model(family), small_tokens()
    at = all_sites(model, tokens)
    logits = jax.jit(read_out, static_argnums=(0, 1))(
        transformer.apply, 2, model.params, jnp.asarray(at[1, "resid_post"])
    )
    np.testing.assert_allclose(logits, at[None, "logits"], atol=1e-5)


def test_a_direction_is_read_off_the_final_stream():
    model, tokens = small_model(), small_tokens()
    direction = np.random.default_rng(3).normal(size=12)
    found = direct_logit_attribution(model, tokens, direction=direction)
    at = all_sites(model, tokens)
    np.testing.assert_allclose(found.total, at[1, "resid_post"][:, -1] @ direction, atol=1e-5)
    np.testing.assert_allclose(found.pieces[0, "mlp_out"], at[0, "mlp_out"][:, -1] @ direction, atol=1e-5)
    np.testing.assert_allclose(summed(found), found.total, atol=1e-5)


@pytest.mark.parametrize(("site", "layer"), [("mlp_out", 0), ("resid_post", 1)])
def test_latents_bias_and_error_add_up_to_what_the_site_writes(site, layer):
    model, tokens = small_model("gpt2"), small_tokens()
    rng = np.random.default_rng(0)
    arrays = {"W_enc": (12, 20), "W_dec": (20, 12), "b_dec": (12,), "b_enc": (20,)}
    sae = ReLUSAE(**{name: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32) for name, shape in arrays.items()})
    found = direct_latent_attribution(model, tokens, sae, 3, 4, site=site, layer=layer)
    of_latents = np.asarray(found.pieces[layer, "latents"])
    value = jnp.asarray(all_sites(model, tokens)[layer, site][:, -1])
    codes = np.asarray(sae.encode(value))
    assert ((of_latents != 0) == (codes != 0)).all()
    np.testing.assert_allclose(found.pieces[layer, "skip"], 0)
    if site == "resid_post":  # all that there is to read
        np.testing.assert_allclose(found.rest, 0, atol=1e-4)
        np.testing.assert_allclose(summed(found), found.total, atol=1e-4)
    else:
        whole = direct_logit_attribution(model, tokens, 3, 4).pieces[layer, site]
        parts = summed(found) - found.constant
        np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_ranks_tables_and_layers():
    model, tokens = ij.load("tiny"), jnp.array([ij.load("tiny").encode_prompt("The city is one")])
    found = direct_logit_attribution(model, tokens, 17, 20)
    ranked = found.ranked(3)
    sizes = [abs(float(value[0])) for value in found.pieces.values()]
    assert [abs(piece.value) for piece in ranked] == sorted(sizes, reverse=True)[:3]
    first = ranked[0]
    assert float(found.pieces[first.layer, first.site][0]) == pytest.approx(first.value)
    lines = found.table(3).splitlines()
    assert str(first) in lines[0]
    assert sum(float(line.split()[0]) for line in lines[:-1]) == pytest.approx(float(lines[-1].split()[0]), abs=5e-4)
    np.testing.assert_array_equal(found.by_layer("mlp_out")[2], found.pieces[2, "mlp_out"][0])
    with pytest.raises(ValueError, match=r"No piece is of site 'q'; there are attn_out, embed, mlp_out"):
        found.by_layer("q")


@pytest.mark.slow
def test_another_prompt_of_the_same_length_does_not_compile_again():
    traces = []

    def forward(params, tokens):
        traces.append(tokens.shape)
        return transformer.apply(params, tokens)

    model = dataclasses.replace(small_model(), forward=forward)
    direct_logit_attribution(model, small_tokens(), 3, 4)
    count = len(traces)
    direct_logit_attribution(model, small_tokens(seed=1), 5, 6, position=2)
    assert len(traces) == count


def test_bad_input_is_told():
    model, tokens = small_model(), small_tokens()
    sae = ReLUSAE.random(5, 7, key=jax.random.key(0))
    cases = [
        (r"answer= .* or direction=", lambda: direct_logit_attribution(model, tokens)),
        (r"answer is 23; the model's tokens are 0 to 22", lambda: direct_logit_attribution(model, tokens, 23)),
        (r"position=7, but the prompts have 7 tokens", lambda: direct_logit_attribution(model, tokens, 1, position=7)),
        (r"attn_out or what it is made of, not both", lambda: direct_logit_attribution(
            model, tokens, 1, sites=["attn_out", "attn_heads"])),
        (r"not \['q'\]", lambda: direct_logit_attribution(model, tokens, 1, sites=["q"])),
        (r"'q' is none of them", lambda: direct_latent_attribution(model, tokens, sae, 1, site="q", layer=0)),
        (r"width 5; llama's stream has 12", lambda: direct_latent_attribution(
            model, tokens, sae, 1, site="mlp_out", layer=0)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ij.SiteError, match="resid_mid"):
        direct_latent_attribution(
            small_model("neox"), tokens, ReLUSAE.random(12, 7, key=jax.random.key(0)), 1,
            site="resid_mid", layer=0,
        )  # fmt: skip

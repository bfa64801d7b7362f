"""The Llama patch set against the real library, with a small random model."""

import importlib.util
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
import interp_jax.patching as patching

pytestmark = [
    pytest.mark.demo,
    # The library warns about its own future.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # What JAX keeps is part of what is tested; and the leak checker would trace every small operation anew.
    pytest.mark.caches,
]

BATCH, SEQ, D_MODEL, D_MLP, HEADS, KV_HEADS, LAYERS, VOCAB = 2, 10, 32, 48, 4, 2, 2, 64
D_HEAD = D_MODEL // HEADS
MODULE = "transformers.models.llama.modeling_flax_llama"

STREAM = (BATCH, SEQ, D_MODEL)
LAYER_SITES = {
    "resid_pre": STREAM,
    "attn_in": STREAM,
    "q": (BATCH, SEQ, HEADS, D_HEAD),
    "k": (BATCH, SEQ, KV_HEADS, D_HEAD),
    "v": (BATCH, SEQ, KV_HEADS, D_HEAD),
    "attn_logits": (BATCH, HEADS, SEQ, SEQ),
    "attn_probs": (BATCH, HEADS, SEQ, SEQ),
    "attn_heads": (BATCH, SEQ, HEADS, D_HEAD),
    "attn_out": STREAM,
    "resid_mid": STREAM,
    "mlp_in": STREAM,
    "mlp_pre": (BATCH, SEQ, D_MLP),
    "mlp_act": (BATCH, SEQ, D_MLP),
    "mlp_out": STREAM,
    "resid_post": STREAM,
}
MODEL_SITES = {"embed": STREAM, "final_norm": STREAM, "logits": (BATCH, SEQ, VOCAB)}
EVERY_SITE = [
    (None, "embed"),
    *((layer, name) for layer in range(LAYERS) for name in LAYER_SITES),
    (None, "final_norm"),
    (None, "logits"),
]


@pytest.fixture(scope="module")
def library():
    patching.install("transformers")
    return importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def pristine(library):
    """The library's own file, run a second time under a name that no patch set knows."""
    name = "transformers.models.llama.pristine_flax_llama"
    spec = importlib.util.spec_from_file_location(name, library.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def _config(rope_theta=10000.0):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=32,
        rope_theta=rope_theta,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def model(library):
    return library.FlaxLlamaForCausalLM(_config(), seed=1)


@pytest.fixture(scope="module")
def forward(model):
    return lambda params, tokens: model(tokens, params=params).logits


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ)))


def test_outputs_are_bit_identical_to_the_library_s(library, pristine, model, tokens):
    own = pristine.FlaxLlamaForCausalLM(_config(), _do_init=False)
    expected = own(tokens, params=model.params, output_attentions=True)
    actual = model(tokens, params=model.params, output_attentions=True)
    np.testing.assert_array_equal(actual.logits, expected.logits)
    np.testing.assert_array_equal(actual.attentions, expected.attentions)
    compiled = jax.jit(lambda p, t: model(t, params=p).logits)(model.params, tokens)
    compiled_own = jax.jit(lambda p, t: own(t, params=p).logits)(model.params, tokens)
    np.testing.assert_array_equal(compiled, compiled_own)


def test_in_place_on_classes_and_functions_that_have_run_and_were_traced(pristine, model, tokens):
    (patch_set,) = patching.load("transformers").modules.values()
    members = {}
    for each in patch_set:
        members.setdefault(each.member, []).append(each.pair)
    patcher = patching.Patcher(pristine, members, imports=["from interp_jax.instrument import site"])
    own = pristine.FlaxLlamaForCausalLM(_config(), _do_init=False)
    compiled = jax.jit(lambda p, t: own(t, params=p).logits)
    clean = compiled(model.params, tokens)
    with patcher:
        logits, values = ij.fetch(compiled)(model.params, tokens)
        assert list(values) == EVERY_SITE
        np.testing.assert_allclose(logits, clean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ij.SiteError):
        ij.fetch(compiled, ("mlp_out",))(model.params, tokens)
    np.testing.assert_array_equal(compiled(model.params, tokens), clean)


@pytest.mark.slow
def test_cached_generation_is_bit_identical_to_the_library_s(pristine, model, tokens):
    own = pristine.FlaxLlamaForCausalLM(_config(), _do_init=False)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    actual = model.generate(tokens, params=model.params, **arguments).sequences
    np.testing.assert_array_equal(actual, own.generate(tokens, params=model.params, **arguments).sequences)


def test_every_site_is_there_with_the_right_shape(forward, model, tokens):
    _, values = ij.fetch(forward)(model.params, tokens)
    assert list(values) == EVERY_SITE
    for (layer, name), value in values.items():
        assert value.shape == (MODEL_SITES if layer is None else LAYER_SITES)[name], name


def test_the_file_declares_the_sites_that_it_makes():
    (pairs,) = patching.load("transformers").modules.values()
    declared = {site for pair in pairs for site in pair.sites}
    assert declared == LAYER_SITES.keys() | MODEL_SITES.keys()


def test_values_are_what_their_names_say(forward, model, tokens):
    logits, values = ij.fetch(forward)(model.params, tokens)
    params = model.params["model"]
    np.testing.assert_array_equal(values[None, "embed"], params["embed_tokens"]["embedding"][tokens])
    np.testing.assert_array_equal(values[0, "resid_pre"], values[None, "embed"])
    np.testing.assert_array_equal(values[None, "logits"], logits)
    kernel = model.params["lm_head"]["kernel"]
    np.testing.assert_allclose(values[None, "final_norm"] @ kernel, logits, rtol=1e-4, atol=1e-4)
    causal = np.tril(np.ones((SEQ, SEQ), bool))
    for layer in range(LAYERS):
        at = {name: np.asarray(values[layer, name]) for name in LAYER_SITES}
        weights = params["layers"][str(layer)]
        np.testing.assert_array_equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        np.testing.assert_array_equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
        if layer:
            np.testing.assert_array_equal(at["resid_pre"], values[layer - 1, "resid_post"])

        # Attention from q, k and v, written out.
        k, v = (np.repeat(at[name], HEADS // KV_HEADS, axis=2) for name in "kv")
        attn_logits = np.einsum("bqhd,bkhd->bhqk", at["q"], k) / np.sqrt(D_HEAD)
        np.testing.assert_allclose(at["attn_logits"], attn_logits, rtol=1e-4, atol=1e-5)
        exponentials = np.where(causal, np.exp(attn_logits), 0)
        probs = exponentials / exponentials.sum(-1, keepdims=True)
        np.testing.assert_allclose(at["attn_probs"], probs, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(at["attn_heads"], np.einsum("bhqk,bkhd->bqhd", probs, v), rtol=1e-4, atol=1e-5)
        joined = at["attn_heads"].reshape(BATCH, SEQ, -1)
        np.testing.assert_allclose(
            at["attn_out"], joined @ weights["self_attn"]["o_proj"]["kernel"], rtol=1e-4, atol=1e-5
        )

        # The MLP and its norm.
        rms = np.sqrt(np.mean(at["resid_mid"] ** 2, -1, keepdims=True) + model.config.rms_norm_eps)
        mlp_in = weights["post_attention_layernorm"]["weight"] * at["resid_mid"] / rms
        np.testing.assert_allclose(at["mlp_in"], mlp_in, rtol=1e-4, atol=1e-5)
        pre, up, down = (weights["mlp"][name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
        np.testing.assert_allclose(at["mlp_pre"], at["mlp_in"] @ pre, rtol=1e-4, atol=1e-5)
        silu = at["mlp_pre"] / (1 + np.exp(-at["mlp_pre"]))
        np.testing.assert_allclose(at["mlp_act"], silu * (at["mlp_in"] @ up), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(at["mlp_out"], at["mlp_act"] @ down, rtol=1e-4, atol=1e-5)


def test_an_edit_at_each_site_changes_the_logits_under_jit_and_after_a_clean_call(forward, model, tokens):
    compiled = jax.jit(forward)
    clean = compiled(model.params, tokens)

    @jax.jit
    def edited(params, tokens, factors):
        for i, (_, _, value) in enumerate(running := ij.iterate(compiled)(params, tokens)):
            # Elementwise: a norm takes back what only scales.
            running.modified_value = value.at[..., 0].multiply(factors[i])
        return running.retval

    ones = np.ones(len(EVERY_SITE), np.float32)
    np.testing.assert_allclose(edited(model.params, tokens, ones), clean, rtol=1e-4, atol=1e-5)
    for i, site in enumerate(EVERY_SITE):
        factors = ones.copy()
        factors[i] = 3
        assert np.abs(edited(model.params, tokens, factors) - clean).max() > 1e-3, site
    np.testing.assert_array_equal(compiled(model.params, tokens), clean)


def _rotated(x, base):
    """The rotary embedding as complex multiplication: pair (x_i, x_{i + d/2}) turns by position * base^(-2i/d)."""
    d = x.shape[-1]
    turn = np.exp(1j * np.outer(np.arange(x.shape[1]), base ** (-np.arange(0, d, 2) / d)))[None, :, None, :]
    turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("base", [100000.0, 500.0])
def test_the_rotary_base_is_the_configured_one(library, model, tokens, base):
    mended = library.FlaxLlamaForCausalLM(_config(base), _do_init=False)
    _, values = ij.fetch(lambda p, t: mended(t, params=p).logits)(model.params, tokens)
    attention = model.params["model"]["layers"]["0"]["self_attn"]
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        plain = np.asarray(values[0, "attn_in"] @ attention[f"{name}_proj"]["kernel"])
        expected = _rotated(plain.reshape(BATCH, SEQ, heads, D_HEAD), base)
        np.testing.assert_allclose(values[0, name], expected, rtol=1e-4, atol=1e-5)


def test_installing_twice_is_installing_once(library):
    assert patching.install("transformers") is patching.install("transformers")


def test_the_source_that_tools_show_is_the_one_that_runs(library):
    source = inspect.getsource(library.FlaxLlamaDecoderLayer)
    assert 'site(self.mlp(hidden_states), "mlp_out", layer=int(self.name))  # ' in source
    assert "transformers.toml:" in source
    assert "site(" not in pathlib.Path(library.__file__).read_text()

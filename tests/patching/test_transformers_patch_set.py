"""The patch set for transformers' Flax models against the real library, with small random models.

Besides the contract's checks every site is computed once more in NumPy, from the sites before it and the weights.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import patch_set_contract as contract
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

BATCH, SEQ, D_MODEL, D_MLP, HEADS, KV_HEADS, LAYERS, VOCAB = 3, 10, 32, 48, 4, 2, 2, 64
POSITIONS = 32
PARALLEL_SITES = tuple(name for name in contract.LAYER_SITES if name != "resid_mid")
NO_RESID_MID = {"resid_mid": "attention and MLP stand side by side"}


# ------------------------------------------------------------------------------------------------ the library, in NumPy


def _linear(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0)


def _transposed_linear(x, weights):
    return x @ weights["kernel"].T + weights["bias"]


def _layer_norm(x, weights):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights["scale"] + weights["bias"]


def _rms_norm(x, scale, config):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _silu(x):
    return x / (1 + np.exp(-x))


def _relu(x):
    return np.maximum(x, 0)


def _split(x, d_head):
    return x.reshape(*x.shape[:2], -1, d_head)


def _join(x):
    return x.reshape(*x.shape[:2], -1)


def _frequencies(width, base, scaling=None):
    """By how much each pair of components turns from one position to the next, in radians."""
    frequencies = base ** (-np.arange(0, width, 2) / width)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    scaled = []
    for frequency in frequencies:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
        if turns < scaling["low_freq_factor"]:
            frequency /= scaling["factor"]
        elif turns < scaling["high_freq_factor"]:
            share = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            frequency = share * frequency + (1 - share) * frequency / scaling["factor"]
        scaled.append(frequency)
    return np.array(scaled)


def _turns(seq, frequencies):
    """e^(i angle) for position and pair. [seq, 1, pairs]"""
    return np.exp(1j * np.outer(np.arange(seq), frequencies))[:, None, :]


def _turned_halves(x, config):
    """Rotary embedding of the pairs (i, i + d_head / 2)."""
    frequencies = _frequencies(x.shape[-1], config.rope_theta, getattr(config, "rope_scaling", None))
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * _turns(x.shape[1], frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _turned_neighbours(x, width):
    """Rotary embedding of the pairs (2i, 2i + 1) of the first `width` components."""
    turned = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * _turns(x.shape[1], _frequencies(width, 10000))
    return np.concatenate(
        [np.stack([turned.real, turned.imag], -1).reshape(*turned.shape[:-1], -1), x[..., width:]], -1
    )


def _gpt2_layer(params, at, layer, config):
    weights = params["transformer"]["h"][str(layer)]
    q, k, v = np.split(_transposed_linear(at["attn_in"], weights["attn"]["c_attn"]), 3, axis=-1)
    d_head = config.n_embd // config.n_head
    return {
        "attn_in": _layer_norm(at["resid_pre"], weights["ln_1"]),
        "q": _split(q, d_head),
        "k": _split(k, d_head),
        "v": _split(v, d_head),
        "attn_out": _transposed_linear(_join(at["attn_heads"]), weights["attn"]["c_proj"]),
        "mlp_in": _layer_norm(at["resid_mid"], weights["ln_2"]),
        "mlp_pre": _transposed_linear(at["mlp_in"], weights["mlp"]["c_fc"]),
        "mlp_act": _gelu_tanh(at["mlp_pre"]),
        "mlp_out": _transposed_linear(at["mlp_act"], weights["mlp"]["c_proj"]),
    }


def _gpt2_ends(params, tokens, last, final_norm, config):
    weights = params["transformer"]
    table = weights["wte"]["embedding"]
    return table[tokens] + weights["wpe"]["embedding"][:SEQ], _layer_norm(last, weights["ln_f"]), final_norm @ table.T


def _gpt_neo_layer(params, at, layer, config):
    weights = params["transformer"]["h"][str(layer)]
    attention = weights["attn"]["attention"]
    d_head = config.hidden_size // config.num_heads
    return {
        "attn_in": _layer_norm(at["resid_pre"], weights["ln_1"]),
        **{name: _split(_linear(at["attn_in"], attention[f"{name}_proj"]), d_head) for name in "qkv"},
        "attn_out": _linear(_join(at["attn_heads"]), attention["out_proj"]),
        "mlp_in": _layer_norm(at["resid_mid"], weights["ln_2"]),
        "mlp_pre": _linear(at["mlp_in"], weights["mlp"]["c_fc"]),
        "mlp_act": _gelu_tanh(at["mlp_pre"]),
        "mlp_out": _linear(at["mlp_act"], weights["mlp"]["c_proj"]),
    }


def _gptj_layer(params, at, layer, config):
    weights = params["transformer"]["h"][str(layer)]
    q, k, v = (
        _split(_linear(at["attn_in"], weights["attn"][f"{name}_proj"]), config.n_embd // config.n_head)
        for name in "qkv"
    )
    normed = _layer_norm(at["resid_pre"], weights["ln_1"])
    return {
        "attn_in": normed,
        "q": _turned_neighbours(q, config.rotary_dim),
        "k": _turned_neighbours(k, config.rotary_dim),
        "v": v,
        "attn_out": _linear(_join(at["attn_heads"]), weights["attn"]["out_proj"]),
        "mlp_in": normed,
        "mlp_pre": _linear(at["mlp_in"], weights["mlp"]["fc_in"]),
        "mlp_act": _gelu_tanh(at["mlp_pre"]),
        "mlp_out": _linear(at["mlp_act"], weights["mlp"]["fc_out"]),
    }


def _gptj_ends(params, tokens, last, final_norm, config):
    weights = params["transformer"]
    logits = _linear(final_norm, params["lm_head"])
    return weights["wte"]["embedding"][tokens], _layer_norm(last, weights["ln_f"]), logits


def _llama_layer(params, at, layer, config, act=_silu, offset=0):
    weights = params["model"]["layers"][str(layer)]
    d_head = config.head_dim or config.hidden_size // config.num_attention_heads
    q, k, v = (_split(_linear(at["attn_in"], weights["self_attn"][f"{name}_proj"]), d_head) for name in "qkv")
    return {
        "attn_in": _rms_norm(at["resid_pre"], offset + weights["input_layernorm"]["weight"], config),
        "q": _turned_halves(q, config),
        "k": _turned_halves(k, config),
        "v": v,
        "attn_out": _linear(_join(at["attn_heads"]), weights["self_attn"]["o_proj"]),
        "mlp_in": _rms_norm(at["resid_mid"], offset + weights["post_attention_layernorm"]["weight"], config),
        "mlp_pre": _linear(at["mlp_in"], weights["mlp"]["gate_proj"]),
        "mlp_act": act(at["mlp_pre"]) * _linear(at["mlp_in"], weights["mlp"]["up_proj"]),
        "mlp_out": _linear(at["mlp_act"], weights["mlp"]["down_proj"]),
    }


def _llama_ends(params, tokens, last, final_norm, config):
    weights = params["model"]
    logits = _linear(final_norm, params["lm_head"])
    return weights["embed_tokens"]["embedding"][tokens], _rms_norm(last, weights["norm"]["weight"], config), logits


def _gemma_layer(params, at, layer, config):
    return _llama_layer(params, at, layer, config, act=_gelu_tanh, offset=1)


def _gemma_ends(params, tokens, last, final_norm, config):
    table = params["model"]["embed_tokens"]["embedding"]
    last = _rms_norm(last, 1 + params["model"]["norm"]["weight"], config)
    return np.sqrt(config.hidden_size) * table[tokens], last, final_norm @ table.T


def _opt_layer(params, at, layer, config):
    weights = params["model"]["decoder"]["layers"][str(layer)]
    attn_norm, mlp_norm = weights["self_attn_layer_norm"], weights["final_layer_norm"]
    before = config.do_layer_norm_before
    d_head = config.hidden_size // config.num_attention_heads
    expected = {
        "attn_in": _layer_norm(at["resid_pre"], attn_norm) if before else at["resid_pre"],
        **{name: _split(_linear(at["attn_in"], weights["self_attn"][f"{name}_proj"]), d_head) for name in "qkv"},
        "attn_out": _linear(_join(at["attn_heads"]), weights["self_attn"]["out_proj"]),
        "mlp_in": _layer_norm(at["resid_mid"], mlp_norm) if before else at["resid_mid"],
        "mlp_pre": _linear(at["mlp_in"], weights["fc1"]),
        "mlp_act": _relu(at["mlp_pre"]),
        "mlp_out": _linear(at["mlp_act"], weights["fc2"]),
    }
    if not before:
        expected["resid_mid"] = _layer_norm(at["resid_pre"] + at["attn_out"], attn_norm)
        expected["resid_post"] = _layer_norm(at["resid_mid"] + at["mlp_out"], mlp_norm)
    return expected


def _opt_ends(params, tokens, last, final_norm, config):
    weights = params["model"]["decoder"]
    table = weights["embed_tokens"]["embedding"]
    embedded, read = table[tokens], final_norm
    if "project_in" in weights:
        embedded, read = embedded @ weights["project_in"]["kernel"], final_norm @ weights["project_out"]["kernel"]
    # The first two rows are for padding.
    embedded = embedded + weights["embed_positions"]["embedding"][2 : 2 + SEQ]
    if "final_layer_norm" in weights:
        last = _layer_norm(last, weights["final_layer_norm"])
    return embedded, last, read @ table.T


# -------------------------------------------------------------------------------------------------------- the families


class Family(NamedTuple):
    """One architecture, and what its sites are made of."""

    module: str
    model: str
    config: str
    options: dict[str, Any]
    layer: Callable[..., dict[str, np.ndarray]]
    """`layer(params, at, layer, config)`: a layer's sites from those before them."""
    ends: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
    """`ends(params, tokens, last_resid_post, final_norm, config) -> (embed, final_norm, logits)`."""
    windows: tuple[int | None, ...] = ()
    d_head: int = D_MODEL // HEADS
    n_kv_heads: int = HEADS


GPT = {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
LLAMA = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
}
GPT_NEO = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "attention_types": [[["global", "local"], LAYERS // 2]],
    "window_size": 4,
}
OPT = {
    "hidden_size": D_MODEL,
    "ffn_dim": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
FAMILIES = {
    "gpt2": Family("gpt2", "FlaxGPT2LMHeadModel", "GPT2Config", GPT, _gpt2_layer, _gpt2_ends),
    "gpt_neo": Family(
        "gpt_neo", "FlaxGPTNeoForCausalLM", "GPTNeoConfig", GPT_NEO, _gpt_neo_layer, _gpt2_ends, windows=(None, 4)
    ),
    "gptj": Family("gptj", "FlaxGPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, _gptj_layer, _gptj_ends),
    "llama": Family(
        "llama", "FlaxLlamaForCausalLM", "LlamaConfig", LLAMA, _llama_layer, _llama_ends, n_kv_heads=KV_HEADS
    ),
    "mistral": Family(
        "mistral", "FlaxMistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 4}, _llama_layer, _llama_ends,
        windows=(5, 5), n_kv_heads=KV_HEADS,
    ),
    "gemma": Family(
        "gemma", "FlaxGemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 6}, _gemma_layer, _gemma_ends,
        d_head=6, n_kv_heads=KV_HEADS,
    ),
    "opt": Family("opt", "FlaxOPTForCausalLM", "OPTConfig", OPT, _opt_layer, _opt_ends),
    "opt_350m": Family(
        "opt", "FlaxOPTForCausalLM", "OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
        _opt_layer, _opt_ends,
    ),
}  # fmt: skip
# Two of them at every turn; the others are with the slow tests.
IN_TURN = [name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
MODULES = {each.module: f"transformers.models.{each.module}.modeling_flax_{each.module}" for each in FAMILIES.values()}
ROTARY_BASES = ("llama", "mistral", "gemma")


def _model(name, **options):
    family = FAMILIES[name]
    library = importlib.import_module(MODULES[family.module])
    config_type = getattr(importlib.import_module("transformers"), family.config)
    config = config_type(vocab_size=VOCAB, **{**family.options, **options})
    return getattr(library, family.model)(config, _do_init=False)


def _random_params(model):
    """Weights of a size at which every part matters, biases and the scales of norms among them."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if len(leaf.shape) == 2:
            return 0.2 * noise
        return 0.2 * noise + (path[-1].key in ("scale", "weight"))

    return jax.tree_util.tree_map_with_path(fill, dict(model.params_shape_tree))


def make_case(name, **options):
    """A small model of a family, with the options of its configuration changed."""
    family, model = FAMILIES[name], _model(name, **options)
    return contract.Case(
        forward=lambda params, tokens: model(tokens, params=params).logits,
        params=_random_params(model),
        tokens=np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ)),
        n_layers=LAYERS,
        d_model=D_MODEL,
        n_heads=HEADS,
        n_kv_heads=family.n_kv_heads,
        d_head=options.get("head_dim", family.d_head),
        d_mlp=D_MLP,
        vocab=VOCAB,
        layer_sites=PARALLEL_SITES if name == "gptj" else contract.LAYER_SITES,
        absent=NO_RESID_MID if name == "gptj" else {},
    )


def _check_against_the_weights(name, case, values, **options):
    family, config = FAMILIES[name], _model(name, **options).config
    last, final_norm = values[LAYERS - 1, "resid_post"], values[None, "final_norm"]
    ends = family.ends(case.params, case.tokens, last, final_norm, config)
    expected = {(None, site): value for site, value in zip(("embed", "final_norm", "logits"), ends, strict=True)}
    for layer in range(LAYERS):
        at = {site: values[layer, site] for site in case.layer_sites}
        for site, value in family.layer(case.params, at, layer, config).items():
            expected[layer, site] = value
    for site, value in expected.items():
        np.testing.assert_allclose(values[site], value, rtol=1e-4, atol=1e-5, err_msg=str(site))


# ------------------------------------------------------------------------------------------------------------ the tests
#
# What runs outside jit comes first: a pass under jit makes JAX compile every small operation of later passes anew.


@pytest.fixture(scope="module", autouse=True)
def _patched():
    patching.install("transformers")


@pytest.fixture(scope="module")
def unpatched():
    return contract.unpatched_logits_of_cases(__file__, FAMILIES)


@functools.cache
def _case(name):
    return make_case(name)


@pytest.mark.parametrize("name", IN_TURN)
def test_sites_are_what_their_names_say(name):
    case = _case(name)
    values = contract.check_sites(case)
    if name != "opt_350m":  # its norms stand on the stream: checked against the weights
        contract.check_sums(case, values, parallel=name == "gptj")
    contract.check_attention(case, values, scale=1 if name == "gpt_neo" else None, windows=FAMILIES[name].windows)
    _check_against_the_weights(name, case, values)


@pytest.mark.parametrize("base", [100000.0, 500.0])
@pytest.mark.parametrize("name", ROTARY_BASES)
def test_the_rotary_base_is_the_configured_one(name, base):
    case = make_case(name, rope_theta=base)
    _check_against_the_weights(name, case, contract.check_sites(case), rope_theta=base)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        # Of the four frequencies the first is kept, the second scaled in part, the others in full.
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 100,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_llama_s_rotary_embedding_is_scaled_as_configured(scaling):
    case = make_case("llama", rope_scaling=scaling)
    _check_against_the_weights("llama", case, contract.check_sites(case), rope_scaling=scaling)


@pytest.mark.parametrize("window", [None, 7])
def test_mistral_sees_as_far_as_configured(window):
    case = make_case("mistral", sliding_window=window)
    windows = [window and window + 1] * LAYERS
    contract.check_attention(case, contract.check_sites(case), windows=windows)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_heads_are_as_wide_as_configured(name):
    case = make_case(name, head_dim=6)
    values = contract.check_sites(case)
    contract.check_attention(case, values, windows=FAMILIES[name].windows)
    _check_against_the_weights(name, case, values, head_dim=6)


@pytest.mark.parametrize(("divided", "by_layer"), [(False, False), (True, True), (False, True)])
def test_gpt2_scales_its_logits_as_configured(divided, by_layer):
    case = make_case("gpt2", scale_attn_weights=divided, scale_attn_by_inverse_layer_idx=by_layer)
    values = contract.check_sites(case)
    for layer in range(LAYERS):
        attn_logits = np.einsum("bqhd,bkhd->bhqk", values[layer, "q"], values[layer, "k"])
        attn_logits /= (np.sqrt(case.d_head) if divided else 1) * (layer + 1 if by_layer else 1)
        np.testing.assert_allclose(values[layer, "attn_logits"], attn_logits, rtol=1e-4, atol=1e-5)


def test_gpt2_s_cross_attention_has_no_sites_of_its_own():
    model = _model("gpt2", add_cross_attention=True)
    encoded = np.ones((BATCH, 3, D_MODEL), np.float32)
    _, values = ij.fetch(lambda p, t: model(t, params=p, encoder_hidden_states=encoded).logits)(
        _random_params(model), _case("gpt2").tokens
    )
    assert list(values) == _case("gpt2").every_site


@pytest.mark.parametrize(("edited", "apart"), [("attn_in", "mlp_out"), ("mlp_in", "attn_out")])
def test_gptj_s_attention_and_mlp_are_edited_apart(edited, apart):
    case, values = _case("gptj"), {}
    for layer, name, value in (running := ij.iterate(case.forward)(case.params, case.tokens)):
        values[layer, name] = value
        if (layer, name) == (0, edited):
            running.modified_value = value * 2
    clean = contract.check_sites(case)
    np.testing.assert_array_equal(values[0, apart], clean[0, apart])
    assert np.abs(values[0, "resid_post"] - clean[0, "resid_post"]).max() > 0.1


@pytest.mark.parametrize("name", IN_TURN)
def test_outputs_are_the_unpatched_library_s_to_the_bit(name, unpatched):
    contract.check_unpatched_outputs(_case(name), unpatched[name])


@pytest.mark.parametrize("name", IN_TURN)
def test_an_edit_at_each_site_changes_the_logits(name):
    contract.check_edits(_case(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_generation_is_the_same_as_without_a_cache(name):
    case, model = _case(name), _model(name)
    generated = model.generate(
        case.tokens, params=case.params, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=VOCAB
    ).sequences
    tokens = case.tokens
    for _ in range(4):
        tokens = np.concatenate([tokens, np.argmax(case.forward(case.params, tokens)[:, -1:], -1)], 1)
    np.testing.assert_array_equal(generated, tokens)


@pytest.mark.parametrize("module", MODULES)
def test_the_source_of_classes_is_found(module):
    name = MODULES[module]
    classes = inspect.getmembers(importlib.import_module(name), inspect.isclass)
    for class_name, its_class in [each for each in classes if each[1].__module__ == name]:
        assert inspect.getsource(its_class).startswith(("@", f"class {class_name}("))


@pytest.mark.parametrize("module", MODULES)
def test_the_file_declares_the_sites_that_it_makes(module):
    pairs = patching.load("transformers").modules[MODULES[module]]
    declared = [site for pair in pairs for site in pair.sites]
    layer_sites = PARALLEL_SITES if module == "gptj" else contract.LAYER_SITES
    assert sorted(declared) == sorted([*layer_sites, "embed", "final_norm", "logits"])


def test_every_module_of_the_set_is_tested():
    assert set(patching.load("transformers").modules) == set(MODULES.values())

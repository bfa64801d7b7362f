"""The patch set of penzai: Llama-like models and GPT-NeoX, blocks in a loop and in a layer stack, and SmolLM2 in it."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import patch_set_contract as contract
import pytest
from real_weights import RealWeights, mean_loss

import interp_jax as ij
import interp_jax.patching as patching
from interp_jax.instrument.named_axes import named_site

# The leak checker would trace every small operation anew; and what JAX keeps is part of what is tested.
pytestmark = pytest.mark.caches

BATCH, SEQ, WINDOW, LAYERS, D_MODEL, D_MLP, KV_HEADS, GROUP, D_HEAD, VOCAB = 2, 10, 4, 2, 24, 40, 2, 2, 6, 48
HEADS = KV_HEADS * GROUP
LOGITS_CAP, ATTENTION_CAP = 3.0, 0.5  # so low that they bite
VARIANTS = "penzai.models.transformer.variants"

SHAPES = {
    "embedding_dim": D_MODEL,
    "projection_dim": D_HEAD,
    "mlp_hidden_dim": D_MLP,
    "num_decoder_blocks": LAYERS,
    "vocab_size": VOCAB,
}
OPTIONS = {
    # Grouped queries, an unembedding of its own.
    "llama": {
        "num_kv_heads": KV_HEADS,
        "query_head_multiplier": GROUP,
        "mlp_variant": "swiglu",
        "tie_embedder_and_logits": False,
        "rope_wavelength": 500.0,
    },
    # One k and v for all queries, the embedding scaled and also the unembedding.
    "gemma": {
        "num_kv_heads": 1,
        "query_head_multiplier": HEADS,
        "mlp_variant": "geglu_approx",
        "tie_embedder_and_logits": True,
    },
    # Norms behind attention and MLP, soft caps, windows.
    "gemma2": {
        "num_kv_heads": KV_HEADS,
        "query_head_multiplier": GROUP,
        "mlp_variant": "geglu_approx",
        "tie_embedder_and_logits": True,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "final_logit_softcap": LOGITS_CAP,
        "attn_logits_soft_cap": ATTENTION_CAP,
    },
    # Attention and MLP side by side, biases, a part of each head rotated.
    "gpt_neox": {
        "num_attention_heads": HEADS,
        "activation_fn": "gelu_exact",
        "rope_subset_size": 4,
        "rope_wavelength": 500.0,
        "layernorm_epsilon": 1e-6,
        "parameter_dtype": jnp.float32,
        "activation_dtype": jnp.float32,
    },
}
STACKED = " in a layer stack"
CASES = [name + stacked for name in OPTIONS for stacked in ("", STACKED)]


def _built(name, key=None, **changes):
    """The model; without a key its parameters are to be bound."""
    architecture = name.removesuffix(STACKED)
    options = {**SHAPES, **OPTIONS[architecture], "use_layer_stack": name.endswith(STACKED), **changes}
    if architecture == "gpt_neox":
        variant = importlib.import_module(f"{VARIANTS}.gpt_neox")
        return variant.build_gpt_neox_transformer(variant.GPTNeoXTransformerConfig(**options), init_base_rng=key)
    variant = importlib.import_module(f"{VARIANTS}.llamalike_common")
    if architecture == "gemma2":
        window = variant.AttentionTypeSlidingWindowCausal(WINDOW)
        # A stack has one type of attention in all blocks.
        is_stacked = options["use_layer_stack"]
        options["attention_type"] = window if is_stacked else (window, variant.AttentionTypeGlobalCausal())
    return variant.build_llamalike_transformer(variant.LlamalikeTransformerConfig(**options), init_base_rng=key)


def _forward(model):
    """The model as a function of its parameters and plain arrays."""
    pz = importlib.import_module("penzai.pz")

    def forward(params, tokens):
        logits = pz.bind_variables(model, params)(pz.nx.wrap(tokens, "batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary")

    return forward


def _params(name):
    pz = importlib.import_module("penzai.pz")
    shapes = jax.eval_shape(lambda key: pz.unbind_params(_built(name, key), freeze=True)[1], jax.random.key(0))
    rng = np.random.default_rng(1)

    def drawn(leaf, *, center, size):
        return jnp.asarray(center + size * rng.standard_normal(leaf.shape, np.float32))

    # Not the norms' ones and the biases' zeros, which would hide what they do.
    return [jax.tree.map(functools.partial(drawn, center="scale" in param.label, size=0.3), param) for param in shapes]


def make_case(name):
    options = OPTIONS[name.removesuffix(STACKED)]
    is_parallel = name.startswith("gpt_neox")
    return contract.Case(
        forward=_forward(_built(name)),
        params=_params(name),
        tokens=np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ)),
        n_layers=LAYERS,
        d_model=D_MODEL,
        n_heads=HEADS,
        n_kv_heads=options.get("num_kv_heads", HEADS),
        d_head=D_HEAD,
        d_mlp=D_MLP,
        vocab=VOCAB,
        layer_sites=tuple(site for site in contract.LAYER_SITES if not (is_parallel and site == "resid_mid")),
        absent={"resid_mid": "attention and MLP both read resid_pre"} if is_parallel else {},
    )


@pytest.fixture(scope="module")
def library():
    return patching.install("penzai")


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(library, name):
    return make_case(name)


@pytest.fixture(scope="module")
def values(case):
    return contract.check_sites(case)


@pytest.fixture(scope="module")
def unpatched():
    return contract.unpatched_logits_of_cases(__file__, CASES)


def test_outputs_are_the_library_s_to_the_bit(case, name, unpatched):
    contract.check_unpatched_outputs(case, unpatched[name])


def test_every_site_is_there_and_the_stream_adds_up(case, name, values):
    contract.check_sums(case, values, parallel=name.startswith("gpt_neox"))


def test_attention_is_what_q_k_and_v_make_of_it(case, name, values):
    if name.startswith("gemma2"):
        logits = np.einsum("bqhd,bkhd->bhqk", values[0, "q"], np.repeat(values[0, "k"], GROUP, 2)) * D_HEAD**-0.5
        capped = ATTENTION_CAP * np.tanh(logits / ATTENTION_CAP)
        np.testing.assert_allclose(values[0, "attn_logits"], capped, rtol=1e-4, atol=1e-5)
        assert np.count_nonzero(values[0, "attn_probs"][0, 0, -1]) == WINDOW
        assert np.count_nonzero(values[1, "attn_probs"][0, 0, -1]) == WINDOW if name.endswith(STACKED) else SEQ
    else:
        contract.check_attention(case, values)


def test_an_edit_at_each_site_changes_the_logits(case):
    contract.check_edits(case)


def test_the_values_are_those_of_the_weights(case, name, values):
    """Norms, projections and activation functions, written out for the first block."""
    weights = {param.label.removeprefix("transformer/"): param.value for param in case.params}

    def weight(label, *axes):
        if name.endswith(STACKED):
            label, axes = label.replace("block_0", "blocks"), ("blocks", *axes)
        value = np.asarray(weights[label].unwrap(*axes))
        return value[0] if name.endswith(STACKED) and "blocks" in axes else value

    tokens, embedding = case.tokens, np.asarray(weights["embedder.embeddings"].unwrap("vocabulary", "embedding"))
    scale = np.sqrt(D_MODEL) if name.startswith("gemma") else 1
    np.testing.assert_allclose(values[None, "embed"], scale * embedding[tokens], rtol=1e-5)
    at = {site: values[0, site] for site in case.layer_sites}
    if name.startswith("gpt_neox"):
        pre = weight("block_0/mlp/in/Linear.weights", "embedding", "neurons")
        bias = weight("block_0/mlp/in/AddBias.bias", "neurons")
        np.testing.assert_allclose(at["mlp_pre"], at["mlp_in"] @ pre + bias, rtol=1e-4, atol=1e-4)
        gelu = jax.nn.gelu(at["mlp_pre"], approximate=False)
        np.testing.assert_allclose(at["mlp_act"], gelu, rtol=1e-4, atol=1e-5)
        return
    stream = np.sqrt(np.mean(at["resid_mid"] ** 2, -1, keepdims=True) + 1e-6)
    mlp_in = at["resid_mid"] / stream * weight("block_0/pre_ffw_norm/scale.weights", "embedding")
    np.testing.assert_allclose(at["mlp_in"], mlp_in, rtol=1e-4, atol=1e-5)
    gate, up = (weight(f"block_0/mlp/{part}_linear.weights", "embedding", "neurons") for part in ("gating", "value"))
    np.testing.assert_allclose(at["mlp_pre"], at["mlp_in"] @ gate, rtol=1e-4, atol=1e-4)
    activation = jax.nn.gelu if name.startswith("gemma") else jax.nn.silu
    np.testing.assert_allclose(at["mlp_act"], activation(at["mlp_pre"]) * (at["mlp_in"] @ up), rtol=1e-4, atol=1e-4)
    joined = at["attn_heads"].reshape(BATCH, SEQ, HEADS * D_HEAD)
    if not name.startswith("gemma2"):  # which has a norm there
        groups = [] if case.n_kv_heads == 1 else ["head_groups"]
        out = weight("block_0/attention/output.weights", *groups, "query_heads", "projection", "embedding")
        out = out.reshape(HEADS * D_HEAD, D_MODEL)
        np.testing.assert_allclose(at["attn_out"], joined @ out, rtol=1e-4, atol=1e-4)
    final = values[None, "final_norm"]
    last = embedding.T if name.startswith("gemma") else weights["lm_head.weights"].unwrap("embedding", "vocabulary")
    logits = np.asarray(final @ last)
    capped = LOGITS_CAP * np.tanh(logits / LOGITS_CAP) if name.startswith("gemma2") else logits
    np.testing.assert_allclose(values[None, "logits"], capped, rtol=1e-4, atol=1e-4)


def test_the_file_declares_the_sites_that_it_makes(library):
    declared = {site for pairs in library.modules.values() for pair in pairs for site in pair.sites}
    assert declared == {*contract.LAYER_SITES, "embed", "final_norm", "logits"}


# The layer stack against the loop


@pytest.fixture(scope="module")
def loop(library):
    return make_case("llama")


@pytest.fixture(scope="module")
def stack(loop):
    """The same model with the same weights, blocks stacked."""
    pz = importlib.import_module("penzai.pz")
    values = {param.label: param.value for param in loop.params}
    for label in [label for label in values if "/block_0/" in label]:
        blocks = [values.pop(label.replace("block_0", f"block_{i}")) for i in range(LAYERS)]
        values[label.replace("block_0", "blocks")] = pz.nx.stack(blocks, "blocks")
    params = [pz.ParameterValue(value=value, label=label) for label, value in values.items()]
    return dataclasses.replace(loop, forward=_forward(_built("llama" + STACKED)), params=params)


def test_an_edit_of_one_layer_in_a_compiled_stack_does_what_it_does_in_a_loop(loop, stack):
    def edited(case):
        def run(params, tokens):
            for layer, name, value in (running := ij.iterate(case.forward)(params, tokens)):
                if (layer, name) == (1, "attn_heads"):
                    running.modified_value = value.at[:, :, 2].set(0.0)
                if name == "resid_post" or (layer, name) == (0, "q"):
                    running.save(f"{name} of {layer}", value)
                del value
            return running.retval, running.saved

        return jax.jit(run)(case.params, case.tokens)

    (expected, expected_saved), (actual, saved) = edited(loop), edited(stack)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert saved.keys() == expected_saved.keys()
    for name, value in expected_saved.items():
        np.testing.assert_allclose(saved[name], value, rtol=1e-4, atol=1e-5)
    assert np.abs(actual - stack.forward(stack.params, stack.tokens)).max() > 1e-3


def test_gradients_in_a_stack_are_those_of_a_loop(loop, stack):
    def gradients(case):
        find = ij.gradients(case.forward, ("resid_post", "attn_probs"), objective=lambda logits: logits[0, -1, 3])
        return jax.jit(find)(case.params, case.tokens)[1]

    expected, actual = gradients(loop), gradients(stack)
    assert actual.keys() == expected.keys()
    for site, value in expected.items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(actual[site], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacked", ["", STACKED], ids=["loop", "layer stack"])
def test_with_a_cache_the_new_tokens_have_every_site(loop, stack, stacked):
    pz = importlib.import_module("penzai.pz")
    sampling_mode = importlib.import_module("penzai.models.transformer.sampling_mode")
    case = stack if stacked else loop
    tokens = np.maximum(case.tokens, 1)  # 0 is padding
    _, whole = ij.fetch(case.forward)(case.params, tokens)
    cached = sampling_mode.KVCachingTransformerLM.from_uncached(
        pz.bind_variables(_built("llama" + stacked), case.params), cache_len=SEQ + 2, batch_axes={"batch": BATCH}
    )
    first = 7
    cached(pz.nx.wrap(tokens[:, :first], "batch", "seq"))
    _, values = ij.fetch(
        lambda: cached(pz.nx.wrap(tokens[:, first:], "batch", "seq")).unwrap("batch", "seq", "vocabulary")
    )()
    assert list(values) == list(whole)
    for (layer, name), value in whole.items():
        is_square = name in ("attn_logits", "attn_probs")
        actual = values[layer, name][..., :SEQ] if is_square else values[layer, name]
        expected = value[:, :, first:] if is_square else value[:, first:]
        if name == "attn_logits":  # of the keys to come it holds what the cache is made of
            seen = np.tril(np.ones((SEQ, SEQ), bool))[first:]
            actual, expected = (np.where(seen, each, 0) for each in (actual, expected))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# What is mended


def test_the_last_norm_of_gpt_neox_has_the_configured_epsilon(library):
    params = _params("gpt_neox")
    forward = _forward(_built("gpt_neox", layernorm_epsilon=0.5))
    _, values = ij.fetch(forward)(params, np.array([[1, 2, 3]]))
    weights = {param.label.removeprefix("transformer/final_norm/"): param.value for param in params}
    x = np.asarray(values[LAYERS - 1, "resid_post"])
    standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5)
    scale, shift = (weights[label].unwrap("embedding") for label in ("scale.weights", "shift.bias"))
    np.testing.assert_allclose(values[None, "final_norm"], standard * scale + shift, rtol=1e-4, atol=1e-5)


# Named arrays of the library's own


def test_views_and_unnamed_axes(library):
    nx = importlib.import_module("penzai.pz").nx
    array = jnp.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    view = nx.wrap(array, "d", "seq", "batch", "heads").untag("batch")
    for _, _, value in (running := ij.iterate(lambda: named_site(view, "here", "seq", "heads", "d"))()):
        np.testing.assert_array_equal(value, jnp.einsum("dsbh->bshd", array))
        running.modified_value = value.at[3, 1, 4, 0].set(-1.0)
    assert running.retval.positional_shape == view.positional_shape
    assert running.retval.named_shape == view.named_shape
    out = running.retval.tag("batch").unwrap("d", "seq", "batch", "heads")
    np.testing.assert_array_equal(out, array.at[0, 1, 3, 4].set(-1.0))


def test_general_layers_outside_a_transformer_have_no_sites(library):
    pz = importlib.import_module("penzai.pz")
    model = pz.nn.Sequential([
        pz.nn.Affine.from_config("in", jax.random.key(0), {"pixels": 3}, {"neurons": 4}),
        pz.nn.Elementwise(jax.nn.relu),
        pz.nn.Affine.from_config("out", jax.random.key(1), {"neurons": 4}, {"vocabulary": 2}),
    ])  # fmt: skip
    assert not list(ij.iterate(model)(pz.nx.ones({"pixels": 3})))


# Real weights

SMOLLM2 = {
    "num_kv_heads": 3,
    "query_head_multiplier": 3,
    "embedding_dim": 576,
    "projection_dim": 64,
    "mlp_hidden_dim": 1536,
    "num_decoder_blocks": 30,
    "vocab_size": 49152,
    "rope_wavelength": 100_000.0,
    "rms_norm_eps": 1e-5,
}


def _smollm2_params(real, is_stacked):
    """Penzai scales the embedding where the unembedding is tied to it; so here that has weights of its own."""
    pz = importlib.import_module("penzai.pz")
    kv_heads, group, d_head, d_model = 3, 3, 64, 576
    heads = ("head_groups", "query_heads", "projection")
    parts = {
        "pre_attention_norm/scale": ("input_layernorm", None, ("embedding",)),
        "pre_ffw_norm/scale": ("post_attention_layernorm", None, ("embedding",)),
        "mlp/gating_linear": ("mlp.gate_proj", None, ("neurons", "embedding")),
        "mlp/value_linear": ("mlp.up_proj", None, ("neurons", "embedding")),
        "mlp/out_linear": ("mlp.down_proj", None, ("embedding", "neurons")),
        "attention/query": ("self_attn.q_proj", (kv_heads, group, d_head, d_model), (*heads, "embedding")),
        "attention/key": ("self_attn.k_proj", (kv_heads, d_head, d_model), ("head_groups", "projection", "embedding")),
        "attention/value": (
            "self_attn.v_proj",
            (kv_heads, d_head, d_model),
            ("head_groups", "projection", "embedding"),
        ),
        "attention/output": ("self_attn.o_proj", (d_model, kv_heads, group, d_head), ("embedding", *heads)),
    }
    embedding = real.weight("model.embed_tokens.weight")
    values = {
        "embedder.embeddings": pz.nx.wrap(embedding, "vocabulary", "embedding"),
        "lm_head.weights": pz.nx.wrap(embedding, "vocabulary", "embedding"),
        "final_norm/scale.weights": pz.nx.wrap(real.weight("model.norm.weight"), "embedding"),
    }
    for name, (theirs, shape, axes) in parts.items():
        arrays = [real.weight(f"model.layers.{layer}.{theirs}.weight") for layer in range(30)]
        arrays = [array if shape is None else array.reshape(shape) for array in arrays]
        if is_stacked:
            values[f"blocks/{name}.weights"] = pz.nx.wrap(np.stack(arrays), "blocks", *axes)
        else:
            values |= {f"block_{i}/{name}.weights": pz.nx.wrap(array, *axes) for i, array in enumerate(arrays)}
    return [pz.ParameterValue(value=value, label=f"transformer/{label}") for label, value in values.items()]


@pytest.mark.parametrize("stacked", ["", STACKED], ids=["loop", "layer stack"])
def test_smollm2(library, stacked):
    real = RealWeights("smollm2")
    forward = _forward(_built("llama" + stacked, **SMOLLM2))
    params = _smollm2_params(real, bool(stacked))
    compiled = jax.jit(forward)
    logits = np.concatenate([np.asarray(compiled(params, part)) for part in np.split(real.rows, 4)])
    loss = mean_loss(logits, real.rows)
    _, values = ij.fetch(forward)(params, real.tokens)
    values = {site: np.asarray(value) for site, value in values.items()}
    print(f"loss {loss:.6f}, reference {real.loss:.6f}")
    assert abs(loss - real.loss) < 1e-3
    contract.check_agreement(values, real.sites)

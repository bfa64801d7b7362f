"""The tunix patch set against the real library: small random models of each kind, then real weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import patch_set_contract as contract
import pytest
from flax import nnx
from real_weights import RealWeights, loss_of

import interp_jax as ij
import interp_jax.patching as patching

pytestmark = [
    # The library uses what JAX and flax have deprecated, when it is imported and when it runs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # What JAX keeps is part of what is tested; and the leak checker would trace every small operation anew.
    pytest.mark.caches,
]

BATCH, SEQ, D_MODEL, D_MLP, HEADS, KV_HEADS, D_HEAD, VOCAB = 3, 10, 32, 48, 4, 2, 8, 64
LIBRARY_BASE = 1_000_000  # what Llama 3 and Qwen 3 computed with, whatever the configuration said
WINDOW = 4
GEMMA_LAYERS = 6  # the last is the first that sees everything
MODELS = ("llama3", "qwen2", "qwen3", "gemma3")
VARIANTS = ("llama3/tied", "qwen2/untied", "qwen3/tied", "gemma3/one key head", "gemma3/as many key heads")


def _model(name, **changes):
    """A model with its library's own initial weights; no import above is of the library, which is patched later."""
    kind, _, variant = name.partition("/")
    sizes = {
        "embed_dim": D_MODEL,
        "hidden_dim": D_MLP,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": D_HEAD,
    }
    if kind == "gemma3":
        from tunix.models.gemma3 import model as library

        sizes |= {
            "num_layers": GEMMA_LAYERS,
            "num_embed": VOCAB,
            "sliding_window_size": WINDOW,
            "local_base_frequency": 100,
            "global_base_frequency": 1000,
            "param_dtype": jnp.float32,
        }
        sizes["num_kv_heads"] = {"one key head": 1, "as many key heads": HEADS}.get(variant, KV_HEADS)
        return library.Gemma3(library.ModelConfig(**sizes | changes), rngs=nnx.Rngs(0))
    sizes |= {"num_layers": 2, "vocab_size": VOCAB, "rope_theta": LIBRARY_BASE, "norm_eps": 1e-5}
    tied = {"tied": True, "untied": False}.get(variant, kind == "qwen2")
    if kind == "llama3":
        from tunix.models.llama3 import model as library

        return library.Llama3(library.ModelConfig(**sizes | {"weight_tying": tied} | changes), rngs=nnx.Rngs(0))
    sizes["use_tied_embedding"] = tied
    if kind == "qwen2":
        from tunix.models.qwen2 import model as library

        return library.Qwen2(library.ModelConfig(**sizes | changes), rngs=nnx.Rngs(0))
    from tunix.models.qwen3 import model as library

    return library.Qwen3(library.ModelConfig(**sizes | changes), rngs=nnx.Rngs(0))


def _forward(graph, *, still=False):
    """`forward(params, tokens) -> logits`; `still`: every token stands at position 0, where nothing is rotated."""

    def forward(params, tokens):
        batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq) * (not still), (batch, seq))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((seq, seq), bool)), (batch, seq, seq))
        return nnx.merge(graph, params)(tokens, positions, None, mask)[0]

    return forward


def _random(params, kind):
    """Other weights than the library's own, which begins with MLPs and biases of zeros."""
    rng = np.random.default_rng(1)

    def draw(path, value):
        norm = "norm" in jax.tree_util.keystr(path)
        centre = 1 if norm and kind != "gemma3" else 0
        return jnp.asarray(centre + 0.2 * rng.standard_normal(value.shape), value.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def make_case(name, **changes):
    """A case of the contract; `name` is one of MODELS or VARIANTS."""
    model = _model(name, **changes)
    graph, params = nnx.split(model)
    return contract.Case(
        forward=_forward(graph),
        params=_random(params, name.partition("/")[0]),
        tokens=np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ)),
        n_layers=model.config.num_layers,
        d_model=D_MODEL,
        n_heads=HEADS,
        n_kv_heads=model.config.num_kv_heads,
        d_head=D_HEAD,
        d_mlp=D_MLP,
        vocab=VOCAB,
    )


@pytest.fixture(scope="module", autouse=True)
def library():
    patching.install("tunix")


@pytest.fixture(scope="module")
def cases(library):
    return {name: make_case(name) for name in MODELS + VARIANTS}


def test_outputs_are_bit_identical_to_the_library_s(cases):
    for name, logits in contract.unpatched_logits_of_cases(__file__, MODELS + VARIANTS).items():
        contract.check_unpatched_outputs(cases[name], logits)


@pytest.mark.parametrize("name", MODELS + VARIANTS)
def test_every_site_is_there_and_adds_up(cases, name):
    case = cases[name]
    values = contract.check_sites(case)
    contract.check_sums(case, values)
    windows = [WINDOW] * (GEMMA_LAYERS - 1) + [None] if name.startswith("gemma3") else []
    contract.check_attention(case, values, windows=windows)


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_at_each_site_changes_the_logits_under_jit_and_after_a_clean_call(cases, name):
    contract.check_edits(cases[name])


def test_a_mixture_of_experts_has_all_sites_but_the_neurons():
    case = make_case("qwen3", num_experts=4, num_experts_per_tok=2)
    absent = dict.fromkeys(("mlp_pre", "mlp_act"), "each expert has its own")
    rest = tuple(name for name in case.layer_sites if name not in absent)
    case = dataclasses.replace(case, absent=absent, layer_sites=rest)
    values = contract.check_sites(case)
    contract.check_sums(case, values)
    contract.check_edits(case)


@pytest.mark.parametrize(
    ("name", "remat"),
    [("llama3", "BLOCK"), ("llama3", "DECODER"), ("qwen2", "DECODER"), ("qwen3", "BLOCK"), ("gemma3", "DECODER")],
)
def test_rematerialised_blocks_have_the_same_sites_and_gradients(name, remat):
    kinds = type(_model(name).config.remat_config)
    plain, again = (make_case(name, num_layers=2, remat_config=kind) for kind in (kinds.NONE, kinds[remat]))
    logits, values = jax.jit(ij.fetch(plain.forward))(plain.params, plain.tokens)
    logits_again, values_again = ij.fetch(jax.jit(again.forward))(plain.params, plain.tokens)
    assert list(values_again) == plain.every_site
    np.testing.assert_allclose(logits_again, logits, rtol=1e-4, atol=1e-5)
    for site, value in values.items():
        np.testing.assert_allclose(values_again[site], value, rtol=1e-4, atol=1e-5, err_msg=str(site))
    (_, gradients), (_, gradients_again) = (
        jax.jit(ij.gradients(case.forward, "mlp_act", objective=lambda logits: (logits**2).mean()))(
            case.params, case.tokens
        )
        for case in (plain, again)
    )
    assert list(gradients_again) == [(0, "mlp_act"), (1, "mlp_act")]
    for site, value in gradients.items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(gradients_again[site], value, rtol=1e-3, atol=1e-6, err_msg=str(site))


def _rotated(x, base):
    """The rotary embedding as complex multiplication: pair (x_i, x_{i + d/2}) turns by position * base^(-2i/d)."""
    d = x.shape[-1]
    turn = np.exp(1j * np.outer(np.arange(x.shape[1]), base ** (-np.arange(0, d, 2) / d)))[None, :, None, :]
    turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize(
    ("name", "changes", "bases"),
    [
        ("llama3", {"rope_theta": 100_000}, [1e5] * 2),
        ("llama3", {"rope_theta": 500.0}, [500] * 2),
        ("qwen2", {"rope_theta": 100_000}, [1e5] * 2),
        ("qwen3", {"rope_theta": 5_000_000}, [5e6] * 2),
        ("qwen3", {"rope_theta": 500.0}, [500] * 2),
        ("gemma3", {}, [100] * (GEMMA_LAYERS - 1) + [1000]),
    ],
)
def test_the_rotary_base_is_the_configured_one(name, changes, bases):
    model = _model(name, **changes)
    graph, params = nnx.split(model)

    def silence(path, value):
        # Attention adds nothing, so that no layer's input depends on the positions.
        return value * (not {"o_proj", "attn_vec_einsum"} & {getattr(key, "key", None) for key in path})

    params = jax.tree_util.tree_map_with_path(silence, _random(params, name))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ))
    _, plain = ij.fetch(_forward(graph, still=True), ("q", "k"))(params, tokens)
    _, values = ij.fetch(_forward(graph), ("q", "k"))(params, tokens)
    for (layer, site), value in values.items():
        expected = _rotated(np.asarray(plain[layer, site]), bases[layer])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_cached_decoding_step_has_the_sites_of_the_full_pass(name):
    case = make_case(name, num_layers=2)
    graph, _ = nnx.split(_model(name, num_layers=2))
    empty = jnp.zeros((BATCH, SEQ, case.n_kv_heads, D_HEAD))
    layer_cache = {"k": empty, "v": empty, "end_index": jnp.zeros((BATCH,), jnp.int32)}
    cache = {f"layer_{layer}": layer_cache for layer in range(case.n_layers)}

    def step(params, cache, token, place):
        mask = jnp.broadcast_to(jnp.arange(SEQ) <= place, (BATCH, 1, SEQ))
        return nnx.merge(graph, params)(token[:, None], jnp.full((BATCH, 1), place), cache, mask)

    fetched_step = jax.jit(ij.fetch(step))
    _, expected = ij.fetch(jax.jit(case.forward))(case.params, case.tokens)
    for place in range(SEQ):
        (_, cache), values = fetched_step(case.params, cache, case.tokens[:, place], place)
        assert values.keys() == expected.keys()
        for (layer, site), value in values.items():
            full = expected[layer, site]
            if site in ("attn_logits", "attn_probs"):  # the cache has places for tokens to come
                value, full = value[..., : place + 1], full[:, :, place : place + 1, : place + 1]
            else:
                full = full[:, place : place + 1]
            np.testing.assert_allclose(value, full, rtol=1e-4, atol=1e-4, err_msg=f"{layer} {site} {place}")


def test_a_model_is_an_ordinary_pytree(cases):
    model = _model("llama3")
    positions = jnp.broadcast_to(jnp.arange(SEQ), (BATCH, SEQ))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((SEQ, SEQ), bool)), (BATCH, SEQ, SEQ))

    def forward(model, tokens):
        return model(tokens, positions, None, mask)[0]

    tokens = cases["llama3"].tokens
    compiled = jax.jit(forward)
    logits, values = ij.fetch(compiled)(model, tokens)
    assert list(values) == cases["llama3"].every_site
    np.testing.assert_allclose(logits, compiled(model, tokens), rtol=1e-4, atol=1e-5)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))


def test_the_file_declares_the_sites_that_it_makes():
    for module, pairs in patching.load("tunix").modules.items():
        declared = [site for pair in pairs for site in pair.sites]
        assert sorted(declared) == sorted({*contract.LAYER_SITES, "embed", "final_norm", "logits"}), module


# ---------------------------------------------------------------- real weights


def _by_head(weight, heads):
    """A projection to heads, [out, in], as [in, heads, d_head]."""
    return weight.reshape(heads, -1, weight.shape[1]).transpose(2, 0, 1)


def _loaded(params, weights):
    """The parameters with these values, each of them once."""
    flat = dict(nnx.to_flat_state(params))
    assert flat.keys() == weights.keys()
    for path, value in weights.items():
        assert flat[path].shape == value.shape, path
        flat[path] = flat[path].replace(jnp.asarray(value))
    return nnx.from_flat_state(flat)


def _check_against(real, forward, params):
    loss = loss_of(forward, params, real.rows)
    assert abs(loss - real.loss) < 1e-3, (loss, real.loss)
    _, sites = ij.fetch(forward)(params, real.tokens)
    contract.check_agreement({site: np.asarray(value) for site, value in sites.items()}, real.sites)


def test_smollm2_agrees_with_transformers_at_every_site():
    from tunix.models.llama3 import model as library

    real = RealWeights("smollm2")
    config = library.ModelConfig(
        num_layers=30,
        vocab_size=49152,
        embed_dim=576,
        hidden_dim=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: library.Llama3(config, rngs=nnx.Rngs(0))))
    weights = {
        ("embedder", "input_embedding"): real.weight("model.embed_tokens.weight"),
        ("final_norm", "w"): real.weight("model.norm.weight"),
    }
    for layer in range(config.num_layers):

        def of(name, layer=layer):
            return real.weight(f"model.layers.{layer}.{name}.weight")

        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights["layers", layer, norm, "w"] = of(norm)
        for name, heads in (("q_proj", 9), ("k_proj", 3), ("v_proj", 3)):
            weights["layers", layer, "attn", name, "w"] = _by_head(of(f"self_attn.{name}"), heads)
        weights["layers", layer, "attn", "o_proj", "w"] = of("self_attn.o_proj").T.reshape(9, 64, 576)
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights["layers", layer, "mlp", name, "kernel"] = of(f"mlp.{name}").T
    _check_against(real, _forward(graph), _loaded(params, weights))


def test_gemma3_270m_agrees_with_gemma_at_every_site():
    from tunix.models.gemma3 import model as library

    real = RealWeights("gemma3")
    config = library.ModelConfig.gemma3_270m()
    config.param_dtype = jnp.float32
    graph, params = nnx.split(nnx.eval_shape(lambda: library.Gemma3(config, rngs=nnx.Rngs(0))))
    weights = {
        ("embedder", "input_embedding"): real.weight("model.embed_tokens.weight"),
        ("final_norm", "scale"): real.weight("model.norm.weight"),
    }
    norms = {
        ("pre_attention_norm",): "input_layernorm",
        ("attn", "_query_norm"): "self_attn.q_norm",
        ("attn", "_key_norm"): "self_attn.k_norm",
        ("post_attention_norm",): "post_attention_layernorm",
        ("pre_ffw_norm",): "pre_feedforward_layernorm",
        ("post_ffw_norm",): "post_feedforward_layernorm",
    }
    for layer in range(config.num_layers):

        def of(name, layer=layer):
            return real.weight(f"model.layers.{layer}.{name}.weight")

        def by_head(name, heads, of=of):
            return _by_head(of(f"self_attn.{name}_proj"), heads).swapaxes(0, 1)

        for path, name in norms.items():
            weights["layers", layer, *path, "scale"] = of(name)
        weights["layers", layer, "attn", "q_einsum", "w"] = by_head("q", config.num_heads)
        weights["layers", layer, "attn", "kv_einsum", "w"] = np.stack(
            [by_head(name, config.num_kv_heads) for name in "kv"]
        )
        heads = of("self_attn.o_proj").T.reshape(config.num_heads, config.head_dim, config.embed_dim)
        weights["layers", layer, "attn", "attn_vec_einsum", "w"] = heads
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights["layers", layer, "mlp", name, "kernel"] = of(f"mlp.{name}").T
    _check_against(real, _forward(graph), _loaded(params, weights))

"""The patch set of gemma, Google DeepMind's own library, and Gemma 3 270M in it."""

import contextlib
import dataclasses
import importlib
import importlib.util
import sys

import gemma3_270m  # with a stand-in for kauldron
import jax
import jax.numpy as jnp
import numpy as np
import patch_set_contract as contract
import pytest
from real_weights import RealWeights, loss_of

import interp_jax as ij
import interp_jax.patching as patching

pytestmark = [
    # The library's and its dependencies' own warnings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # What JAX keeps is part of what is tested; and the leak checker would trace every small operation anew.
    pytest.mark.caches,
]

BATCH, SEQ, WINDOW, LAYERS, D_MODEL, D_MLP, HEADS, D_HEAD, VOCAB = 2, 10, 4, 3, 24, 40, 4, 6, 48


def _shapes(kv_heads):
    attention_type = importlib.import_module("gemma.gm.nn._modules").AttentionType
    return {
        "num_embed": VOCAB,
        "embed_dim": D_MODEL,
        "hidden_dim": D_MLP,
        "num_heads": HEADS,
        "head_dim": D_HEAD,
        "num_kv_heads": kv_heads,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "attention_types": (attention_type.LOCAL_SLIDING, attention_type.LOCAL_SLIDING, attention_type.GLOBAL),
        "sliding_window_size": WINDOW,
    }


OPTIONS = {
    # One k and v for all queries, norms of q and k, two rotary bases.
    "gemma3": {
        "kv_heads": 1,
        "final_logit_softcap": None,
        "use_qk_norm": True,
        "transpose_gating_einsum": True,
        "local_base_frequency": 10_000,
        "global_base_frequency": 1_000_000,
    },
    # Grouped queries and soft caps, so low that they bite.
    "gemma2": {"kv_heads": 2, "final_logit_softcap": 3.0, "attn_logits_soft_cap": 0.5},
    # As many k and v as queries, no norm behind attention and MLP.
    "gemma1": {
        "kv_heads": HEADS,
        "final_logit_softcap": None,
        "use_post_attn_norm": False,
        "use_post_ffw_norm": False,
    },
}


def _config(name):
    options = dict(OPTIONS[name])
    shapes = _shapes(options.pop("kv_heads"))
    return importlib.import_module("gemma.gm.nn._config").TransformerConfig(**{**shapes, **options})


def make_case(name):
    model = importlib.import_module("gemma.gm.nn._transformer").Transformer(config=_config(name), dtype=jnp.float32)
    # From one: zero is padding there, and masked.
    tokens = np.random.default_rng(0).integers(1, VOCAB, (BATCH, SEQ))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(tokens))
    # So large that every site matters; the norms' scales, too, which the library starts at zero.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)
    return contract.Case(
        forward=lambda params, tokens: model.apply(params, tokens).logits,
        params=params,
        tokens=tokens,
        n_layers=LAYERS,
        d_model=D_MODEL,
        n_heads=HEADS,
        n_kv_heads=OPTIONS[name]["kv_heads"],
        d_head=D_HEAD,
        d_mlp=D_MLP,
        vocab=VOCAB,
    )


@pytest.fixture(scope="module", params=list(OPTIONS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(name):
    patching.install("gemma")
    return make_case(name)


@pytest.fixture(scope="module")
def pristine():
    """The library's two files, run a second time under names that no patch set knows."""
    patching.install("gemma")
    copies = {}
    for name in ("_modules", "_transformer"):
        spec = importlib.util.spec_from_file_location(
            f"gemma.gm.nn.pristine{name}", importlib.import_module(f"gemma.gm.nn.{name}").__file__
        )
        copies[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copies[name])
    copies["_transformer"]._modules = copies["_modules"]
    yield copies
    for copy in copies.values():
        del sys.modules[copy.__name__]


@pytest.fixture(scope="module")
def unpatched():
    return contract.unpatched_logits_of_cases(__file__, OPTIONS)


def test_outputs_are_the_library_s_to_the_bit(case, name, unpatched):
    contract.check_unpatched_outputs(case, unpatched[name])


def test_every_site_is_there_and_is_what_its_name_says(case, name):
    values = contract.check_sites(case)
    contract.check_sums(case, values)
    params = case.params["params"]
    embedding = np.asarray(params["embedder"]["input_embedding"])
    np.testing.assert_allclose(values[None, "embed"], embedding[case.tokens] * np.sqrt(D_MODEL), rtol=1e-6)
    np.testing.assert_allclose(
        values[None, "final_norm"],
        _normed(values[LAYERS - 1, "resid_post"], params["final_norm"]),
        rtol=1e-4,
        atol=1e-5,
    )
    logits = _capped(values[None, "final_norm"] @ embedding.T, OPTIONS[name]["final_logit_softcap"])
    np.testing.assert_allclose(values[None, "logits"], logits, rtol=1e-4, atol=1e-4)
    for layer in range(LAYERS):
        at = {site: values[layer, site] for site in contract.LAYER_SITES}
        weights = params[f"layer_{layer}"]
        close = {"rtol": 1e-4, "atol": 1e-5}

        np.testing.assert_allclose(at["attn_in"], _normed(at["resid_pre"], weights["pre_attention_norm"]), **close)
        added = np.einsum("bsnh,nhd->bsd", at["attn_heads"], weights["attn"]["attn_vec_einsum"]["w"])
        if "post_attention_norm" in weights:
            added = _normed(added, weights["post_attention_norm"])
        np.testing.assert_allclose(at["attn_out"], added, **close)

        np.testing.assert_allclose(at["mlp_in"], _normed(at["resid_mid"], weights["pre_ffw_norm"]), **close)
        gating = weights["mlp"]["gating_einsum"]
        equation = "bsd,md->bsm" if OPTIONS[name].get("transpose_gating_einsum") else "bsd,dm->bsm"
        pre, up = (np.einsum(equation, at["mlp_in"], each) for each in gating)
        np.testing.assert_allclose(at["mlp_pre"], pre, **close)
        np.testing.assert_allclose(at["mlp_act"], jax.nn.gelu(pre) * up, **close)
        added = at["mlp_act"] @ weights["mlp"]["linear"]
        if "post_ffw_norm" in weights:
            added = _normed(added, weights["post_ffw_norm"])
        np.testing.assert_allclose(at["mlp_out"], added, **close)


def _normed(x, norm):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + np.asarray(norm["scale"]))


def _capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def test_attention_follows_from_q_k_and_v(case, name):
    values = contract.check_sites(case)
    windows = [WINDOW, WINDOW, None]
    if name != "gemma2":
        contract.check_attention(case, values, windows=windows)
        return
    # The contract's reference has no soft cap: undone here, so that it sees what was there before.
    cap = OPTIONS[name]["attn_logits_soft_cap"]
    distance = np.subtract.outer(np.arange(SEQ), np.arange(SEQ))
    for layer, window in enumerate(windows):
        q, k, v = (values[layer, site] for site in "qkv")
        k, v = (np.repeat(each, HEADS // case.n_kv_heads, axis=2) for each in (k, v))
        attn_logits = _capped(np.einsum("bqhd,bkhd->bhqk", q, k) * D_HEAD**-0.5, cap)
        np.testing.assert_allclose(values[layer, "attn_logits"], attn_logits, rtol=1e-4, atol=1e-5)
        assert np.abs(attn_logits).max() > 0.9 * cap
        seen = (distance >= 0) & (distance < (window or SEQ))
        probs = np.where(seen, np.exp(attn_logits), 0)
        probs /= probs.sum(-1, keepdims=True)
        np.testing.assert_allclose(values[layer, "attn_probs"], probs, rtol=1e-4, atol=1e-6)
        heads = np.einsum("bhqk,bkhd->bqhd", probs, v)
        np.testing.assert_allclose(values[layer, "attn_heads"], heads, rtol=1e-4, atol=1e-5)


def test_an_edit_at_each_site_changes_the_logits(case):
    contract.check_edits(case)


def test_the_file_declares_the_sites_that_it_makes(case):
    declared = {site for pairs in patching.load("gemma").modules.values() for pair in pairs for site in pair.sites}
    assert declared == {site for _, site in case.every_site}


def _pristine_forward(pristine, name):
    model = pristine["_transformer"].Transformer(config=_with_types_of(pristine, _config(name)), dtype=jnp.float32)
    return lambda params, tokens: model.apply(params, tokens).logits


def _with_types_of(pristine, config):
    """The second run of a file has an enumeration of its own."""
    types = tuple(pristine["_modules"].AttentionType[each.name] for each in config.attention_types)
    return dataclasses.replace(config, attention_types=types)


def _in_place(pristine):
    patch_set = patching.load("gemma")
    stack = contextlib.ExitStack()
    for module, pairs in patch_set.modules.items():
        members = {}
        for each in pairs:
            members.setdefault(each.member, []).append(each.pair)
        stack.enter_context(
            patching.Patcher(pristine[module.rpartition(".")[2]], members, imports=list(patch_set.imports))
        )
    return stack


def test_the_library_s_jit_is_traced_anew_where_the_module_was_patched_on_import(case):
    clean = case.forward(case.params, case.tokens)  # under the jit of Transformer.__call__
    logits, values = ij.fetch(case.forward)(case.params, case.tokens)
    assert list(values) == case.every_site
    np.testing.assert_allclose(logits, clean, rtol=1e-4, atol=1e-5)
    ablated = {(1, "mlp_out"): jnp.zeros(case.shape("mlp_out"))}
    edited = ij.inject(case.forward)(ablated, case.params, case.tokens)
    assert np.abs(edited - clean).max() > 1e-2
    np.testing.assert_array_equal(case.forward(case.params, case.tokens), clean)


@pytest.mark.parametrize(
    ("name", "around"),
    [("gemma3", lambda forward: forward), ("gemma2", jax.jit)],
    ids=["gemma3, the library's jit", "gemma2, a jit around it"],
    indirect=["name"],
)
def test_in_place_after_a_clean_call(pristine, case, name, around):
    forward = around(_pristine_forward(pristine, name))
    clean = forward(case.params, case.tokens)
    with pytest.raises(ij.SiteError):
        ij.fetch(forward, ("mlp_out",))(case.params, case.tokens)
    for _ in range(2):
        with _in_place(pristine):
            np.testing.assert_array_equal(forward(case.params, case.tokens), clean)
            logits, values = ij.fetch(forward)(case.params, case.tokens)
            assert list(values) == case.every_site
            np.testing.assert_allclose(logits, clean, rtol=1e-4, atol=1e-5)
        with pytest.raises(ij.SiteError):
            ij.fetch(forward, ("mlp_out",))(case.params, case.tokens)
    np.testing.assert_array_equal(forward(case.params, case.tokens), clean)


@pytest.mark.parametrize("name", ["gemma3", "gemma2"], indirect=True)
def test_with_a_cache(pristine, case, name):
    """Filled with all but the last token, then asked for that one."""
    length = SEQ + 3

    def run(transformer, config, params, tokens):
        model = transformer(config=config, dtype=jnp.float32)
        cache = model.init_cache(batch_size=BATCH, dtype=jnp.float32, cache_length=length)
        logits = []
        for start, stop in ((0, SEQ - 1), (SEQ - 1, SEQ)):
            positions = jnp.broadcast_to(jnp.arange(start, stop), (BATCH, stop - start))
            seen = jnp.arange(length) <= positions[..., None]
            out = model.apply(params, tokens[:, start:stop], positions=positions, cache=cache, attention_mask=seen)
            cache = out.cache
            logits.append(out.logits)
        return jnp.concatenate(logits, 1)

    tokens = jnp.asarray(case.tokens)
    own = pristine["_transformer"].Transformer
    expected = run(own, _with_types_of(pristine, _config(name)), case.params, tokens)
    patched = importlib.import_module("gemma.gm.nn._transformer").Transformer
    np.testing.assert_array_equal(run(patched, _config(name), case.params, tokens), expected)
    np.testing.assert_allclose(expected, case.forward(case.params, case.tokens), rtol=1e-3, atol=1e-4)

    listed = ij.list_sites(lambda *arguments: run(patched, _config(name), *arguments))(case.params, tokens)
    assert len(listed) == 2 * len(case.every_site)
    shapes = {site.name: site.shape for site in listed if site.layer == 2}  # the last token's
    assert shapes["q"] == (BATCH, 1, HEADS, D_HEAD)
    assert shapes["k"] == shapes["v"] == (BATCH, 1, case.n_kv_heads, D_HEAD)
    assert shapes["attn_logits"] == shapes["attn_probs"] == (BATCH, HEADS, 1, length)


def test_a_block_on_its_own_works_whatever_its_name():
    patching.install("gemma")
    modules = importlib.import_module("gemma.gm.nn._modules")
    block = modules.Block(
        num_heads=HEADS,
        num_kv_heads=1,
        embed_dim=D_MODEL,
        head_dim=D_HEAD,
        hidden_dim=D_MLP,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attn_type=modules.AttentionType.GLOBAL,
        query_pre_attn_scalar=1.0,
        transpose_gating_einsum=False,
    )
    arguments = (jnp.ones((1, 3, D_MODEL)), jnp.arange(3)[None], None, jnp.ones((1, 3, 3), bool))
    params = jax.eval_shape(block.init, jax.random.key(0), *arguments)
    listed = ij.list_sites(block.apply)(params, *arguments)
    assert [(site.layer, site.name) for site in listed] == [(None, site) for site in contract.LAYER_SITES]


def test_gemma_3_270m():
    weights = RealWeights("gemma3")
    forward, params = gemma3_270m.load(weights)
    assert loss_of(forward, params, weights.rows) == pytest.approx(3.177, abs=2e-3)
    _, values = ij.fetch(forward)(params, weights.tokens)
    assert len(values) == 18 * len(contract.LAYER_SITES) + 3
    contract.check_agreement({site: np.asarray(value) for site, value in values.items()}, weights.sites)

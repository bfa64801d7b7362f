"""Attention whole and in blocks of queries, against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hugging_face import write_directory

import interp_jax as ij
from interp_jax.models import attention
from interp_jax.models.attention import attended
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.transformer import Transformer, apply, empty_cache, unrolled
from interp_jax.models.transformer_config import TransformerConfig

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

BATCH, GROUPS, MEMBERS, D_HEAD = 2, 2, 3, 4


@pytest.fixture
def in_blocks(monkeypatch):
    """Blocks of 3 queries, from 5 scores on."""
    monkeypatch.setitem(attention._MOST_SCORES_AT_ONCE, "cpu", 4)
    monkeypatch.setitem(attention._SCORES_OF_A_BLOCK, "cpu", 1)
    monkeypatch.setattr(attention, "_SMALLEST_BLOCK", 3)
    jax.clear_caches()
    yield
    jax.clear_caches()


def problem(seq, n_keys, *, is_turned=False):
    keys = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(keys[0], (BATCH, seq, GROUPS, MEMBERS, D_HEAD))
    k, v = (jax.random.normal(key, (BATCH, GROUPS, n_keys, D_HEAD)) for key in keys[1:])
    return queries, k.swapaxes(2, 3) if is_turned else k, v


def exact(queries, k, v, sees, scale, soft_cap):
    queries, k, v = (np.asarray(value, np.float64) for value in (queries, k, v))
    scores = scale * np.einsum("bqgmd,bgkd->bgmqk", queries, k)
    scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
    weights = np.where(np.asarray(sees)[:, :, None], np.exp(scores - scores.max()), 0)
    return np.einsum("bgmqk,bgkd->bgmqd", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("seq", [1, 2, 3, 7, 12, 26, 31])
@pytest.mark.parametrize("way", ["causal", "causal in a window", "turned, in a cache"])
def test_each_query_reads_what_it_sees(in_blocks, way, seq, soft_cap):
    is_turned = way == "turned, in a cache"
    n_keys, start = (seq + 9, 5) if is_turned else (seq, 0)
    queries, k, v = problem(seq, n_keys, is_turned=is_turned)
    distance = start + np.arange(seq)[:, None] - np.arange(n_keys)
    sees = (distance >= 0) & (distance < (4 if "window" in way else 99))
    # The second row's first key is padding, which a query sees that would else see nothing.
    sees = np.stack([sees, sees & (np.arange(n_keys) > 0) | (distance == 0)])[:, None]
    found = jax.jit(lambda *args: attended(*args, soft_cap=soft_cap, is_turned=is_turned, is_causal=not is_turned))(
        queries, k, v, jnp.asarray(sees), 0.5
    )
    expected = exact(queries, k.swapaxes(2, 3) if is_turned else k, v, sees, 0.5, soft_cap)
    np.testing.assert_allclose(found, expected, atol=2e-6)  # float32 sums of up to 31 terms of size 1: 16 epsilons


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text"])  # grouped; with biases; local layers
def model(request, tmp_path_factory):
    return load_hugging_face(write_directory(tmp_path_factory.mktemp(request.param), request.param))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 11)))
IS_TOKEN = jnp.ones((2, 11), bool).at[0, :2].set(False).at[1, 9:].set(False)


def loss_of(model):
    return jnp.square(model(TOKENS, is_token=IS_TOKEN) * IS_TOKEN[..., None]).mean()


def test_a_model_gives_the_same_in_blocks_and_so_do_its_gradient_and_its_cache(model, in_blocks, monkeypatch):
    def results():
        jax.clear_caches()
        logits, gradient = jax.jit(jax.value_and_grad(loss_of))(model)
        cached, _ = jax.jit(lambda model, tokens: model.extend(empty_cache(model, 2, 15), tokens))(model, TOKENS)
        placed = jax.jit(lambda model: model(TOKENS, positions=jnp.arange(22)[::-1].reshape(2, 11) % 11))(model)
        return logits, gradient, cached, placed, apply(unrolled(model), TOKENS)

    found = results()
    monkeypatch.setitem(attention._MOST_SCORES_AT_ONCE, "cpu", 2**22)
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(results()), strict=True):
        # Sums over keys in parts, through all layers: a hundred times the dtype's epsilon; but the gradient of keys'
        # biases is zero, whatever is left of it.
        np.testing.assert_allclose(ours, whole, atol=1e-5 * max(1e-2, np.abs(whole).max()))


def test_scores_are_whole_where_they_may_be_looked_at(model, in_blocks):
    jitted = jax.jit(apply)
    clean = jitted(model, TOKENS)
    logits, probs = ij.fetch(jitted, "attn_probs")(model, TOKENS)
    assert list(probs) == [(layer, "attn_probs") for layer in range(model.config.n_layers)]
    for value in probs.values():
        assert value.shape == (2, model.config.n_heads, 11, 11)
        np.testing.assert_allclose(value.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(logits, clean, atol=1e-5 * np.abs(clean).max())  # whole, against blocks, as above
    assert {"attn_logits", "attn_probs"} <= {name for _, name, _ in ij.iterate(jitted)(model, TOKENS)}


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("layers", [lambda model: model, unrolled], ids=["stacked", "unrolled"])
def test_who_looks_elsewhere_changes_nothing_and_is_told_of_them(model, in_blocks, way, layers):
    forward, model = way(apply), layers(model)
    clean = forward(model, TOKENS)
    logits, values = ij.fetch(forward, "attn_out", 1)(model, TOKENS)
    # The same blocks, but compiled otherwise: an eager loop over layers, say, and a scan.
    np.testing.assert_allclose(logits, clean, atol=1e-5 * np.abs(clean).max())
    assert list(values) == [(1, "attn_out")]
    with pytest.raises(ij.SiteError, match=r"did you mean 'attn_probs'(.|\n)*v, attn_logits, attn_probs, attn_heads"):
        ij.fetch(forward, "attn_prob")(model, TOKENS)
    np.testing.assert_array_equal(forward(model, TOKENS), clean)


def test_an_id_that_is_no_token_spoils_its_whole_row_under_jit(model, in_blocks):
    logits = jax.jit(apply)(model, TOKENS.at[0, 8].set(model.config.vocab_size))
    assert jnp.isnan(logits[0]).all()
    assert jnp.isfinite(logits[1]).all()


def test_gradients_in_bfloat16_are_summed_in_float32(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, 512, 1, 1, 16), (1, 1, 512, 16), (1, 1, 512, 16)
    narrow = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    sees = jnp.tril(jnp.ones((512, 512), bool))[None, None]

    def gradients(args):
        def total(*args):
            scale = jnp.asarray(0.25, args[0].dtype)
            return attended(*args, sees, scale, soft_cap=None, is_turned=False, is_causal=True).sum(dtype=jnp.float32)

        jax.clear_caches()
        return [np.asarray(each, np.float32) for each in jax.jit(jax.grad(total, (0, 1, 2)))(*args)]

    exact, whole = gradients([each.astype(jnp.float32) for each in narrow]), gradients(narrow)
    monkeypatch.setitem(attention._MOST_SCORES_AT_ONCE, "cpu", 4)
    monkeypatch.setattr(attention, "_SMALLEST_BLOCK", 2)
    monkeypatch.setitem(attention._SCORES_OF_A_BLOCK, "cpu", 1)
    for ours, theirs, right in zip(gradients(narrow), whole, exact, strict=True):
        # As far off as in one piece. Summed in bfloat16 over 1024 blocks they were so up to sixty times.
        assert np.linalg.norm(ours - right) < 1.3 * np.linalg.norm(theirs - right) + 1e-3 * np.linalg.norm(right)
    jax.clear_caches()


def test_memory_is_a_blocks_forward_and_backward(monkeypatch):
    config = TransformerConfig(
        vocab_size=20, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=16, context=1024
    )
    model, tokens = Transformer(config, jax.random.key(0)), jnp.zeros((2, 1024), jnp.int32)
    scores = 4 * 2 * config.n_heads * 1024**2  # bytes

    def temporary(function):
        jax.clear_caches()
        return jax.jit(function).lower(model).compile().memory_analysis().temp_size_in_bytes

    def forward(model):
        return apply(model, tokens).sum()

    monkeypatch.setitem(attention._SCORES_OF_A_BLOCK, "cpu", 2**18)
    assert max(temporary(forward), temporary(jax.grad(forward))) < scores
    for function in (forward, jax.jit(forward)):  # of an eager backward pass all that is kept is kept
        _, backward = jax.vjp(function, model)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(backward)) < scores
    monkeypatch.setitem(attention._MOST_SCORES_AT_ONCE, "cpu", 2**30)
    assert min(temporary(forward), temporary(jax.grad(forward))) >= scores
    jax.clear_caches()

"""The transformer against a forward pass written by hand in float64 NumPy, one position and one head at a time."""

import dataclasses
import inspect
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import interp_jax.instrument as instrument
from interp_jax.models import transformer
from interp_jax.models.transformer import Transformer, apply, named_parameters
from interp_jax.models.transformer_config import RotaryScaling, TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_mlp=10, context=9, rotary_base=100.0
)
CONFIGS = {
    "llama": LLAMA,
    "untied": dataclasses.replace(LLAMA, tied_embeddings=False, n_kv_heads=1),
    "plain": dataclasses.replace(
        LLAMA, norm="layer", activation="gelu_tanh", gated_mlp=False, n_kv_heads=4, norm_epsilon=1e-3
    ),
}
ATTENTION_SITES = ["resid_pre", "attn_in", "q", "k", "v", "attn_logits", "attn_probs", "attn_heads", "attn_out"]
LAYER_SITES = [*ATTENTION_SITES, "resid_mid", "mlp_in", "mlp_pre", "mlp_act", "mlp_out", "resid_post"]


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module", params=["unrolled", "stacked"])
def values(config, request):
    """All sites of `random_model(config)` on `random_tokens(config)`, compiled once for all tests that look."""
    model = getattr(transformer, request.param)(random_model(config))
    return jax.tree.map(np.asarray, all_sites(model, random_tokens(config)))


def random_model(config, seed=0):
    """Parameters large enough that every part matters; norms' scales and biases are not 1 and 0. Unrolled."""
    shapes = jax.eval_shape(lambda: Transformer(config, jax.random.key(0), layers="unrolled"))
    rng = np.random.default_rng(seed)
    draws = [rng.normal(float(leaf.ndim == 1), 0.3, leaf.shape) for leaf in jax.tree.leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(draw, jnp.float32) for draw in draws])


def random_tokens(config, batch=2, seq=7):
    return jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=(batch, seq)), jnp.int32)


def reference(config, parameters, tokens):
    """Sites of one row of tokens, (layer, name) -> array. `parameters` are float64, under their dotted names."""
    p, c, sites = parameters, config, {}

    def norm(x, prefix):
        centred = x - x.mean() if c.norm == "layer" else x
        scaled = centred / math.sqrt((centred**2).mean() + c.norm_epsilon) * p[f"{prefix}.scale"]
        return scaled + p[f"{prefix}.bias"] if c.norm == "layer" else scaled

    def act(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def turn(x, position):
        turned, half = np.empty_like(x), c.d_head // 2
        for i in range(half):
            angle = position * c.rotary_base ** (-2 * i / c.d_head)
            turned[i] = math.cos(angle) * x[i] - math.sin(angle) * x[i + half]
            turned[i + half] = math.sin(angle) * x[i] + math.cos(angle) * x[i + half]
        return turned

    def record(name, layer, rows):
        sites[layer, name] = np.stack(rows)
        return sites[layer, name]

    x = record("embed", None, [p["W_embed"][token] for token in tokens])
    positions = range(len(tokens))
    for layer in range(c.n_layers):
        here = f"blocks.{layer}"
        record("resid_pre", layer, x)
        inputs = record("attn_in", layer, [norm(row, f"{here}.attn_norm") for row in x])
        for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
            weight = p[f"{here}.attn.W_{name}"]
            rows = np.array([[row @ weight[:, head] for head in range(heads)] for row in inputs])
            if name != "v":
                rows = [[turn(head, position) for head in rows[position]] for position in positions]
            record(name, layer, rows)
        logits = np.empty((c.n_heads, len(tokens), len(tokens)))
        probs = np.zeros_like(logits)
        read = np.zeros((len(tokens), c.n_heads, c.d_head))
        for head in range(c.n_heads):
            kv = head // (c.n_heads // c.n_kv_heads)
            for query in positions:
                for key in positions:
                    logits[head, query, key] = sites[layer, "q"][query, head] @ sites[layer, "k"][key, kv]
            logits[head] /= math.sqrt(c.d_head)
            for query in positions:
                past = np.exp(logits[head, query, : query + 1])
                probs[head, query, : query + 1] = past / past.sum()
                read[query, head] = probs[head, query] @ sites[layer, "v"][:, kv]
        record("attn_logits", layer, logits)
        record("attn_probs", layer, probs)
        record("attn_heads", layer, read)
        out = p[f"{here}.attn.W_o"]
        attn_out = record("attn_out", layer, [sum(row[h] @ out[h] for h in range(c.n_heads)) for row in read])
        middle = record("resid_mid", layer, x + attn_out)
        inputs = record("mlp_in", layer, [norm(row, f"{here}.mlp_norm") for row in middle])
        linear = inputs @ p[f"{here}.mlp.W_in"]
        pre = record("mlp_pre", layer, inputs @ p[f"{here}.mlp.W_gate"] if c.gated_mlp else linear)
        neurons = record("mlp_act", layer, act(pre) * linear if c.gated_mlp else act(pre))
        mlp_out = record("mlp_out", layer, neurons @ p[f"{here}.mlp.W_out"])
        x = record("resid_post", layer, middle + mlp_out)
    final = record("final_norm", None, [norm(row, "final_norm") for row in x])
    record("logits", None, final @ (p["W_embed"].T if c.tied_embeddings else p["W_unembed"]))
    return sites


def as_float64(model):
    return {name: np.asarray(value, np.float64) for name, value in named_parameters(model).items()}


@jax.jit  # one compilation a config: op by op, as eager code runs, the same takes twenty times as long
def all_sites(model, tokens):
    return instrument.fetch(apply)(model, tokens)[1]


logits_of = jax.jit(apply)


def test_every_site_equals_the_handwritten_pass(config, values):
    model, tokens = random_model(config), random_tokens(config)
    for row in range(len(tokens)):
        expected = reference(config, as_float64(model), np.asarray(tokens[row]))
        assert set(values) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(values[key][row], value, rtol=2e-4, atol=2e-5, err_msg=str(key))


def test_logits_are_the_same_with_and_without_listeners(config, values):
    logits = logits_of(random_model(config), random_tokens(config))
    np.testing.assert_allclose(logits, values[None, "logits"], rtol=1e-4, atol=1e-5)


def test_logits_are_the_same_without_jit():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    np.testing.assert_allclose(apply(model, tokens), logits_of(model, tokens), rtol=1e-4, atol=1e-5)


def test_gradients_equal_finite_differences_of_the_handwritten_pass(config):
    model, tokens = random_model(config), random_tokens(config, batch=1, seq=5)
    weights = np.random.default_rng(1).normal(size=(5, config.vocab_size))
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(apply(m, tokens)[0] * weights)))(model)
    parameters = as_float64(model)

    def objective():
        return (reference(config, parameters, np.asarray(tokens[0]))[None, "logits"] * weights).sum()

    rng, step = np.random.default_rng(2), 1e-5
    for name, value in named_parameters(gradient).items():
        entry = tuple(rng.integers(size) for size in value.shape)
        if name == "W_embed":
            entry = (int(tokens[0, 1]), entry[1])  # a token that occurs
        kept = parameters[name][entry]
        parameters[name][entry] = kept + step
        above = objective()
        parameters[name][entry] = kept - step
        below = objective()
        parameters[name][entry] = kept
        assert float(value[entry]) == pytest.approx((above - below) / (2 * step), rel=2e-3, abs=2e-3), name


def test_no_position_sees_its_future():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % LLAMA.vocab_size)
    before, after = logits_of(model, tokens), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])
    # What makes it so: nothing of the loss at position 3 flows back to later tokens' embeddings.
    gradient = jax.jit(jax.grad(lambda e: instrument.inject(apply)({(None, "embed"): e}, model, tokens)[:, 3].sum()))(
        model.W_embed[...][tokens]
    )
    assert np.abs(gradient[:, :4]).min() > 0
    np.testing.assert_array_equal(gradient[:, 4:], 0)


def test_an_edit_of_attention_logits_cannot_reach_the_future():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)

    @jax.jit
    def edited(model, tokens):
        for _, _, value in (running := instrument.iterate(apply, sites=["attn_logits"])(model, tokens)):
            running.modified_value = jnp.where(np.tri(7, dtype=bool), value, 50.0)
        return running.retval

    # Not to the bit: the edit is compiled into the product before it.
    np.testing.assert_allclose(edited(model, tokens), logits_of(model, tokens), rtol=1e-5, atol=1e-6)


def test_every_site_has_the_documented_shape(config, values):
    c = config
    heads, groups, stream = (2, 7, c.n_heads, c.d_head), (2, 7, c.n_kv_heads, c.d_head), (2, 7, c.d_model)
    square, neurons = (2, c.n_heads, 7, 7), (2, 7, c.d_mlp)
    shapes = dict.fromkeys(LAYER_SITES, stream) | {
        "q": heads,
        "k": groups,
        "v": groups,
        "attn_logits": square,
        "attn_probs": square,
        "attn_heads": heads,
        "mlp_pre": neurons,
        "mlp_act": neurons,
    }
    expected = {(layer, name): shape for layer in range(c.n_layers) for name, shape in shapes.items()}
    expected |= {(None, "embed"): stream, (None, "final_norm"): stream, (None, "logits"): (2, 7, c.vocab_size)}
    assert {key: value.shape for key, value in values.items()} == expected


def test_sites_come_in_the_order_of_computation():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    seen = []

    def look(model, tokens):
        seen.extend((layer, name) for layer, name, _ in instrument.iterate(apply)(model, tokens))
        return tokens

    jax.eval_shape(look, model, tokens)
    layers = [(layer, name) for layer in range(2) for name in LAYER_SITES]
    assert seen == [(None, "embed"), *layers, (None, "final_norm"), (None, "logits")]


def test_the_stream_is_the_sum_of_what_was_added(config, values):
    total = values[None, "embed"]
    for layer in range(config.n_layers):
        np.testing.assert_array_equal(values[layer, "resid_pre"], total)
        for after, before, added in (("resid_mid", "resid_pre", "attn_out"), ("resid_post", "resid_mid", "mlp_out")):
            total = values[layer, before] + values[layer, added]
            np.testing.assert_allclose(values[layer, after], total, rtol=1e-6, atol=1e-6)
        total = values[layer, "resid_post"]


def test_an_edit_acts_on_what_follows_and_on_nothing_before():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    clean = reference(LLAMA, as_float64(model), np.asarray(tokens[0]))

    @jax.jit
    def without_last_mlp(model, tokens):
        for layer, name, value in (running := instrument.iterate(apply)(model, tokens)):
            running.save(f"{layer} {name}", value)
            if (layer, name) == (1, "mlp_out"):
                running.modified_value = jnp.zeros_like(value)
        return running.retval, running.saved

    logits, seen = without_last_mlp(model, tokens)
    np.testing.assert_allclose(seen["1 resid_mid"][0], clean[1, "resid_mid"], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(seen["1 resid_post"][0], clean[1, "resid_mid"], rtol=2e-4, atol=2e-5)
    assert not np.allclose(logits[0], clean[None, "logits"], atol=0.1)


@pytest.mark.caches
@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
def test_a_pass_that_enters_at_a_layer_is_the_rest_of_the_whole_pass(layers):
    config = dataclasses.replace(LLAMA, n_layers=3, window=3, local_layers=(True, False, True))
    model, tokens = getattr(transformer, layers)(random_model(config)), random_tokens(config)
    streams = jnp.asarray(np.random.default_rng(1).normal(size=(3, *tokens.shape, config.d_model)), jnp.float32)
    traces = []

    @jax.jit
    def entered(model, tokens, stream, layer):
        traces.append(None)
        return instrument.fetch(transformer.apply_from, ["resid_pre", "mlp_act"])(model, tokens, stream, layer)

    @jax.jit
    def injected(model, tokens, is_given):
        given: Any = {(layer, "resid_pre"): (streams[layer], is_given[layer]) for layer in range(3)}
        return instrument.inject(apply)(given, model, tokens)

    for layer in range(3):
        logits, found = entered(model, tokens, streams[layer], layer)
        expected = injected(model, tokens, (jnp.arange(3) == layer) & (layer > 0))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        for number in range(3):
            assert np.any(found[number, "mlp_act"]) == (number >= layer)  # zeros: it was not run
        if layer:
            np.testing.assert_array_equal(found[layer, "resid_pre"], streams[layer])
    assert len(traces) == 1


def test_sites_leave_no_trace_when_nothing_listens():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    assert "sow" not in str(jax.make_jaxpr(apply)(model, tokens))


def test_promoted_logits_are_the_last_stretch_of_the_model(config):
    model = random_model(config)
    direction = jax.random.normal(jax.random.key(5), (2, config.d_model))
    promoted = transformer.promoted_logits(model, direction)
    parameters = as_float64(model)
    unembedding = parameters["W_embed"].T if config.tied_embeddings else parameters["W_unembed"]
    expected = np.asarray(direction, np.float64) * parameters["final_norm.scale"] @ unembedding
    np.testing.assert_allclose(promoted, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.caches  # its loop would be traced anew at every step
def test_a_model_is_a_pytree_that_optax_trains():
    model, tokens = Transformer(LLAMA, jax.random.key(0)), random_tokens(LLAMA)
    optimizer = optax.adam(0.03)

    def loss(m):
        return optax.softmax_cross_entropy_with_integer_labels(apply(m, tokens)[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def step(m, state):
        value, gradient = jax.value_and_grad(loss)(m)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(cast(Any, m), updates), state, value

    state, losses = optimizer.init(cast(Any, model)), []
    for _ in range(40):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(math.log(LLAMA.vocab_size), abs=0.1)  # a fresh model is near uniform
    assert losses[-1] < 0.1  # 12 predictions are soon learnt by heart


def test_bfloat16_parameters_compute_in_bfloat16():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    values = all_sites(narrow, tokens)
    assert {value.dtype for value in values.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = logits_of(model, tokens)
    error = np.abs(np.asarray(values[None, "logits"], np.float32) - exact).max()
    assert error < 0.05 * np.abs(exact).max()


def test_rotary_depends_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    q, k = jnp.broadcast_to(q, (1, 12, 1, 8)), jnp.broadcast_to(k, (1, 12, 1, 8))
    scores = np.asarray(jnp.einsum("bqhd,bkhd->qk", transformer.rotate(q, 50.0), transformer.rotate(k, 50.0)))
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)


def test_a_token_outside_the_vocabulary_gives_nan_and_not_another_tokens_logits():
    tokens = random_tokens(LLAMA).at[0, 3].set(LLAMA.vocab_size)
    logits = logits_of(random_model(LLAMA), tokens)
    assert jnp.isnan(logits[0, 3:]).all()
    assert jnp.isfinite(logits[1]).all()


def test_minus_one_is_no_token_either_but_may_stand_where_there_is_padding():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    is_token = jnp.ones_like(tokens, bool).at[0, 0].set(False)
    padded = tokens.at[0, 0].set(-1)
    assert jnp.isnan(logits_of(model, padded)[0]).all()
    for way in (lambda f: f, jax.jit):
        found = way(lambda tokens: model(tokens, is_token=is_token))(padded)
        np.testing.assert_array_equal(
            found, way(lambda tokens: model(tokens, is_token=is_token))(tokens.at[0, 0].set(0))
        )
        assert jnp.isfinite(found).all()


def test_a_token_outside_the_vocabulary_is_told_where_it_can_be_seen():
    for outside in (LLAMA.vocab_size, -1):
        tokens = random_tokens(LLAMA).at[1, 3].set(outside)
        with pytest.raises(ValueError, match=rf"tokens\[1, 3\] is {outside}; the model's tokens are 0 to 22"):
            apply(random_model(LLAMA), tokens)


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match=r"context is 9 tokens.*\(2, 10\)"):
        apply(random_model(LLAMA), random_tokens(LLAMA, seq=10))


def test_rows_that_are_none_are_told():
    model = random_model(LLAMA)
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 0\); .* \[batch, seq\], with at least one token"):
        apply(model, random_tokens(LLAMA, seq=0))
    untyped = inspect.unwrap(Transformer.__call__)
    with pytest.raises(ValueError, match=r"tokens have shape \(7,\); .* for one row give tokens\[None\]"):
        untyped(model, random_tokens(LLAMA)[0])
    with pytest.raises(ValueError, match=r"is_token has shape \(2, 3\), and tokens have \(2, 7\)"):
        untyped(model, random_tokens(LLAMA), is_token=jnp.ones((2, 3), bool))


@pytest.mark.caches
def test_a_cache_without_room_and_rows_beyond_the_context_are_told_where_they_can_be_seen():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA, seq=5)
    _, cache = model.extend(transformer.empty_cache(model, 2, 8), tokens)
    with pytest.raises(ValueError, match=r"cache has 8 slots, 5 of them filled: 5 more do not fit"):
        model.extend(cache, tokens)
    _, cache = model.extend(transformer.empty_cache(model, 2, 12), tokens)
    with pytest.raises(ValueError, match=r"at position 9; the model's context is 9 tokens"):
        model.extend(cache, tokens)
    with pytest.raises(ValueError, match=r"at position 10; the model's context"):
        model(tokens, positions=jnp.broadcast_to(jnp.arange(6, 11), tokens.shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"d_head": 5}, "d_head is 5"),
        (
            {"rotary_scaling": RotaryScaling("each", divisors=(1.0, 2.0))},
            "has 2 values; 6 turned .* have 3 frequencies",
        ),
        ({"norm": "batch"}, "'rms', 'layer'"),
        ({"activation": "relu6"}, "'silu', 'gelu', 'gelu_tanh', 'gelu_sigmoid', 'relu', 'relu_squared'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_tensors_have_the_documented_names_and_shapes(config):
    c, layers = config, range(config.n_layers)
    norms = [f"blocks.{i}.{norm}" for i in layers for norm in ("attn_norm", "mlp_norm")] + ["final_norm"]
    expected: dict[str, tuple[int, ...]] = {"W_embed": (c.vocab_size, c.d_model)}
    expected |= {f"{norm}.scale": (c.d_model,) for norm in norms}
    if c.norm == "layer":
        expected |= {f"{norm}.bias": (c.d_model,) for norm in norms}
    for i in layers:
        expected[f"blocks.{i}.attn.W_q"] = (c.d_model, c.n_heads, c.d_head)
        expected[f"blocks.{i}.attn.W_k"] = expected[f"blocks.{i}.attn.W_v"] = (c.d_model, c.n_kv_heads, c.d_head)
        expected[f"blocks.{i}.attn.W_o"] = (c.n_heads, c.d_head, c.d_model)
        expected |= {f"blocks.{i}.mlp.W_in": (c.d_model, c.d_mlp), f"blocks.{i}.mlp.W_out": (c.d_mlp, c.d_model)}
        if c.gated_mlp:
            expected[f"blocks.{i}.mlp.W_gate"] = (c.d_model, c.d_mlp)
    if not c.tied_embeddings:
        expected["W_unembed"] = (c.d_model, c.vocab_size)
    named = named_parameters(jax.eval_shape(lambda: Transformer(c, jax.random.key(0), layers="unrolled")))
    assert {name: value.shape for name, value in named.items()} == expected

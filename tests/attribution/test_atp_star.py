"""AtP* against brute force: softmaxes one by one, passes patched one by one, paths cut one by one."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import as_model, counting, pair_of
from hand_transformer import run_by_hand
from small_models import small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.activation_patching import activation_patching
from interp_jax.attribution.atp import atp
from interp_jax.attribution.atp_star import atp_star, changed_by_a_key, changed_by_keys
from interp_jax.attribution.metric import LogitDifference
from interp_jax.attribution.nodes import Nodes
from interp_jax.instrument import site
from interp_jax.models.transformer import Transformer, TransformerConfig, apply

pytestmark = pytest.mark.caches


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_one_changed_logit_is_a_softmax_anew(scale):
    """Also where one key has all the attention but for 1e-30, and where a changed one gets all of it."""
    rng = np.random.default_rng(0)
    heads, size = 3, 6
    logits, changed = (scale * rng.normal(size=(heads, size, size)) for _ in range(2))
    slope = rng.normal(size=(heads, size, size))
    sees = np.broadcast_to(np.tril(np.ones((size, size), bool)), logits.shape)

    def softmax(x):
        x = np.where(sees, x, -np.inf)
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    probs = softmax(logits)
    own, rest, top, found = changed_by_keys(
        *(jnp.asarray(each, jnp.float32) for each in (logits, changed)), jnp.asarray(sees)
    )
    effects = changed_by_a_key(own, jnp.asarray(probs, jnp.float32), rest, top, jnp.asarray(slope, jnp.float32))
    np.testing.assert_allclose(found, probs, atol=1e-5)
    for key in range(size):
        anew = logits.copy()
        anew[..., key] = changed[..., key]
        expected = ((softmax(anew) - probs) * slope).sum((-2, -1))
        np.testing.assert_allclose(effects[:, key], expected, atol=2e-4)
        np.testing.assert_allclose(own[..., key], (softmax(anew) - probs)[..., key], atol=2e-5)


CONFIG = TransformerConfig(
    vocab_size=30, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_head=8, d_mlp=24, context=16
)


@pytest.fixture(scope="module")
def grouped():
    """A small random model whose key-value heads serve two query heads each, with attention of some contrast."""
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 2 else leaf, Transformer(CONFIG, jax.random.key(3)))
    return as_model(apply, params, n_layers=3, d_model=16, vocab_size=30)


PAIR = pair_of((4, 7, 1, 9, 2), (4, 8, 1, 3, 2), 5, 6)


@pytest.fixture(scope="module")
def patched_attention(grouped):
    """The attention probabilities with one node patched, times what they are worth at the clean prompt."""
    clean, corrupted = (jnp.asarray(row)[None] for row in (PAIR.clean, PAIR.corrupted))
    metric = LogitDifference(PAIR.answer, PAIR.wrong)
    sites = ["q", "k", "attn_probs"]

    def objective(logits):
        return metric(logits)[0]

    @jax.jit
    def run(params, masks):
        _, here = ij.fetch(grouped.forward, sites)(params, clean)
        _, there = ij.fetch(grouped.forward, sites)(params, corrupted)
        _, slopes = ij.gradients(grouped.forward, "attn_probs", objective=objective)(params, clean)

        def patched(params):
            for layer, name, value in (running := ij.iterate(grouped.forward, sites=sites)(params, clean)):
                if name == "attn_probs":
                    running.save(layer, value)
                else:
                    running.modified_value = jnp.where(masks[layer, name], there[layer, name], value)
                del value
            return running.saved

        return [
            ((probs - here[layer, "attn_probs"]) * slopes[layer, "attn_probs"]).sum()
            for layer, probs in patched(params).items()
        ]

    def effect(which, layer, position, head):
        heads = {"q": CONFIG.n_heads, "k": CONFIG.n_kv_heads}
        keys = [(layer, name) for layer in range(3) for name in "qk"]
        masks = ij.SiteValues({key: np.zeros((5, heads[key[1]], 1), bool) for key in keys})
        masks[layer, which][position, head] = True
        return float(run(grouped.params, masks)[layer])

    return effect


@pytest.mark.slow
def test_the_fix_is_patched_attention_times_its_slope(grouped, patched_attention):
    effects = atp_star(grouped, PAIR, [Nodes("q"), Nodes("k")], grad_drop=False)
    for which, layer, position, head in (
        ("q", 0, 3, 1),
        ("q", 2, 4, 2),
        ("k", 0, 1, 1),
        ("k", 1, 3, 0),
        ("k", 2, 4, 1),
    ):
        expected = patched_attention(which, layer, position, head)
        assert abs(expected) > 1e-5
        assert effects[layer, which][position, head] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    exact = activation_patching(grouped, PAIR, [Nodes("q"), Nodes("k")])
    plain = atp(grouped, PAIR, [Nodes("q"), Nodes("k")])
    correlations = [np.corrcoef(each.flat, exact.flat)[0, 1] for each in (plain, effects)]
    assert correlations[1] > correlations[0], correlations


@pytest.mark.slow
def test_nodes_that_are_coarser_than_a_head_at_a_position(grouped, patched_attention):
    nodes = [Nodes("q"), Nodes("k")]
    fine = atp_star(grouped, PAIR, nodes, grad_drop=False)
    by_head = atp_star(grouped, PAIR, [Nodes("q", by="head"), Nodes("k", by="head")], grad_drop=False)
    by_position = atp_star(grouped, PAIR, [Nodes("q", by="position"), Nodes("k", by="position")], grad_drop=False)
    np.testing.assert_allclose(by_head[1, "q"], fine[1, "q"].sum(0), rtol=1e-4, atol=1e-6)
    for which in "qk":
        np.testing.assert_allclose(by_position[1, which], fine[1, which].sum(1), rtol=1e-4, atol=1e-6)
    # All keys of a head at once share one softmax: no sum over keys.
    expected = patched_attention("k", 1, slice(None), 0)
    assert by_head[1, "k"][0] == pytest.approx(expected, rel=2e-3)


def saturated(params, tokens):
    """The last position attends, as good as only, to the token that its query matches, and passes its value on."""
    x = jnp.asarray(params["embed"])[tokens]
    q = site(x[:, :, None], "q", layer=0)
    k = site(x[:, :, None], "k", layer=0)
    scores = site(200.0 * jnp.einsum("bqhd,bkhd->bhqk", q, k), "attn_logits", layer=0)
    sees = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    probs = site(jax.nn.softmax(jnp.where(sees, scores, -1e30)), "attn_probs", layer=0)
    read = jnp.einsum("bhqk,bkd->bqd", probs, jnp.asarray(params["values"])[tokens])
    out = site(read, "attn_out", layer=0)
    return site(site(out, "mlp_out", layer=0), "logits")


@pytest.fixture
def saturated_model():
    asking = [[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]]  # token 3 asks for token 0, token 4 for token 1
    embed = np.concatenate([np.eye(4)[:3], asking]).astype(np.float32)
    values = np.zeros((5, 3), np.float32)
    values[0, 0], values[1, 1] = 1.0, 1.0
    return as_model(saturated, {"embed": embed, "values": values}, n_layers=1, d_model=4, vocab_size=3)


def test_saturated_attention_is_missed_by_atp_and_found_by_the_fix(saturated_model):
    # Scores of 200 x 0.9 against 200 x 0.82: a probability of 1 but for 1e-7.
    pair = pair_of((0, 1, 2, 3), (0, 1, 2, 4), 0, 1)
    last = (3, 0)
    exact = activation_patching(saturated_model, pair, Nodes("q"))[0, "q"][last]
    assert exact == pytest.approx(-2.0, abs=1e-3)  # from all of token 0 to all of token 1
    assert abs(atp(saturated_model, pair, Nodes("q"))[0, "q"][last]) < 1e-3
    fixed = atp_star(saturated_model, pair, Nodes("q"), grad_drop=False)
    assert fixed[0, "q"][last] == pytest.approx(exact, abs=1e-3)


def cancelling(params, tokens):
    """Layer 0 writes n; layer 1 writes -n (but for a bend), so that the gradient through both is 0; layer 2 is idle."""
    x = jnp.asarray(params["embed"])[tokens]
    n = site(x, "attn_out", layer=0)
    x = site(n + site(0.0 * x, "mlp_out", layer=0), "resid_post", layer=0)
    for layer, weight in ((1, -1.0), (2, 0.0)):
        attn_out = site(0.0 * x, "attn_out", layer=layer)
        mlp_out = site(weight * x + 0.25 * weight * x**2, "mlp_out", layer=layer)
        x = site(x + attn_out + mlp_out, "resid_post", layer=layer)
    return site(x, "logits")


def test_a_cancellation_is_missed_by_atp_and_found_by_grad_drop():
    model = as_model(cancelling, {"embed": np.array([[0.0, 0.0], [1.0, 0.0]], np.float32)}, n_layers=3, d_model=2,
                     vocab_size=2)  # fmt: skip
    pair = pair_of((0, 0), (0, 1), 0, 1)
    nodes = Nodes("attn_out", layers=0)
    exact = activation_patching(model, pair, nodes)[0, "attn_out"][1]
    assert exact == pytest.approx(-0.25)
    assert atp(model, pair, nodes)[0, "attn_out"][1] == pytest.approx(0.0, abs=1e-6)
    # Dropping layer 1 leaves the direct path, worth 1; dropping layer 2 changes nothing; its own layer does not count.
    assert atp_star(model, pair, nodes)[0, "attn_out"][1] == pytest.approx((1.0 + 0.0) / 2)


@pytest.mark.slow
def test_grad_drop_is_the_mean_over_cut_models(grouped):
    nodes = [Nodes("attn_heads"), Nodes("resid_pre", layers=(0, 2)), Nodes("q", layers=1)]
    clean, corrupted = (jnp.asarray(row)[None] for row in (PAIR.clean, PAIR.corrupted))
    metric = LogitDifference(PAIR.answer, PAIR.wrong)
    names = ["attn_heads", "resid_pre"]

    def cut(params, dropped):
        zeros = {
            key: jnp.zeros_like(value) for key, value in ij.fetch(grouped.forward, names)(params, clean)[1].items()
        }

        def measured(added):
            sites = [*names, "attn_out", "mlp_out"]
            for layer, name, value in (running := ij.iterate(grouped.forward, sites=sites)(params, clean)):
                if (layer, name) in added:
                    running.modified_value = value + added[layer, name]
                elif layer == dropped:
                    running.modified_value = jax.lax.stop_gradient(value)
                del value
            return metric(running.retval)[0]

        return jax.grad(measured)(ij.SiteValues(zeros))

    @jax.jit
    def by_hand(params):
        _, here = ij.fetch(grouped.forward, names)(params, clean)
        _, there = ij.fetch(grouped.forward, names)(params, corrupted)
        found = [cut(params, dropped) for dropped in range(3)]
        return ij.SiteValues(
            {key: [((there[key] - here[key]) * each[key])[0].sum(-1) for each in found] for key in here}
        )

    expected = by_hand(grouped.params)
    scores = atp_star(grouped, PAIR, nodes)
    for layer, name in ((0, "attn_heads"), (2, "attn_heads"), (0, "resid_pre"), (2, "resid_pre")):
        others = [np.abs(each) for dropped, each in enumerate(expected[layer, name]) if dropped != layer]
        np.testing.assert_allclose(scores[layer, name], np.mean(others, axis=0), rtol=1e-3, atol=1e-6)
    assert (scores.flat >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "neox"])
def test_both_fixes_by_finite_differences_in_numpy(family):
    """Gemma's kind: key-value heads of two query heads, normed queries and keys, capped logits, a local layer."""
    model = small_model(family, layers="stacked", n_layers=3)
    pair = pair_of(*np.asarray(small_tokens()), 3, 11)
    (_, here), (_, there) = (run_by_hand(model, row) for row in (pair.clean, pair.corrupted))
    n_heads, everything = {"q": 4, "k": here[0, "k"].shape[1]}, np.ones((7, 12), bool)

    def measured(replaced):
        logits = run_by_hand(model, pair.clean, replaced)[0][-1]
        return logits[3] - logits[11]

    def slope(layer, name, place, dropped, step=1e-4):
        """With what the dropped layer adds to the stream held where it is."""
        added = () if dropped is None else ("attn_out", "mlp_out")
        held = [(dropped, name, everything, here[dropped, name]) for name in added]
        ends = []
        for sign in (1, -1):
            moved = here[layer, name].copy()
            moved[place] += sign * step
            ends.append(measured([*held, (layer, name, place, moved)]))
        return (ends[0] - ends[1]) / (2 * step)

    def through_softmax(layer, which, position, head, dropped=None):
        replaced = [(layer, which, (position, head), there[layer, which])]
        change = run_by_hand(model, pair.clean, replaced)[1][layer, "attn_probs"] - here[layer, "attn_probs"]
        places = [tuple(place) for place in np.argwhere(np.abs(change) > 0)]
        return sum(change[place] * slope(layer, "attn_probs", place, dropped) for place in places)

    fixed = atp_star(model, pair, [Nodes("q"), Nodes("k")], grad_drop=False)
    scores = atp_star(model, pair, [Nodes("q"), Nodes("k"), Nodes("attn_heads", by=("position", "head", "unit"))])
    for layer, which, position in ((0, "q", 5), (0, "k", 4), (1, "q", 6), (1, "k", 2), (2, "k", 5)):
        head = n_heads[which] - 1
        expected = through_softmax(layer, which, position, head)
        size = float(np.abs(fixed[layer, which]).max())
        assert fixed[layer, which][position, head] == pytest.approx(expected, abs=2e-4 * size)
    for layer, which in ((0, "q"), (2, "k")):
        others = [abs(through_softmax(layer, which, 5, 1, dropped)) for dropped in range(3) if dropped != layer]
        assert scores[layer, which][5, 1] == pytest.approx(
            np.mean(others), abs=2e-4 * float(scores[layer, which].max())
        )
    difference = there[1, "attn_heads"] - here[1, "attn_heads"]
    for place in ((6, 0, 3), (5, 2, 1)):
        others = [abs(difference[place] * slope(1, "attn_heads", place, dropped)) for dropped in (0, 2)]
        expected = pytest.approx(np.mean(others), abs=2e-4 * float(scores[1, "attn_heads"].max()))
        assert scores[1, "attn_heads"][place] == expected


def test_layers_dropped_together_are_those_dropped_one_by_one(monkeypatch):
    """Four layers, which are two passes of three, the second filled up."""
    module = importlib.import_module("interp_jax.attribution.atp_star")
    model, tokens = small_model("llama", n_layers=4), small_tokens()
    pair = pair_of(tokens[0], tokens[1], 1, 4)
    found = atp_star(model, pair, [Nodes("mlp_out"), Nodes("resid_pre")], qk_fix=False)
    monkeypatch.setattr(module, "_TOGETHER", 1)
    module._atp_star.clear_cache()
    expected = atp_star(model, pair, [Nodes("mlp_out"), Nodes("resid_pre")], qk_fix=False)
    module._atp_star.clear_cache()
    # The same sums in another order.
    np.testing.assert_allclose(found.flat, expected.flat, atol=1e-6 * np.abs(expected.flat).max())


def test_compiled_once_a_shape_and_bad_input(saturated_model):
    model, traces = counting(saturated_model)
    nodes = [Nodes("q"), Nodes("attn_out")]
    atp_star(model, pair_of((0, 1, 2, 3), (0, 1, 2, 4), 0, 1), nodes, grad_drop=False)
    before = len(traces)
    atp_star(model, pair_of((1, 0, 2, 4), (1, 0, 2, 3), 0, 2), nodes, grad_drop=False)
    assert len(traces) == before
    with pytest.raises(ValueError, match="does not tell them apart"):
        atp_star(model, pair_of((0, 1, 2, 3), (0, 1, 2, 4), 0, 1), nodes, metric=_first, grad_drop=False)
    with pytest.raises(ValueError, match="by hand has one alone"):
        atp_star(model, pair_of((0, 1, 2, 3), (0, 1, 2, 4), 0, 1), nodes)
    without = as_model(cancelling, {"embed": np.eye(2, dtype=np.float32)}, n_layers=3, d_model=2, vocab_size=2)
    counted, traces = counting(without)
    with pytest.raises(ValueError, match="does not tell them apart"):
        atp_star(counted, pair_of((0, 0), (0, 1), 0, 1), Nodes("attn_out"), metric=_first)
    assert len(traces) == 2  # its sites, and both prompts' metric: nothing else is compiled before
    with pytest.raises(ValueError, match="no site 'q'"):
        atp_star(without, pair_of((0, 0), (0, 1), 0, 1), Nodes("q"))
    with pytest.raises(ValueError, match="for whole heads: name q"):
        atp_star(model, pair_of((0, 1), (1, 0), 0, 1), Nodes("q", by="unit"))


def _first(logits):
    return logits[:, 0, 0]

"""Patched effects against plain re-running: NumPy statements, and a loop over `ij.inject`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import LAYERS, SEQ, counting, linear_by_hand, linear_model, pair_of

import interp_jax as ij
from interp_jax.attribution.activation_patching import Patching, activation_patching, joint_patching
from interp_jax.attribution.metric import KL, LogitDifference, Loss
from interp_jax.attribution.nodes import Node, Nodes

pytestmark = pytest.mark.caches  # many compiled passes

CLEAN, CORRUPTED = (0, 3, 1, 2), (0, 4, 1, 5)
NODES = [Nodes("resid_post"), Nodes("mlp_out", by="position", layers=(0, 2))]


def difference(logits):
    return logits[-1, 1] - logits[-1, 4]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_effects_are_those_of_running_again(direction):
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    effects = activation_patching(model, pair, NODES, direction=direction)
    base, other = (CLEAN, CORRUPTED) if direction == "noising" else (CORRUPTED, CLEAN)
    base_logits, _ = linear_by_hand(model.params, base)
    _, values = linear_by_hand(model.params, other)
    for (layer, name), found in effects.items():
        for position in range(SEQ):
            replaced = [(name, layer, position, values[layer, name][position])]
            patched, _ = linear_by_hand(model.params, base, replaced)
            assert found[position] == pytest.approx(difference(patched) - difference(base_logits), abs=2e-5)
    assert effects.clean == pytest.approx(difference(linear_by_hand(model.params, CLEAN)[0]), abs=1e-5)
    assert len(effects) == LAYERS + 2
    assert effects.labels == ("t0", "t3 → t4", "t1", "t2 → t5")


def test_ablations_put_in_what_they_say():
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    prompts = np.array([[1, 2, 3, 4], [5, 0, 5, 1], [2, 2, 0, 3]])
    base, _ = linear_by_hand(model.params, CLEAN)
    values = [linear_by_hand(model.params, row)[1][1, "resid_post"] for row in prompts]

    def by_hand(put_in, position):
        patched, _ = linear_by_hand(model.params, CLEAN, [("resid_post", 1, position, put_in[position])])
        return difference(patched) - difference(base)

    nodes = Nodes("resid_post", layers=1)
    zero = activation_patching(model, pair, nodes, ablation="zero")[1, "resid_post"]
    mean = activation_patching(model, pair, nodes, ablation="mean", prompts=prompts)[1, "resid_post"]
    resampled = activation_patching(model, pair, nodes, ablation="resample", prompts=prompts, metric=SQUARED)
    for position in range(SEQ):
        assert zero[position] == pytest.approx(by_hand(np.zeros_like(values[0]), position), abs=2e-5)
        assert mean[position] == pytest.approx(by_hand(np.mean(values, axis=0), position), abs=2e-5)
        replaced = [
            linear_by_hand(model.params, CLEAN, [("resid_post", 1, position, value[position])])[0] for value in values
        ]
        expected = np.mean([difference(logits) ** 2 for logits in replaced]) - difference(base) ** 2
        assert resampled[1, "resid_post"][position] == pytest.approx(expected, abs=2e-5)


def _squared(logits):
    return (logits[:, -1, 1] - logits[:, -1, 4]) ** 2


SQUARED = _squared


@pytest.fixture(scope="module")
def injected(tiny, pair):
    """The logits of the clean prompt with the corrupted one's values of `sites` where masks are true."""
    names = ["resid_mid", "attn_heads", "k", "q", "mlp_act"]

    @jax.jit
    def run(params, masks):
        clean, corrupted = jnp.asarray(pair.clean)[None], jnp.asarray(pair.corrupted)[None]
        _, values = ij.fetch(tiny.forward, names)(params, corrupted)
        return ij.inject(tiny.forward)({key: (values[key], masks[key]) for key in masks}, params, clean)

    with jax.check_tracer_leaks(False):
        _, values = jax.eval_shape(lambda: ij.fetch(tiny.forward, names)(tiny.params, jnp.asarray(pair.clean)[None]))
    shapes = {key: value.shape[1:] for key, value in values.items()}

    def difference(places):
        masks = ij.SiteValues({key: np.zeros(shape, bool) for key, shape in shapes.items()})
        for key, place in places:
            masks[key][place] = True
        return float(LogitDifference(pair.answer, pair.wrong)(run(tiny.params, masks))[0])

    return difference


def test_the_tiny_model_agrees_with_inject(tiny, pair, injected):
    nodes = [Nodes("resid_mid", layers=1), Nodes("attn_heads", layers=(0, 3)), Nodes("k", by="head", layers=2)]
    effects = activation_patching(tiny, pair, nodes)
    assert effects.clean == pytest.approx(injected([]), abs=1e-5)
    for key, index, place in (
        ((1, "resid_mid"), (3,), (3,)),
        ((0, "attn_heads"), (6, 2), (6, 2)),
        ((3, "attn_heads"), (6, 0), (6, 0)),
        ((2, "k"), (1,), (slice(None), 1)),
    ):
        assert effects[key][index] == pytest.approx(injected([(key, place)]) - injected([]), abs=2e-5)


def test_sets_of_nodes_are_patched_at_once(tiny, pair, injected):
    sets = [
        [Node(1, "q", head=3), Node(1, "q", position=6, head=0), Node(2, "mlp_act", unit=17)],
        [],
        [Node(2, "mlp_act", position=6)],
    ]
    everywhere = slice(None)
    expected = [
        injected([((1, "q"), (everywhere, 3)), ((1, "q"), (6, 0)), ((2, "mlp_act"), (everywhere, 17))]),
        injected([]),
        injected([((2, "mlp_act"), 6)]),
    ]
    np.testing.assert_allclose(joint_patching(tiny, pair, sets), np.array(expected) - expected[1], atol=2e-5)


def test_other_metrics():
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED)
    rows = [jax.nn.log_softmax(linear_by_hand(model.params, tokens)[0]) for tokens in (CLEAN, CORRUPTED)]
    reference, other = (row[-1].astype(jnp.float32) for row in rows)
    nodes = Nodes("resid_post", by=(), layers=LAYERS - 1)  # the whole last stream: the other prompt's output
    kl = activation_patching(model, pair, nodes, metric=KL(reference))
    divergence = float((jnp.exp(reference) * (reference - other)).sum())
    assert float(kl[LAYERS - 1, "resid_post"]) == pytest.approx(divergence, abs=1e-5)
    loss = activation_patching(model, pair, nodes, metric=Loss(jnp.asarray(CLEAN)))
    by_hand = [-np.mean([row[place, CLEAN[place + 1]] for place in range(SEQ - 1)]) for row in rows]
    assert float(loss[LAYERS - 1, "resid_post"]) == pytest.approx(by_hand[1] - by_hand[0], abs=1e-5)


def test_compiled_once_a_shape():
    model, traces = counting(linear_model())
    activation_patching(model, pair_of(CLEAN, CORRUPTED, 1, 4), NODES)
    before = len(traces)
    assert before <= 4  # the sites, what is patched in, the patched pass
    activation_patching(model, pair_of((5, 3, 2, 2), (5, 4, 1, 0), 2, 3), NODES)
    activation_patching(model, pair_of(CLEAN, CORRUPTED, 0, 4), NODES, direction="denoising")
    patching = Patching(model, pair_of(CLEAN, CORRUPTED, 2, 4), NODES)
    patching.of_sets(np.ones((3, patching.n_nodes), bool))
    assert len(traces) == before


def test_the_budget_sets_the_rows_and_too_small_a_one_is_refused():
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    whole = Patching(model, pair, NODES)
    assert whole.rows == whole.n_nodes == 20
    needed = whole._needed(7)
    small = Patching(model, pair, NODES, memory_budget=needed)
    assert 1 <= small.rows <= 7
    assert small._needed(small.rows) <= needed
    done = []
    np.testing.assert_allclose(small.of_nodes(range(20), done.append), whole.of_nodes(range(20)), atol=1e-6)
    assert sum(done) == 20
    with pytest.raises(ValueError, match=r"one row needs [\d,]+ bytes .* budget of 100"):
        activation_patching(model, pair, NODES, memory_budget=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": Nodes("resid_pst")}, "Did you mean 'resid_post'"),
        ({"metric": lambda logits: logits[:, 0, 0]}, "does not tell them apart"),
        ({"ablation": "zero", "direction": "denoising"}, "Denoising puts clean values"),
        ({"ablation": "mean"}, "give both or neither"),
        ({"ablation": "mean", "prompts": np.zeros((2, 3), int)}, "as long as the pair's"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        activation_patching(linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4), **{"nodes": Nodes("resid_post")} | options)

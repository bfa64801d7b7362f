"""Patched effects against plain re-running: NumPy statements, and a loop over `ij.inject`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import LAYERS, SEQ, counting, linear_by_hand, linear_model, pair_of
from hand_transformer import run_by_hand
from small_models import foreign, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.activation_patching import Patching, activation_patching, joint_patching
from interp_jax.attribution.metric import KL, LogitDifference, Loss
from interp_jax.attribution.nodes import Node, Nodes, as_mask, sites_of
from interp_jax.models import transformer

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


EVERYWHERE = [
    Nodes("mlp_act", by="unit"), Nodes("resid_post"), Nodes("embed"), Nodes("q", layers=(1, 2)), Nodes("k", by="head"),
    Nodes("v", layers=(2, 0)), Nodes("attn_heads", layers=2), Nodes("resid_pre"),
]  # fmt: skip


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("family", "layers", "direction"),
    [
        ("neox", "stacked", "denoising"),
        ("gemma", "stacked", "noising"),
        pytest.param("llama", "stacked", "noising", marks=pytest.mark.slow),
        pytest.param("gpt2", "unrolled", "noising", marks=pytest.mark.slow),
        pytest.param("gemma", "unrolled", "denoising", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_enters_at_its_lowest_layer_gives_what_the_whole_pass_gives(family, layers, direction):
    """Also one node at a time and in sets, against a pass written by hand."""
    model = small_model(family, layers=layers, n_layers=3)
    pair = pair_of(*np.asarray(small_tokens()), 3, 11)
    patching, whole = (Patching(each, pair, EVERYWHERE, direction=direction) for each in (model, foreign(model)))
    assert patching._streams is not None
    assert whole._streams is None
    rng = np.random.default_rng(0)
    order = rng.permutation(patching.n_nodes)
    effects = np.zeros(patching.n_nodes, np.float32)
    effects[order] = patching.of_nodes(order)
    of_whole = whole.of_nodes(range(whole.n_nodes))
    rounding = 1e-5 * abs(of_whole).max()
    np.testing.assert_allclose(effects, of_whole, atol=rounding)

    base, other = (pair.clean, pair.corrupted) if direction == "noising" else (pair.corrupted, pair.clean)
    _, values = run_by_hand(model, other)
    named = patching.as_effects(effects)

    def by_hand(numbers):
        masks = as_mask(model, [named.node(int(number)) for number in numbers], pair.seq)
        replaced = [(layer, name, mask, values[layer, name]) for (layer, name), mask in masks.items()]
        logits = run_by_hand(model, base, replaced)[0][-1]
        return logits[3] - logits[11]

    some = rng.choice(patching.n_nodes, 40, replace=False)
    expected = np.array([by_hand([number]) for number in some]) - by_hand([])
    np.testing.assert_allclose(effects[some], expected, atol=rounding)

    last = patching.n_nodes - np.arange(7)  # resid_pre of the last layer
    numbers = [[], last[2:5], rng.choice(patching.n_nodes, 5), rng.choice(patching.n_nodes, 60)]
    sets = np.zeros((4, patching.n_nodes), bool)
    for row, each in zip(sets, numbers, strict=True):
        row[np.asarray(each, int)] = True
    expected = np.array([by_hand(np.flatnonzero(row)) for row in sets]) - by_hand([])
    np.testing.assert_allclose(patching.of_sets(sets), expected, atol=rounding)


@pytest.mark.usefixtures("quick_compilation")
def test_one_program_enters_at_every_layer(monkeypatch):
    """And what is below is not looked at: the base run's streams are spoilt there."""
    traces = []

    def counted(*given):
        traces.append(None)
        return enter(*given)

    enter = transformer.apply_from
    monkeypatch.setattr(transformer, "apply_from", counted)
    model, (clean, corrupted) = small_model(layers="stacked", n_layers=3), np.asarray(small_tokens(seq=5))
    patching = Patching(model, pair_of(clean, corrupted, 3, 11), Nodes("mlp_out"))
    expected = patching.of_nodes(range(15))
    before = len(traces)
    assert 1 <= before <= 2
    streams = patching._streams
    for layer in range(3):
        patching._streams = jnp.where((jnp.arange(3) == layer)[:, None, None], streams, jnp.nan)
        places = layer * 5 + np.arange(5)
        np.testing.assert_allclose(patching.of_nodes(places), expected[places], atol=1e-5)
    sets = [
        [Node(1, "mlp_out", position=2), Node(2, "mlp_out")],
        [Node(0, "mlp_out")],
        [Node(2, "mlp_out", position=4)],
    ]
    backward = joint_patching(model, pair_of(corrupted, clean, 4, 7), sets, direction="denoising")
    whole = joint_patching(foreign(model), pair_of(corrupted, clean, 4, 7), sets, direction="denoising")
    np.testing.assert_allclose(backward, whole, atol=1e-5)
    patching = Patching(model, pair_of(corrupted, clean, 5, 2), Nodes("mlp_out"), ablation="zero")
    patching.of_nodes(range(15))
    assert len(traces) == before


@pytest.mark.usefixtures("quick_compilation")
def test_other_prompts_values_are_put_into_a_batch_that_enters_above():
    model, tokens = small_model("neox", layers="stacked", n_layers=3), np.asarray(small_tokens(batch=5))
    pair, nodes = pair_of(tokens[0], tokens[1], 3, 11), [Nodes("attn_out", layers=(2, 1)), Nodes("resid_pre", layers=1)]
    for ablation in ("mean", "resample"):
        found, whole = (
            activation_patching(each, pair, nodes, ablation=ablation, prompts=tokens[2:])
            for each in (model, foreign(model))
        )
        np.testing.assert_allclose(found.flat, whole.flat, atol=1e-5)


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
    with pytest.raises(
        ValueError, match=rf"one row needs {whole._needed(1):,} bytes .* budget of {whole._needed(1) - 1:,}"
    ):
        activation_patching(model, pair, NODES, memory_budget=whole._needed(1) - 1)


def test_a_budget_that_cannot_hold_what_is_patched_in_is_refused_before_the_model_runs():
    (model, traces), pair = counting(linear_model()), pair_of(CLEAN, CORRUPTED, 1, 4)
    sites_of(model, SEQ)
    before = len(traces)
    with pytest.raises(ValueError, match=r"one row needs at least [\d,]+ bytes .* budget of 100"):
        activation_patching(model, pair, NODES, memory_budget=100)
    assert len(traces) == before


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

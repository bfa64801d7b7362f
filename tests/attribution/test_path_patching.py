"""Path patching against running again by hand, with what is frozen put in statement by statement."""

import jax
import jax.numpy as jnp
import pytest
from hand_models import LAYERS, counting, linear_by_hand, linear_model, pair_of

import interp_jax as ij
from interp_jax.attribution.activation_patching import joint_patching
from interp_jax.attribution.metric import LogitDifference
from interp_jax.attribution.nodes import Node
from interp_jax.attribution.path_patching import path_patching

pytestmark = pytest.mark.caches

CLEAN, CORRUPTED = (0, 3, 1, 2), (0, 4, 1, 5)
EVERYTHING = slice(None)


def difference(logits):
    return logits[-1, 1] - logits[-1, 4]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_only_the_direct_path_counts(direction):
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    base, other = (CLEAN, CORRUPTED) if direction == "noising" else (CORRUPTED, CLEAN)
    base_logits, at_base = linear_by_hand(model.params, base)
    _, at_other = linear_by_hand(model.params, other)
    senders = [[Node(0, "mlp_out", position=1)], [Node(None, "embed", position=3), Node(0, "attn_out")]]
    receivers = [Node(2, "mlp_out", position=3), Node(1, "attn_out", position=1)]
    found = path_patching(model, pair, senders, receivers, direction=direction)
    put_in = [
        [("mlp_out", 0, 1, at_other[0, "mlp_out"][1])],
        [("embed", None, 3, at_other[None, "embed"][3]), ("attn_out", 0, EVERYTHING, at_other[0, "attn_out"])],
    ]
    for effect, sent in zip(found, put_in, strict=True):
        values = {}
        for layer, name in ((2, "mlp_out"), (1, "attn_out")):  # each seen before it would be frozen
            frozen = [
                (where, at, EVERYTHING, at_base[at, where])
                for where in ("attn_out", "mlp_out")
                for at in range(LAYERS)
                if (at, where) != (layer, name)
            ]
            values[layer, name] = linear_by_hand(model.params, base, [*frozen, *sent])[1][layer, name]
        arrived = [("mlp_out", 2, 3, values[2, "mlp_out"][3]), ("attn_out", 1, 1, values[1, "attn_out"][1])]
        logits, _ = linear_by_hand(model.params, base, arrived)
        assert abs(difference(logits) - difference(base_logits)) > 1e-4
        assert effect == pytest.approx(difference(logits) - difference(base_logits), abs=2e-5)


def test_to_the_end_of_the_stream_it_is_the_direct_effect_and_less_than_the_whole():
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    senders = [[Node(0, "mlp_out", position=3)], []]
    direct, nothing = path_patching(model, pair, senders, [Node(LAYERS - 1, "resid_post")])
    change = (
        linear_by_hand(model.params, CORRUPTED)[1][0, "mlp_out"] - linear_by_hand(model.params, CLEAN)[1][0, "mlp_out"]
    )[3]
    assert direct == pytest.approx(difference((change @ model.params["out"])[None]), abs=2e-5)
    assert nothing == pytest.approx(0.0, abs=1e-6)
    assert abs(direct - joint_patching(model, pair, senders)[0]) > 1e-3


@pytest.mark.slow
def test_a_head_to_queries_of_a_later_layer(tiny, pair):
    clean, corrupted = (jnp.asarray(row)[None] for row in (pair.clean, pair.corrupted))
    metric = LogitDifference(pair.answer, pair.wrong)

    @jax.jit
    def by_hand(params):
        _, here = ij.fetch(tiny.forward, ["attn_heads", "attn_out", "mlp_out"])(params, clean)
        _, there = ij.fetch(tiny.forward, "attn_heads")(params, corrupted)
        # What head 3 of layer 0 adds to the stream is linear in it.
        _, heads = ij.fetch(ij.inject(tiny.forward), "attn_out", 0)(
            {(0, "attn_heads"): here[0, "attn_heads"].at[:, :, 3].set(there[0, "attn_heads"][:, :, 3])}, params, clean
        )
        given = {key: value for key, value in here.items() if key[1] != "attn_heads"}
        given[0, "attn_out"] = heads[0, "attn_out"]
        _, queries = ij.fetch(ij.inject(tiny.forward), "q", 2)(given, params, clean)
        arrived = ij.inject(tiny.forward)({(2, "q"): queries[2, "q"]}, params, clean)
        return metric(arrived)[0] - metric(tiny.forward(params, clean))[0]

    expected = float(by_hand(tiny.params))
    found = path_patching(
        tiny, pair, [[Node(0, "attn_heads", head=3)], [Node(0, "mlp_act", position=6)]], [Node(2, "q")]
    )
    assert abs(expected) > 1e-4
    assert found[0] == pytest.approx(expected, abs=2e-5)


@pytest.mark.usefixtures("without_type_checks")
def test_compiled_once_a_shape_and_bad_input():
    model, traces = counting(linear_model())
    pair = pair_of(CLEAN, CORRUPTED, 1, 4)
    senders, receivers = [[Node(0, "mlp_out", position=1)]], [Node(2, "attn_out")]
    path_patching(model, pair, senders, receivers)
    before = len(traces)
    path_patching(model, pair_of((5, 3, 2, 2), (5, 4, 1, 0), 2, 3), [[Node(0, "mlp_out", position=2)]], receivers)
    assert len(traces) == before
    with pytest.raises(ValueError, match="no site 'attn_heads'"):
        path_patching(model, pair, [[Node(0, "attn_heads")]], receivers)
    with pytest.raises(ValueError, match="no nodes in any"):
        path_patching(model, pair, [[]], receivers)
    with pytest.raises(ValueError, match="budget of 10"):
        path_patching(model, pair, senders, receivers, memory_budget=10)
    with pytest.raises(ValueError, match="direction is one of noising, denoising; got 'denoise'"):
        path_patching(model, pair, senders, receivers, direction="denoise")
    with pytest.raises(ValueError, match="Expected sets of nodes"):
        path_patching(model, pair, senders[0], receivers)


def test_paths_that_are_none_are_refused(tiny, pair):
    with pytest.raises(ValueError, match="inside one block"):
        path_patching(tiny, pair, [[Node(1, "v", head=0)]], [Node(1, "attn_heads", head=0)])
    with pytest.raises(ValueError, match="How final_norm comes to the stream is not known"):
        path_patching(tiny, pair, [[Node(None, "final_norm")]], [Node(1, "q")])

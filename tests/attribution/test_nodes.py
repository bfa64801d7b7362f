"""Families of nodes, and effects as tables and grids."""

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.attribution.nodes import Effects, Node, Nodes, as_mask, every_stream_site, resolve, sites_of


@pytest.mark.usefixtures("without_type_checks")
def test_families_have_the_models_shapes(tiny):
    stream, heads, probs, neurons, embed = resolve(
        tiny,
        [Nodes("resid_post"), Nodes("q"), Nodes("attn_probs"), Nodes("mlp_act", layers=(3, 1)), Nodes("embed")],
        seq=6,
    )
    assert (stream.layers, stream.by, stream.by_shape, stream.n_nodes) == ((0, 1, 2, 3), ("position",), (6,), 24)
    assert (heads.by, heads.by_shape, heads.spread_shape) == (("position", "head"), (6, 4), (6, 4, 1))
    assert (probs.by, probs.shape) == (("head", "position", "key"), (4, 6, 6))
    assert (neurons.layers, neurons.by_shape) == ((3, 1), (6, 352))
    assert embed.layers == (None,)
    assert resolve(tiny, Nodes("q", by=["head"], layers=[2, 0]), 6) == resolve(tiny, Nodes("q", "head", (2, 0)), 6)
    (whole_heads,) = resolve(tiny, Nodes("attn_heads", by="head"), seq=6)
    value = jnp.arange(6 * 4 * 32, dtype=jnp.float32).reshape(6, 4, 32)
    np.testing.assert_allclose(whole_heads.summed(value), value.sum((0, 2)))
    assert resolve(tiny, Nodes("mlp_act", by=("neuron",)), seq=6)[0].by == ("unit",)
    assert {nodes.site for nodes in every_stream_site(tiny, 6)} >= {"q", "attn_probs", "mlp_act", "resid_post"}
    assert resolve(tiny, Nodes("q", layers=np.int64(1)), seq=6)[0].layers == (1,)
    assert sites_of(tiny, 6) is sites_of(tiny, 6)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (Nodes("resid_pst"), "no site 'resid_pst'. Did you mean 'resid_post'"),
        (Nodes("resid_post", layers=9), "no resid_post in layer 9; there is one in layers 0, 1, 2, 3"),
        (Nodes("resid_post", by="head"), "no axis head; it has position, unit"),
        (Nodes("resid_post", layers=(1, 1)), "named twice"),
        (Nodes("resid_post", layers=()), "name no layer"),
        ("resid_post", r"Expected Nodes, as Nodes\('resid_post', by='position'\), got 'resid_post'"),
        (Node(0, "resid_post"), "Expected Nodes"),
        ([], "no nodes"),
        ([Nodes("q"), Nodes("q", by="head")], "have the site q"),
    ],
)
def test_nodes_that_do_not_exist_are_refused(tiny, nodes, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny, nodes, seq=6)


def test_masks_are_true_where_a_node_is(tiny):
    masks = as_mask(tiny, [Node(1, "q", head=2, position=3), Node(1, "q", head=0), Node(None, "embed", position=5)], 6)
    assert set(masks) == {(1, "q"), (None, "embed")}
    expected = np.zeros((6, 4, 32), bool)
    expected[3, 2], expected[:, 0] = True, True
    np.testing.assert_array_equal(masks[1, "q"], expected)
    assert masks[None, "embed"].sum() == 128
    for node, message in (
        (Node(1, "q", head=4), "L1 q, head 4 does not exist: its head can be 0 to 3"),
        (Node(1, "resid_post", head=0), "no axis head"),
        (Node(None, "q", head=0), "stands in layers"),
        (Node(4, "q"), "in layer 4"),
    ):
        with pytest.raises(ValueError, match=message):
            as_mask(tiny, node, 6)


def test_effects_are_ranked_named_and_put_in_grids(tiny):
    families = resolve(tiny, [Nodes("resid_post", layers=(0, 2)), Nodes("attn_heads", layers=1)], seq=3)
    stream = np.array([[0.5, -3.0, 0.0], [1.0, 0.0, 0.1]])
    heads = np.zeros((1, 3, 4))
    heads[0, 2, 1], heads[0, 0, 1] = -2.0, 0.25
    effects = Effects(families, [stream, heads], ["a", "b", "c"])
    assert list(effects) == [(0, "resid_post"), (2, "resid_post"), (1, "attn_heads")]
    np.testing.assert_allclose(effects[2, "resid_post"], stream[1])
    first, second, third = effects.ranked(3)
    assert first.node == Node(0, "resid_post", position=1)
    assert first.effect == -3.0
    assert second.label == "L1 attn_heads, position 2 'c', head 1"
    assert third.node == Node(2, "resid_post", position=0)
    assert [effects.node(number) for number in (1, 6 + 2 * 4 + 1)] == [first.node, second.node]
    assert effects.flat[6 + 9] == -2.0
    np.testing.assert_allclose(effects.grid("resid_post"), stream)
    np.testing.assert_allclose(effects.grid("attn_heads", "head"), [[0, -1.75, 0, 0]])
    assert effects.table(2).splitlines()[1:] == [f"{-3:>+10.4f}  {first.label}", f"{-2:>+10.4f}  {second.label}"]
    with pytest.raises(ValueError, match="not by head"):
        effects.grid("resid_post", "head")
    with pytest.raises(ValueError, match="there is resid_post, attn_heads"):
        effects.grid("q")
    with pytest.raises(KeyError, match="was not attributed to"):
        _ = effects[1, "resid_post"]

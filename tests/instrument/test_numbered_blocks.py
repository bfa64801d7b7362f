"""Blocks that do not know their number, in a loop and in a scan, on arrays that stand in for a library's named ones."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.instrument.numbered_blocks import block_site, model_site, next_block, numbering_blocks, scanned_blocks

LAYERS = 3
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
W = np.sin(np.arange(LAYERS * 16, dtype=np.float32)).reshape(LAYERS, 4, 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    data_array: jax.Array
    named_axes: collections.OrderedDict = dataclasses.field(metadata={"static": True})

    def with_positional_prefix(self):
        return self

    def map(self, function):
        return dataclasses.replace(self, data_array=function(self.data_array))


def named(array):
    return Named(jnp.asarray(array), collections.OrderedDict(batch=2, d=4))


def norm(x):
    return model_site(x.map(lambda array: array / 2), "norm", "d")


def block(x, w):
    with next_block():
        out = block_site(norm(x).map(lambda array: jnp.tanh(array @ w)), "mlp_out", "d")
        return block_site(out.map(lambda array: array + x.data_array), "resid_post", "d")


def looped(x, w, wrap=lambda function: function):
    with numbering_blocks():
        x = named(x)
        for each in w:
            x = wrap(block)(x, each)
        return norm(x).data_array


def scanned(x, w):
    with numbering_blocks():
        x, _ = ij.layer_scan(scanned_blocks(lambda x, w: (block(x, w), None)), named(x), w)
        return norm(x).data_array


SITES = [*((layer, name) for layer in range(LAYERS) for name in ("mlp_out", "resid_post")), (None, "norm")]


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "model",
    [
        looped,
        lambda x, w: looped(x, w, jax.jit),
        lambda x, w: looped(x, w, jax.checkpoint),
        scanned,
    ],
    ids=["loop", "loop of jit", "loop of checkpoint", "scan"],
)
def test_sites_have_the_number_of_their_block(model, around):
    out, values = around(lambda x, w: ij.fetch(model)(x, w))(X, W)
    expected, x = {}, X
    for layer, w in enumerate(W):
        expected[layer, "mlp_out"] = np.tanh(x / 2 @ w)
        expected[layer, "resid_post"] = x = x + expected[layer, "mlp_out"]
    expected[None, "norm"] = x / 2
    assert set(values) == set(SITES)
    for site, value in expected.items():
        np.testing.assert_allclose(values[site], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out, x / 2, rtol=1e-5, atol=1e-6)


def test_they_come_in_the_order_in_which_they_run():
    for model in (looped, scanned):
        assert [(row.layer, row.name) for row in ij.list_sites(model)(X, W)] == SITES


def test_each_call_of_the_model_counts_from_zero():
    seen = []
    for layer, name, _ in ij.iterate(lambda: (looped(X, W), scanned(X, W), looped(X, W)))():
        seen.append((layer, name))
    assert seen == SITES * 3


def test_a_pass_that_is_left_in_a_block_leaves_no_trace():
    for layer, _, _ in ij.iterate(looped)(X, W):
        if layer == 1:
            break
    assert ij.list_sites(lambda x: norm(named(x)).data_array)(X) == ij.list_sites(lambda x: x)(X)
    assert list(ij.fetch(looped)(X, W)[1]) == SITES


def test_general_layers_have_no_sites_elsewhere():
    for _ in ij.iterate(lambda: block_site(norm(named(X)), "mlp_out", "no such axis"))():
        pytest.fail("a site outside of a model")


def test_a_block_on_its_own_has_sites_without_a_layer():
    _, values = ij.fetch(lambda: block(named(X), W[0]))()
    assert list(values) == [(None, "mlp_out"), (None, "resid_post")]


def test_with_nothing_listening_nothing_is_traced():
    def bare(x, w):
        for each in w:
            x = jnp.tanh(x / 2 @ each) + x
        return x / 2

    assert str(jax.make_jaxpr(looped)(X, W)) == str(jax.make_jaxpr(bare)(X, W))

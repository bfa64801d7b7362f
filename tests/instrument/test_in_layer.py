"""Layers in a Python loop whose sites take no layer, against the same layers under a layer scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.instrument import in_layer

LAYERS = 3
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
W = np.sin(np.arange(LAYERS * 16, dtype=np.float32)).reshape(LAYERS, 4, 4)


def block(x, w):
    out = ij.site(jnp.tanh(x @ w), "mlp_out")
    return ij.site(x + out, "resid_post")


def looped(x, w, wrap=lambda function: function):
    for number in range(len(w)):
        with in_layer(number):
            x = wrap(block)(x, w[number])
    return ij.site(x.sum(-1), "logits")


def scanned(x, w):
    return ij.site(ij.layer_scan(lambda x, w: (block(x, w), None), x, w)[0].sum(-1), "logits")


@pytest.mark.parametrize(
    "wrap", [lambda function: function, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"]
)
@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_the_loop_sees_what_it_sees_of_a_scan(wrap, around):
    def run(model):
        def steps(x, w):
            seen = []
            for layer, name, value in (running := ij.iterate(model)(x, w)):
                seen.append((layer, name))
                if (layer, name) == (1, "mlp_out"):
                    running.save("kept", value)
                    running.modified_value = value * 2
                del value
            return running.retval, running.saved, seen

        seen = []

        def traced(x, w):
            *values, names = steps(x, w)
            seen.extend(names)
            return values

        return around(traced)(X, W), seen

    (out, saved), seen = run(lambda x, w: looped(x, w, wrap))
    (expected, expected_saved), expected_seen = run(scanned)
    assert seen == expected_seen
    # One is unrolled and one a scan: XLA fuses them differently, and rounds a sum of products differently in f32.
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    np.testing.assert_allclose(saved["kept"], expected_saved["kept"], rtol=1e-5)


def test_gradients_at_one_layer():
    def objective(logits):
        return logits.sum()

    _, actual = ij.gradients(looped, "mlp_out", 1, objective=objective)(X, W)
    _, expected = ij.gradients(scanned, "mlp_out", 1, objective=objective)(X, W)
    assert list(actual) == [(1, "mlp_out")]
    np.testing.assert_allclose(actual[1, "mlp_out"], expected[1, "mlp_out"], rtol=1e-5)


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_a_scan_in_the_block_counts_on(around):
    def model(x, w):
        for number in range(2):
            with in_layer(number):
                x, _ = ij.layer_scan(lambda x, w: (block(x, w), None), x, w)
        return x

    seen = []

    def run(x, w):
        for layer, name, value in (running := ij.iterate(model)(x, w)):
            seen.append((layer, name))
            del value
        return running.retval

    around(run)(X, W)
    assert [layer for layer, name in seen if name == "mlp_out"] == list(range(2 * LAYERS))


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_in_the_body_of_a_scan_the_scan_tells_the_layer(around):
    def model(x, w):
        def body(x, w):
            with in_layer(7):
                return block(x, w), None

        return ij.layer_scan(body, x, w)[0]

    seen = []

    def run(x, w):
        for layer, _, value in (running := ij.iterate(model, sites="mlp_out")(x, w)):
            seen.append(layer)
            del value
        return running.retval

    around(run)(X, W)
    assert seen == list(range(LAYERS))


def test_a_site_in_the_block_that_gives_a_layer_itself_is_an_error():
    def model(x):
        with in_layer(0):
            return ij.site(x, "resid_post", layer=3)

    with pytest.raises(ij.SiteError, match="was given layer=3"):
        ij.fetch(model)(X)


def test_with_nothing_listening_the_program_is_the_same():
    def plain(x, w):
        for number in range(len(w)):
            x = x + jnp.tanh(x @ w[number])
        return x.sum(-1)

    assert str(jax.make_jaxpr(looped)(X, W)) == str(jax.make_jaxpr(plain)(X, W))

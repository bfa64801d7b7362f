"""Gradients with respect to activations, against adding a zero by hand and differentiating it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij

LAYERS = 4
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
W = np.sin(np.arange(LAYERS * 16, dtype=np.float32)).reshape(LAYERS, 4, 4)


def block(x, w, site):
    out = site(jnp.tanh(x @ w), "mlp_out")
    return site(x + out, "resid_post")


def scanned(x, w, wrap=lambda function: function, **options):
    def body(x, w):
        x = block(x, w, ij.site)
        return x, x.sum()

    x, sums = ij.layer_scan(wrap(body), x, w, **options)
    return (ij.site(x, "final_norm") ** 3).sum() + (sums**2).sum()


def unrolled(x, w, wrap=lambda function: function, site=ij.site):
    sums = []
    for layer in range(len(w)):
        x = wrap(functools.partial(block, site=functools.partial(site, layer=layer)))(x, w[layer])
        sums.append(x.sum())
    return (site(x, "final_norm") ** 3).sum() + (jnp.stack(sums) ** 2).sum()


@functools.cache
def by_zeros():
    """Every gradient of the model: a zero added at each site, differentiated."""
    x, w = jnp.asarray(X), jnp.asarray(W)
    keys = [(layer, name) for layer in range(LAYERS) for name in ("mlp_out", "resid_post")] + [(None, "final_norm")]

    def objective(zeros):
        return unrolled(x, w, site=lambda value, name, layer=None: value + zeros[keys.index((layer, name))])

    value, gradients = jax.jit(jax.value_and_grad(objective))([jnp.zeros_like(x)] * len(keys))
    return value, dict(zip(keys, gradients, strict=True))


MODELS = {"unrolled": unrolled, "scanned": scanned}
WRAPS = {"plain": lambda function: function, "checkpoint": jax.checkpoint, "jit": jax.jit}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())


def close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), actual, expected)


@models
@wraps
@pytest.mark.parametrize("layers", [None, 2, (1, 3)], ids=["all", "one", "two"])
def test_gradients(model, wrap, layers):
    value, expected = by_zeros()
    wanted = range(LAYERS) if layers is None else np.atleast_1d(layers).tolist()
    out, gradients = jax.jit(ij.gradients(functools.partial(model, wrap=wrap), layers=layers))(X, W)
    close(out, value)
    keys = [(layer, name) for layer in wanted for name in ("mlp_out", "resid_post")]
    assert list(gradients) == keys + [(None, "final_norm")] * (layers is None)
    close(list(gradients.values()), [expected[key] for key in gradients])


@models
def test_outside_jit(model):
    _, expected = by_zeros()
    _, gradients = ij.gradients(model, sites="resid_post", layers=(0, 3))(X, W)
    close(list(gradients.values()), [expected[0, "resid_post"], expected[3, "resid_post"]])

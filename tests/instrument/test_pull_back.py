"""A backward pass with something done at every site, against `fetch` and `gradients`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.instrument.pull_back import pull_back

pytestmark = pytest.mark.caches

W = 0.4 * jax.random.normal(jax.random.key(0), (5, 4, 4))
X = jnp.linspace(-0.5, 1.0, 8).reshape(2, 4)


def block(x, w, layer=None):
    x = x + ij.site(jnp.tanh(x @ w), "mlp_out", layer=layer)
    return ij.site(x, "resid_post", layer=layer), None


def scanned(w, x):
    x = ij.site(x, "embed")
    x, _ = ij.layer_scan(block, x, w)
    return ij.site(jnp.sin(x).sum(-1), "logits")


def looped(w, x):
    x = ij.site(x, "embed")
    for layer in range(len(w)):
        x, _ = block(x, w[layer], layer)
    return ij.site(jnp.sin(x).sum(-1), "logits")


def first(out):
    return out[0]


def keep_product(given, layer, name, value, gradient):
    return given * (value * gradient).sum(), None


@pytest.mark.parametrize("model", [scanned, looped])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_visit_sees_value_and_gradient(model, compiled):
    def run(w, x):
        out, back = pull_back(model, keep_product, ["mlp_out", "resid_post"], (1, 4), objective=first)(w, x)
        return out, back(jnp.asarray(2.0))

    out, kept = (jax.jit(run) if compiled else run)(W, X)
    _, values = ij.fetch(model)(W, X)
    expected_out, gradients = ij.gradients(model, ["mlp_out", "resid_post"], (1, 4), objective=first)(W, X)
    np.testing.assert_allclose(out, expected_out, rtol=1e-6)
    assert set(kept) == set(gradients) == {(1, "mlp_out"), (1, "resid_post"), (4, "mlp_out"), (4, "resid_post")}
    for key in kept:
        np.testing.assert_allclose(kept[key], 2 * (values[key] * gradients[key]).sum(), rtol=1e-5)


@pytest.mark.parametrize("model", [scanned, looped])
def test_what_the_visit_returns_goes_on(model):
    def gate(given, layer, name, value, gradient):
        if name == "mlp_out":
            return None, gradient * given[layer]
        return gradient, None

    @jax.jit
    def run(w, x, gates):
        _, back = pull_back(model, gate, ["mlp_out", "embed"], objective=first)(w, x)
        return jax.lax.map(back, gates)  # one forward pass, three backward passes

    def cut(w, x, dropped):
        for layer, _, value in (running := ij.iterate(model, sites="mlp_out")(w, x)):
            if layer in dropped:
                running.modified_value = jax.lax.stop_gradient(value)
            del value
        return running.retval[0]

    dropped = [(), (2,), (0, 3)]
    gates = np.ones((3, 5), np.float32)
    for row, layers in zip(gates, dropped, strict=True):
        row[list(layers)] = 0.0
    kept = run(W, X, gates)
    for found, layers in zip(kept[None, "embed"], dropped, strict=True):
        np.testing.assert_allclose(found, jax.jit(jax.grad(cut, 1), static_argnums=2)(W, X, layers), rtol=1e-5)


def test_sites_beyond_the_objective_are_missing_and_unknown_ones_refused():
    def model(x):
        ij.site(x * 2, "aside")
        return ij.site(x * 3, "used").sum()

    _, back = pull_back(model, keep_product)(X)
    assert set(back(jnp.asarray(1.0))) == {(None, "used")}
    with pytest.raises(ij.SiteError, match="no site is named"):
        pull_back(model, keep_product, "usd")(X)

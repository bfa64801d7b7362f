"""`nn.scan` over a stack of layers, patched by the set `flax`, against the same layers called one after the other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
import interp_jax.patching

LAYERS = 4
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        out = ij.site(jnp.tanh(nn.Dense(4)(x)) * scale, "mlp_out")
        return ij.site(x + out, "resid_post"), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=LAYERS
        )
        x, _ = layers(name="layers")(x, 0.5)
        return x.sum(-1)


@pytest.fixture
def patched():
    (patcher,) = interp_jax.patching.load("flax").patchers()
    with patcher:
        yield


def by_hand(params, x, edit):
    outs = []
    for layer in range(LAYERS):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["params"]["layers"])
        out = edit(layer, jnp.tanh(nn.Dense(4).apply({"params": own["Dense_0"]}, x)) * 0.5)
        outs.append(out)
        x = x + out
    return x.sum(-1), outs


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_the_loop_sees_reads_and_changes_every_layer(remat, around):
    stack = Stack(remat)
    params = stack.init(jax.random.key(0), X)
    seen = []

    def run(params, x):
        for layer, name, value in (running := ij.iterate(stack.apply)(params, x)):
            seen.append((layer, name))
            if name == "mlp_out":
                running.save(layer, value)
                if layer in (1, 2):
                    running.modified_value = value * (2.0 + layer)
            del value
        return running.retval, running.saved

    out, saved = around(run)(params, X)
    assert seen == [(layer, name) for layer in range(LAYERS) for name in ("mlp_out", "resid_post")]
    # What is saved is what the layer gave; the edit comes after.
    before = []

    def edit(layer, value):
        before.append(value)
        return value * (2.0 + layer) if layer in (1, 2) else value

    expected, _ = by_hand(params, X, edit)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), saved, dict(enumerate(before)))


def test_with_nothing_listening_the_program_is_the_librarys():
    params = Stack().init(jax.random.key(0), X)
    plain = str(jax.make_jaxpr(Stack().apply)(params, X))
    (patcher,) = interp_jax.patching.load("flax").patchers()
    with patcher:
        assert str(jax.make_jaxpr(Stack().apply)(params, X)) == plain

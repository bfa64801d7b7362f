"""The loop over a layer scan, eager and compiled, against the same layers in a Python loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij

LAYERS = 5
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
W = np.sin(np.arange(LAYERS * 16, dtype=np.float32)).reshape(LAYERS, 4, 4)
NAMES = ("resid_pre", "mlp_out", "resid_post")


def block(x, w, site):
    x = site(x, "resid_pre")
    out = site(jnp.tanh(x @ w), "mlp_out")
    return site(x + out, "resid_post")


def model(x, w, wrap=lambda function: function, **options):
    def body(x, w):
        x = block(x, w, ij.site)
        return x, x.sum()

    x, sums = ij.layer_scan(wrap(body), x, w, **options)
    return ij.site(x.sum(-1), "logits"), sums


def by_hand(x, w, wrap=lambda function: function, reverse=False):
    """The model as a Python loop over its layers."""
    sums = {}
    for layer in reversed(range(len(w))) if reverse else range(len(w)):
        x = wrap(functools.partial(block, site=functools.partial(ij.site, layer=layer)))(x, w[layer])
        sums[layer] = x.sum()
    return ij.site(x.sum(-1), "logits"), jnp.stack([sums[layer] for layer in range(len(w))])


WRAPS = {
    "plain": lambda function: function,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "checkpoint-of-jit": lambda function: jax.checkpoint(jax.jit(function)),
}
AROUND = {
    "eager": lambda function: function,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit-of-jit": lambda function: jax.jit(jax.jit(function)),
}
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
arounds = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())


def close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), actual, expected)


def equations(jaxpr, name):
    """The equations of this primitive, in this jaxpr and in those inside it."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            found.append(eqn)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found.extend(equations(inner, name))
    return found


# Loops, each with other Python in each layer. A loop takes a model, gives what the pass gave.


def read(fn, *args):
    for _, _, value in (running := ij.iterate(fn)(*args)):
        assert value.dtype == jnp.float32
        del value
    return running.retval


def modify(fn, *args):
    for layer, name, value in (running := ij.iterate(fn)(*args)):
        if name == "mlp_out" and layer == 1:
            running.modified_value = value.at[:, 2].set(5.0)
        if name == "mlp_out" and layer == 3:
            running.modified_value = jnp.zeros_like(value)
        if name == "resid_post" and layer is not None:
            running.modified_value = value * (1.0 + layer)
        del value
    return running.retval


def save(fn, *args):
    for layer, name, value in (running := ij.iterate(fn)(*args)):
        if name == "mlp_out":  # all layers alike
            running.save(f"out/{layer}", {"value": value, "square": value**2})
        if name == "resid_post" and layer in (1, 2, 4):  # some, alike
            running.save(f"norm/{layer}", jnp.linalg.norm(value, axis=-1))
        if name == "resid_pre" and layer == 2:  # one, two values of a shape
            running.save("one", value)
            running.save("two", value + 1)
        if name == "resid_pre" and layer == 3:  # another, of another shape and dtype
            running.save("first", value[0].astype(jnp.int32))
        if name == "logits":
            running.save("logits", value)
        del value
    return running.retval, running.saved


def save_and_modify(fn, *args):
    for layer, name, value in (running := ij.iterate(fn, sites=("mlp_out", "resid_pre"))(*args)):
        if name == "resid_pre":
            before = value
        if name == "mlp_out" and layer > 0:
            running.save(layer, (value - before).sum(0))
            running.modified_value = value + before * layer
        del value
    return running.retval, running.saved


loops = pytest.mark.parametrize(
    "loop",
    [
        pytest.param(read, id="read"),
        pytest.param(modify, id="modify"),
        pytest.param(save, id="save"),
        # Its variable `before` outlives the rehearsal's trace; the leak checker does not know that nobody uses it.
        pytest.param(save_and_modify, id="save-and-modify", marks=pytest.mark.caches),
    ],
)


@loops
@arounds
def test_the_loop_does_what_it_does_over_a_python_loop(loop, around):
    expected = jax.jit(functools.partial(loop, by_hand))(X, W)
    actual = around(functools.partial(loop, model))(X, W)
    close(actual, expected)


@wraps
@pytest.mark.parametrize("loop", [modify, save], ids=["modify", "save"])
def test_sites_may_stand_in_functions_inside_the_body(loop, wrap):
    expected = jax.jit(functools.partial(loop, by_hand))(X, W)
    close(jax.jit(lambda x, w: loop(functools.partial(model, wrap=wrap), x, w))(X, W), expected)


@wraps
@pytest.mark.parametrize("loop", [modify, save], ids=["modify", "save"])
def test_gradients_of_what_the_pass_gives(loop, wrap):
    def objective(fn, x, w):
        return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves(loop(fn, x, w)))

    expected = jax.jit(jax.value_and_grad(functools.partial(objective, by_hand), argnums=(0, 1)))(X, W)
    actual = jax.value_and_grad(functools.partial(objective, functools.partial(model, wrap=wrap)), argnums=(0, 1))(X, W)
    close(actual, expected)


@loops
def test_a_vmapped_pass(loop):
    batch = np.stack([X, X * 0.5, X + 1])
    expected = jax.vmap(functools.partial(loop, by_hand), in_axes=(0, None))(batch, W)
    close(jax.vmap(functools.partial(loop, model), in_axes=(0, None))(batch, W), expected)


def test_vmap_inside_the_body_and_inside_the_pass():
    def vmapped(fn):
        return lambda x, w: jax.vmap(fn, in_axes=(0, None))(x, w)

    expected = jax.jit(functools.partial(save, vmapped(by_hand)))(X, W)
    close(save(vmapped(model), X, W), expected)
    # In the body: the model is written for one row.
    rows = functools.partial(model, wrap=lambda body: lambda x, w: jax.vmap(body, in_axes=(0, None))(x, w))
    close(
        jax.jit(functools.partial(modify_rows, rows))(X, W)[0],
        jax.jit(functools.partial(modify_rows, by_hand))(X, W)[0],
    )


def modify_rows(fn, *args):
    for layer, name, value in (running := ij.iterate(fn)(*args)):
        if name == "mlp_out" and layer in (1, 3):
            running.modified_value = value * layer
        del value
    return running.retval


@loops
def test_from_the_last_layer_to_the_first(loop):
    for around in (lambda function: function, jax.jit):
        actual = around(functools.partial(loop, functools.partial(model, reverse=True)))(X, W)
        close(actual, jax.jit(functools.partial(loop, functools.partial(by_hand, reverse=True)))(X, W))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_order_of_the_loop_and_of_what_is_saved(reverse, compiled):
    seen, saved = [], []

    def run(x, w):
        for layer, name, value in (running := ij.iterate(model)(x, w, reverse=reverse)):
            seen.append((layer, name))
            if layer is not None:
                running.save((layer, name), value)
            del value
        saved.extend(running.saved)

    if compiled:
        jax.eval_shape(run, X, W)
    else:
        run(X, W)
    layers = reversed(range(LAYERS)) if reverse else range(LAYERS)
    expected = [(layer, name) for layer in layers for name in NAMES]
    assert seen == [*expected, (None, "logits")]
    assert saved == expected

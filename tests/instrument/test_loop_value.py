"""A loop value of an inner function: as good as the value while the function is traced, a clear error afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.instrument.loop_value import LoopValueError

# What is kept beyond its function is a leak, which the leak checker would find first.
pytestmark = pytest.mark.caches

X = np.linspace(0.5, 1.5, 3, dtype=np.float32)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def first(x):
    return ij.site(jnp.sin(x), "first")


def both(x):
    return ij.site(first(x) * 2.0, "second")


INSIDE = {
    "jit": lambda function, x: jax.jit(function)(x),
    "checkpoint": lambda function, x: jax.checkpoint(function)(x),
    "scan": lambda function, x: jax.lax.scan(lambda carry, _: (function(carry), None), x, length=1)[0],
    "while": lambda function, x: jax.lax.fori_loop(0, jnp.argmin(x) + 1, lambda _, x: function(x), x),
    "vmap": lambda function, x: jax.vmap(function)(x),
    "cond": lambda function, x: jax.lax.cond(x.sum() > 0, function, lambda x: x, x),
    "jit-of-checkpoint": lambda function, x: jax.jit(jax.checkpoint(function))(x),
}
inside = pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE.keys())
AROUND = {
    "eager": lambda function: function,
    "grad": jax.grad,
    "jit-of-grad": lambda function: jax.jit(jax.grad(function)),
}
around = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
COMPUTE = {"value": lambda value: value, "derived": lambda value: (value**3).sum()}
compute = pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE.keys())
error = functools.partial(pytest.raises, LoopValueError, match=r"(?s)site 'first'.*use running\.save\(name, value\)")

USES = {
    "a function of jax.numpy": jnp.sum,
    "an operator": lambda kept: 1.0 + kept,
    "jit, as an argument": jax.jit(lambda kept: kept * 2),
    "jit, closed over": lambda kept: jax.jit(lambda x: x + kept)(1.0),
    "jit, returned": lambda kept: jax.jit(lambda: kept)(),
    "grad, which it is no function of": jax.grad(lambda kept: (kept**2).sum()),
    "scan": lambda kept: jax.lax.scan(lambda carry, _: (carry, None), kept, length=2),
    "its shape": lambda kept: kept.shape,
    "NumPy": np.asarray,
}


def kept_value(inside, x, compute=lambda value: value):
    kept = []
    for _, _, value in (running := ij.iterate(functools.partial(inside, first))(x)):
        kept.append(compute(value))
    return kept[0], running.retval


@inside
@around
@compute
def test_used_after_the_loop(inside, around, compute):
    def objective(x):
        kept, out = kept_value(inside, x, compute)
        return jnp.sum(kept) + out.sum()

    with error():
        around(objective)(jnp.asarray(X))
    assert not isinstance(jnp.ones(3) + 1, jax.core.Tracer)


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_every_use_after_the_loop(use):
    def objective(x):
        kept, out = kept_value(INSIDE["jit"], x)
        use(kept)
        return out.sum()

    with error():
        jax.grad(objective)(jnp.asarray(X))


@inside
@around
@compute
def test_used_at_a_later_site_outside_its_function(inside, around, compute):
    for then in (inside, lambda function, x: function(x)):

        def objective(x, then=then):
            kept = []
            model = lambda x: then(lambda x: ij.site(x + 1, "later"), inside(first, x))  # noqa: E731
            for _, name, value in (running := ij.iterate(model)(x)):
                if name == "first":
                    kept.append(compute(value))
                else:
                    running.modified_value = value * kept[0].sum()
            return running.retval.sum()

        with error():
            around(objective)(jnp.asarray(X))
        assert not isinstance(jnp.ones(3) + 1, jax.core.Tracer)


@pytest.mark.parametrize("name", ["jit", "checkpoint", "vmap", "jit-of-checkpoint"])
@around
@compute
def test_used_at_a_later_site_of_the_same_function_it_is_as_good_as_the_value(name, around, compute):
    inside = INSIDE[name]

    def run(x):
        kept = None
        for _, site, value in (running := ij.iterate(functools.partial(inside, both))(x)):
            if site == "first":
                kept = compute(value)
            else:
                running.modified_value = value * kept.sum()
                running.save("product", value * kept.sum())
        return running.retval, running.saved["product"]

    def by_hand(x):
        def function(x):
            return jnp.sin(x) * 2.0 * compute(jnp.sin(x)).sum()

        return jax.vmap(function)(x) if name == "vmap" else function(x)

    expected = around(lambda x: 2 * by_hand(x).sum())(jnp.asarray(X))
    close(around(lambda x: sum(part.sum() for part in run(x)))(jnp.asarray(X)), expected)


def test_used_in_a_function_inside_its_own():
    def model(x):
        x = ij.site(x, "first")
        return jax.checkpoint(lambda x: ij.site(x, "inner"))(x * 2)

    kept = None
    for _, name, value in (running := ij.iterate(jax.jit(model))(X)):
        if name == "first":
            kept = value
        else:
            running.modified_value = value + kept
    close(running.retval, 3 * X)


BODIES = {
    "jit that closes over it": lambda value: jax.jit(lambda y: y * value)(value),
    "checkpoint": jax.checkpoint(lambda value: value * value),
    "grad": lambda value: jax.grad(lambda value: (value**3).sum())(value) / 3,
    "vmap that closes over it": lambda value: jax.vmap(lambda y: y * value, out_axes=0)(value).diagonal(),
    "scan that closes over it": lambda value: jax.lax.scan(lambda c, _: (c * value, None), value, length=1)[0],
    "cond": lambda value: jax.lax.cond(value.sum() > -9, lambda: value * value, lambda: value),
    "custom_jvp": lambda value: jax.nn.relu(value) * value,
    "custom_vjp": lambda value: squared(value),
    "concatenation and indexing": lambda value: jnp.concatenate([value, value])[3:] * value.at[:].get(),
    "a whole pass": lambda value: whole_pass(value),
    "a constant": lambda value: value * value + jnp.zeros(3).at[0].set(0.0),
}


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, gradient: (2 * x * gradient,))


def whole_pass(x):
    for _, _, value in (running := ij.iterate(jax.jit(first))(x)):
        running.modified_value = x * x + 0 * value
    return running.retval


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("function", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "vmap"])
def test_what_the_body_may_do_with_it(body, function, batched):
    def model(x):
        return ij.site(x, "first")

    def run(x):
        for _, _, value in (running := ij.iterate(function(jax.vmap(model) if batched else model))(x)):
            running.modified_value = body(value)
        return running.retval

    x = jnp.stack([X, X + 1]) if batched else jnp.asarray(X)
    close(run(x), x**2)
    close(jax.grad(lambda x: run(x).sum())(x), 2 * x)
    close(jax.jit(jax.grad(lambda x: run(x).sum()))(x), 2 * x)


def test_a_function_that_is_differentiated_inside_the_pass():
    def gradient(x):
        return jax.grad(lambda x: first(x).sum())(x)

    kept = []
    for _, _, value in (running := ij.iterate(gradient)(jnp.asarray(X))):
        if value[0] > 0:  # the value is concrete below
            running.modified_value = value * 2
        kept.append(value)
    close(running.retval, 2 * np.cos(X))
    with error():
        _ = kept[0] + 1


def test_sites_outside_inner_functions_have_plain_values():
    @jax.jit
    def run(x):
        kept = [value for _, _, value in ij.iterate(both)(x)]
        return sum(value.sum() for value in kept)

    close(run(X), 3 * np.sin(X).sum())
    kept = [value for _, _, value in ij.iterate(both)(jnp.asarray(X))]
    assert not isinstance(kept[0], jax.core.Tracer)


def test_values_made_in_the_body_of_what_is_outside_its_function_live_on():
    @jax.jit
    def run(x):
        return [x * 2 for _ in ij.iterate(jax.vmap(first))(x)][0]  # noqa: RUF015

    close(run(X), 2 * X)


def test_it_prints_before_and_after():
    texts = []
    for _, _, value in ij.iterate(jax.jit(first))(X):
        texts.append(repr(value))
    texts.append(repr(value))
    assert texts == ["LoopValue<float32[3]> of site 'first'"] * 2


def test_after_break_and_after_an_error():
    for _, _, value in ij.iterate(jax.jit(first))(X):
        kept = value
        break
    with error():
        jnp.sum(kept)
    with pytest.raises(KeyError):
        for _, _, value in ij.iterate(jax.jit(first))(X):
            kept = value
            raise KeyError
    with error():
        jnp.sum(kept)


def test_shard_map_in_the_body():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    doubled = jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    for _, _, value in (running := ij.iterate(jax.jit(first))(X)):
        running.modified_value = doubled(value)
    close(running.retval, 2 * np.sin(X))

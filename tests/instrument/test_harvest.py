"""Sow and reap: what leaves a function, and what stays in the program around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.instrument import ReapError, call_and_reap, sow

X = jnp.linspace(0.1, 1.0, 4)


def tagged(x):
    return jnp.cos(sow(jnp.sin(x), tag="t", name="sine"))


def primitives(jaxpr):
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        names += [name for inner in jax.extend.core.jaxprs_in_params(eqn.params) for name in primitives(inner)]
    return names


def test_sow_is_the_identity_where_nobody_reaps():
    assert sow(X, tag="t", name="x") is X
    assert "sow" not in primitives(jax.make_jaxpr(tagged)(X).jaxpr)
    _, reaps = call_and_reap(tagged, tag="another")(X)
    assert reaps == {}


def test_call_and_reap_gives_trees_by_name():
    def function(x):
        sow({"a": x, "b": (x + 1, 2.0)}, tag="t", name="tree")
        return x

    out, reaps = call_and_reap(function, tag="t")(X)
    np.testing.assert_array_equal(out, X)
    np.testing.assert_array_equal(reaps["tree"]["b"][0], X + 1)
    assert reaps["tree"]["b"][1] == 2.0


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=["jit", "checkpoint", "vmap"])
def test_reaping_through_and_around_transformations(wrap):
    out, reaps = call_and_reap(wrap(tagged), tag="t")(X)
    np.testing.assert_allclose(out, jnp.cos(jnp.sin(X)), rtol=1e-6)
    np.testing.assert_allclose(reaps["sine"], jnp.sin(X), rtol=1e-6)
    out, reaps = wrap(call_and_reap(tagged, tag="t"))(X)
    np.testing.assert_allclose(reaps["sine"], jnp.sin(X), rtol=1e-6)


def test_jit_keeps_its_name_and_donation_and_checkpoint_its_policy():
    policy = jax.checkpoint_policies.everything_saveable

    @jax.jit
    def inner(x):
        return jax.checkpoint(tagged, policy=policy)(x)

    jaxpr = jax.make_jaxpr(call_and_reap(inner, tag="t"))(X).jaxpr
    assert "sow" not in primitives(jaxpr)
    (jit,) = jaxpr.eqns
    assert jit.params["name"] == "inner"
    (remat,) = jit.params["jaxpr"].jaxpr.eqns
    assert remat.params["policy"] is policy


@pytest.mark.caches
def test_a_function_that_was_jitted_before_is_reaped():
    jitted = jax.jit(tagged)
    before = jitted(X)
    for _ in range(2):
        _, reaps = call_and_reap(jitted, tag="t")(X)
        np.testing.assert_allclose(reaps["sine"], jnp.sin(X), rtol=1e-6)
    np.testing.assert_array_equal(jitted(X), before)


def test_shardings_of_the_function_inside_stay():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    inner = jax.jit(tagged, in_shardings=sharding, out_shardings=sharding)
    jaxpr = jax.make_jaxpr(call_and_reap(inner, tag="t"))(X).jaxpr
    (jit,) = jaxpr.eqns
    assert jit.params["out_shardings"][0] == sharding
    out, _ = call_and_reap(inner, tag="t")(X)
    assert out.sharding == sharding


def test_two_tags_nest():
    def function(x):
        sow(x, tag="a", name="x")
        sow(x + 1, tag="b", name="x")
        return x

    (_, inner), outer = call_and_reap(call_and_reap(jax.jit(function), tag="a"), tag="b")(X)
    np.testing.assert_array_equal(inner["x"], X)
    np.testing.assert_array_equal(outer["x"], X + 1)


def test_a_name_sown_twice():
    with pytest.raises(ReapError, match="Variable has already been reaped: sine"):
        call_and_reap(lambda x: tagged(tagged(x)), tag="t")(X)


def test_a_sow_inside_a_scan_is_refused_by_name():
    with pytest.raises(ReapError, match="inside `scan`"):
        call_and_reap(lambda x: jax.lax.scan(lambda c, _: (tagged(c), None), x, length=2), tag="t")(X)

"""The loop over a small model, eager and under jit, checkpoint and grad, against the model written out by hand."""

import functools
import gc
import traceback
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij

LAYERS = 3
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)


def block(x, layer):
    x = ij.site(x, "resid_pre", layer=layer)
    out = ij.site(jnp.tanh(x * (layer + 1)), "mlp_out", layer=layer)
    return ij.site(x + out, "resid_post", layer=layer)


def model(x, wrap=lambda function: function):
    for layer in range(LAYERS):
        x = wrap(functools.partial(block, layer=layer))(x)
    return ij.site(x.sum(-1), "logits")


def by_hand(x, edit=lambda layer, out: out):
    """The model without sites; gives the logits and every MLP output."""
    outs = []
    for layer in range(LAYERS):
        out = edit(layer, jnp.tanh(x * (layer + 1)))
        outs.append(out)
        x = x + out
    return x.sum(-1), outs


WRAPS = {
    "eager": lambda function: function,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint-policy": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "jit-of-checkpoint-of-jit": lambda function: jax.jit(jax.checkpoint(jax.jit(function))),
}
AROUND = {"eager": lambda function: function, "jit": jax.jit, "checkpoint": jax.checkpoint}
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
arounds = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())


def close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


@wraps
@arounds
def test_reading_all_sites_in_order(wrap, around):
    order = []

    def run(x):
        for layer, name, value in (running := ij.iterate(model)(x, wrap)):
            order.append((layer, name))
            assert value.dtype == jnp.float32
            del value
        return running.retval

    close(around(run)(X), by_hand(X)[0])
    expected = [(layer, name) for layer in range(LAYERS) for name in ("resid_pre", "mlp_out", "resid_post")]
    assert order == [*expected, (None, "logits")]


@wraps
@arounds
def test_modifying(wrap, around):
    def run(x):
        for layer, name, value in (running := ij.iterate(model)(x, wrap)):
            if name == "mlp_out" and layer == 1:
                running.modified_value = value.at[:, 2].set(5.0)
            del value
        return running.retval

    expected, _ = by_hand(X, lambda layer, out: out.at[:, 2].set(5.0) if layer == 1 else out)
    close(around(run)(X), expected)


@wraps
@arounds
def test_saving(wrap, around):
    def run(x):
        for layer, name, value in (running := ij.iterate(model, sites="mlp_out")(x, wrap)):
            running.save(f"{name}/{layer}", {"value": value, "square": value**2})
            del value
        return running.retval, running.saved

    logits, outs = by_hand(X)
    expected = {f"mlp_out/{layer}": {"value": out, "square": out**2} for layer, out in enumerate(outs)}
    close(around(run)(X), (logits, expected))


@wraps
@arounds
@pytest.mark.parametrize("edited", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_of_an_objective_of_saved_values(wrap, around, edited):
    def objective(x):
        for layer, name, value in (running := ij.iterate(model)(x, wrap)):
            if edited and name == "mlp_out" and layer == 0:
                running.modified_value = value * 2.0
            if name == "resid_post":
                running.save(layer, (value**3).sum())
            del value
        return sum(running.saved.values()) + running.retval.sum()

    def hand_objective(x):
        total = 0.0
        for layer in range(LAYERS):
            out = jnp.tanh(x * (layer + 1))
            x = x + (out * 2.0 if edited and layer == 0 else out)
            total = total + (x**3).sum()
        return total + x.sum()

    close(jax.value_and_grad(around(objective))(X), jax.jit(jax.value_and_grad(hand_objective))(X))


@wraps
def test_a_pass_over_a_gradient_sees_and_saves_what_the_gradient_is_taken_of(wrap):
    def gradient(x):
        return jax.grad(lambda x: model(x, wrap).sum())(x)

    for layer, name, value in (running := ij.iterate(gradient)(jnp.asarray(X))):
        if name == "mlp_out":
            running.save(layer, value)
        del value
    close(running.retval, jax.jit(jax.grad(lambda x: by_hand(x)[0].sum()))(X))
    close(list(running.saved.values()), by_hand(X)[1])


@wraps
def test_an_edit_is_differentiated_inside_the_pass(wrap):
    def gradient(x):
        return jax.grad(lambda x: model(x, wrap).sum())(x)

    for layer, name, value in (running := ij.iterate(gradient, sites="mlp_out", layers=1)(jnp.asarray(X))):
        assert (layer, name) == (1, "mlp_out")
        running.modified_value = value * 3.0
        del value
    close(
        running.retval, jax.grad(lambda x: by_hand(x, lambda layer, out: out * 3.0 if layer == 1 else out)[0].sum())(X)
    )


def test_vmap_inside_puts_the_batch_axis_of_saved_values_first():
    for layer, name, value in (running := ij.iterate(jax.vmap(model, in_axes=1))(X)):
        assert value.shape == (() if name == "logits" else (2,))
        if name == "mlp_out":
            running.save(layer, value)
        del value
    close(running.retval, jax.vmap(lambda x: by_hand(x)[0], in_axes=1)(X))
    close(list(running.saved.values()), [out.T for out in by_hand(X)[1]])


def with_rules(kind):
    """A function with derivative rules of its own, which double the true derivative, so that their use shows."""
    function = kind(jnp.sin)
    if kind is jax.custom_jvp:
        function.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 2 * jnp.cos(primals[0]) * tangents[0]))
    else:
        function.defvjp(lambda x: (jnp.sin(x), x), lambda x, gradient: (2 * jnp.cos(x) * gradient,))
    return function


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp], ids=["custom_jvp", "custom_vjp"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@wraps
def test_custom_derivative_rules_hold_around_and_inside_a_pass(kind, where, wrap):
    function = with_rules(kind)

    def custom_model(x):
        return ij.site(wrap(function)(ij.site(x, "in")), "out").sum()

    def run(fn, x):
        for _, name, value in (running := ij.iterate(fn)(x)):
            if name == "out":
                running.save(name, value)
            del value
        return running.retval, running.saved

    x = jnp.asarray(X)
    if where == "outside":
        gradient, saved = jax.grad(lambda x: run(custom_model, x), has_aux=True)(x)
    else:
        gradient, saved = run(jax.grad(custom_model), x)
    close(gradient, 2 * np.cos(X))
    close(saved["out"], np.sin(X))


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp], ids=["custom_jvp", "custom_vjp"])
def test_a_program_that_is_kept_keeps_no_tracer_for_the_sake_of_a_rule(kind):
    function = with_rules(kind)

    def run(x):
        for _, _, value in (running := ij.iterate(lambda x: ij.site(function(jnp.cos(x)), "out"))(x)):
            del value
        return running.retval

    program = jax.make_jaxpr(run)(jnp.asarray(X))  # leaks are looked for while it is there
    close(jax.core.eval_jaxpr(program.jaxpr, program.consts, X)[0], np.sin(np.cos(X)))


def test_sites_inside_shard_map_are_seen_edited_and_saved():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda x: ij.site(x, "inner") * 2, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data")
    )
    for _, _, value in (running := ij.iterate(sharded)(jnp.asarray(X))):
        running.modified_value = value + 1
        del value
    close(running.retval, (X + 1) * 2)
    for _, _, value in (running := ij.iterate(sharded)(jnp.asarray(X))):
        running.save("x", value)
        del value
    close(running.saved["x"], X[None])  # stacked over the mesh axis


def in_a_scan(x):
    return jax.lax.scan(lambda x, _: (ij.site(jnp.tanh(x), "s") + x, None), x, None, length=2)[0]


def in_a_branch(x):
    return jax.lax.cond(x.sum() > 0, lambda x: ij.site(jnp.tanh(x), "s") + x, lambda x: x, x)


def in_layers(x):
    return ij.layer_scan(lambda x, _: (ij.site(jnp.tanh(x), "s") + x, None), x, None, length=2)[0]


@pytest.mark.parametrize("function", [in_a_scan, in_a_branch, in_layers])
@pytest.mark.parametrize("make", [jnp.ones, np.ones], ids=["jax", "numpy"])
@arounds
def test_inside_shard_map_a_site_may_be_given_a_constant(function, make, around):
    """It is the same on every device, and stands where a value of each device's own stood."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(x):
        sharded = jax.shard_map(function, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
        for layer, _, value in (running := ij.iterate(sharded)(x)):
            if layer in (None, 0):
                running.modified_value = make(value.shape, value.dtype)
            del value
        return running.retval

    once = X + 1
    expected = {in_a_scan: once + 1, in_a_branch: once, in_layers: np.tanh(once) + once}[function]
    close(around(run)(jnp.asarray(X)), expected)


# Caches


@pytest.mark.caches
@pytest.mark.parametrize("transformation", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_functions_traced_before_are_seen_and_edits_leave_nothing_behind(transformation):
    shared = transformation(functools.partial(block, layer=0))

    def twice(x):
        return shared(shared(x))

    x = jnp.asarray(X)
    clean = np.asarray(twice(x))
    for _ in range(2):
        names = []
        for _, name, value in (running := ij.iterate(twice)(x)):
            names.append(name)
            if name == "mlp_out":
                running.modified_value = jnp.zeros_like(value)
        assert names == ["resid_pre", "mlp_out", "resid_post"] * 2
        np.testing.assert_array_equal(running.retval, x)
        np.testing.assert_array_equal(twice(x), clean)
    # One that filters the sites out must not leave a trace without them for the next.
    for _ in ij.iterate(lambda x: ij.site(twice(x), "end"), sites="end")(x):
        pass
    assert len(list(ij.iterate(twice)(x))) == 6


@pytest.mark.caches
def test_a_clean_call_is_the_same_to_the_bit_before_and_after_passes_under_jit():
    clean = jax.jit(model)
    before = np.asarray(clean(X))

    @jax.jit
    def forward(x):
        for _, name, value in (running := ij.iterate(clean)(x)):
            if name == "mlp_out":
                running.modified_value = value * 0.5
        return running.retval

    edited, again = forward(X), forward(X)
    np.testing.assert_array_equal(edited, again)
    assert not np.allclose(edited, before)
    np.testing.assert_array_equal(clean(X), before)


@pytest.mark.caches
def test_a_spoilt_token_of_an_inner_pass_is_not_met_again_by_the_outer_one():
    shared = jax.jit(functools.partial(block, layer=0))

    def inner_then_shared(x):
        for _ in ij.iterate(shared, sites="mlp_out")(x):
            pass
        return shared(x)

    assert [name for _, name, _ in ij.iterate(inner_then_shared, sites="resid_post")(jnp.asarray(X))] == [
        "resid_post"
    ] * 2


@pytest.mark.caches
def test_helpers_of_a_plain_model_are_compiled_once():
    traced = []

    @jax.jit
    def helper(x):
        traced.append(1)
        return jnp.tanh(x)

    def plain(x):
        for layer in range(4):
            x = ij.site(helper(x), "resid_post", layer=layer)
        return x

    for _ in range(3):
        for _ in ij.iterate(plain)(jnp.asarray(X)):
            pass
    assert len(traced) == 1


def test_nothing_listening_leaves_no_trace_in_the_jaxpr():
    tagged = jax.make_jaxpr(model)(X)
    untagged = jax.make_jaxpr(lambda x: by_hand(x)[0])(X)
    assert str(tagged) == str(untagged)


# Eager values


def test_outside_jit_the_values_are_concrete():
    for layer, name, value in (running := ij.iterate(model)(X)):
        assert isinstance(np.asarray(value), np.ndarray)
        if name == "resid_post" and value[0, 0] < 0:  # an ordinary if on a value
            running.modified_value = np.zeros(value.shape, np.float32)  # NumPy's arrays will do
        del layer
    assert running.retval.shape == (2,)


# Leaving early


@wraps
@arounds
def test_break_computes_nothing_further_and_leaves_jax_as_it_was(wrap, around):
    reached = []

    def watched(x):
        x = block(x, 0)
        reached.append("after layer 0")
        return x

    def run(x):
        for _, name, value in (running := ij.iterate(lambda x: wrap(watched)(x))(x)):
            del value
            if name == "mlp_out":
                break
        with pytest.raises(RuntimeError, match="left before the end"):
            _ = running.retval
        assert running.saved == {}
        return x * 2

    result = around(run)(jnp.asarray(X))
    assert reached == []
    assert not isinstance(jnp.ones(3) + 1, jax.core.Tracer)
    np.testing.assert_allclose(result, X * 2)


def test_after_break_what_was_saved_at_the_top_is_there():
    for layer, name, value in (running := ij.iterate(model)(X)):
        if name == "resid_post":
            running.save(layer, value)
            if layer == 1:
                break
    assert list(running.saved) == [0, 1]


@wraps
@arounds
def test_an_error_in_the_loops_body_surfaces_and_leaves_jax_as_it_was(wrap, around):
    def run(x):
        for _, name, value in ij.iterate(model)(x, wrap):
            del value
            if name == "mlp_out":
                raise KeyError("mine")
        return x

    with pytest.raises(KeyError, match="mine"):
        around(run)(X)
    assert not isinstance(jnp.ones(3) + 1, jax.core.Tracer)


@wraps
def test_an_error_in_the_model_surfaces_with_its_frames(wrap):
    def broken_layer(x):
        ij.site(x, "resid_pre")
        raise ValueError("in the model")

    with pytest.raises(ValueError, match="in the model") as error:
        for _ in ij.iterate(wrap(broken_layer))(X):
            pass
    assert "broken_layer" in "".join(traceback.format_tb(error.value.__traceback__))


def test_a_model_can_catch_what_jax_raises_while_it_is_looped_over():
    def model_with_fallback(x):
        try:
            return jnp.reshape(jnp.asarray(x), (3, 3))
        except TypeError:
            return ij.site(x, "fallback")

    assert [name for _, name, _ in ij.iterate(model_with_fallback)(X)] == ["fallback"]


def test_values_are_freed_as_the_pass_goes_on():
    alive = []

    def run(x):
        x = ij.site(x + 1, "a")
        x = ij.site(x + 1, "b")
        gc.collect()
        alive.append(reference() is not None)
        return x

    for _, name, value in ij.iterate(run)(jnp.asarray(X)):
        if name == "a":
            reference = weakref.ref(value)
    assert alive == [False]


# Nesting


def test_zip_of_two_passes_is_refused():
    with pytest.raises(RuntimeError, match="stepped in turns"):
        for _ in zip(ij.iterate(model)(X), ij.iterate(model)(X), strict=True):
            pass
    assert not isinstance(jnp.ones(3) + 1, jax.core.Tracer)


@arounds
def test_a_whole_pass_in_the_body_of_another(around):
    def run(x):
        for layer, name, value in (running := ij.iterate(model, sites="mlp_out")(x)):
            _, donor = ij.fetch(model, "mlp_out", layer)(x * 0.5)
            running.modified_value = donor[layer, name]
            del value
        return running.retval

    donors = by_hand(X * 0.5)[1]
    close(around(run)(X), by_hand(X, lambda layer, out: donors[layer])[0])


def test_inside_another_pass_the_inner_takes_what_it_wants_and_the_rest_goes_outward():
    def with_inner(x):
        for _, name, value in (inner := ij.iterate(model, sites="mlp_out")(x)):
            inner.modified_value = value * 0.0
            assert name == "mlp_out"
        return inner.retval

    seen = set()
    for _, name, value in (running := ij.iterate(with_inner)(jnp.asarray(X))):
        seen.add(name)
        if name == "resid_pre":
            running.modified_value = value + 1.0
    assert seen == {"resid_pre", "resid_post", "logits"}
    close(running.retval, (X + LAYERS).sum(-1))


# Mistakes


def test_a_wrong_modified_value_names_site_expected_and_given():
    wrong = {
        "shape": (jnp.zeros((7,)), r"site 'mlp_out' of layer 1.*\(2, 4\).*float32.*\(7,\)"),
        "dtype": (jnp.zeros((2, 4), jnp.int32), r"int32.*astype\('float32'\)"),
        "tree": ([jnp.zeros((2, 4))], "tree"),
        "none": (None, "do not assign"),
        "text": ("zero", "str was assigned"),
    }
    for value, message in wrong.values():
        with pytest.raises(ij.SiteError, match=message):
            for _ in (running := ij.iterate(model, sites="mlp_out", layers=1)(X)):
                running.modified_value = value


def test_a_tree_is_checked_leaf_by_leaf():
    def tree_model(x):
        return ij.site({"a": x, "b": (x,)}, "tree")

    with pytest.raises(ij.SiteError, match=r"at \['b'\]\[0\]"):
        for _, _, value in (running := ij.iterate(tree_model)(X)):
            running.modified_value = {"a": value["a"], "b": (value["a"][0],)}
    for _, _, value in (running := ij.iterate(tree_model)(X)):
        running.modified_value = jax.tree.map(lambda leaf: leaf * 2, value)
    close(running.retval, {"a": X * 2, "b": (X * 2,)})


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"sites": "reside_post"}, r"no site is named 'reside_post' \(did you mean 'resid_post'\?\)"),
        ({"sites": ("mlp_out", "nope")}, "no site is named 'nope'"),
        ({"layers": 7}, "no site stands in layer 7"),
        ({"layers": range(5)}, "no site stands in layer 3, 4"),
        ({"sites": "logits", "layers": 1}, "no site has one of these names in one of these layers"),
    ],
)
def test_a_filter_that_matches_nothing_lists_the_sites_that_exist(filters, message):
    with pytest.raises(ij.SiteError, match=message) as error:
        for _ in ij.iterate(model, **filters)(X):
            pass
    assert "layers 0 to 2: resid_pre, mlp_out, resid_post" in str(error.value)
    assert "no layer: logits" in str(error.value)


def test_an_empty_filter_and_a_function_without_sites():
    with pytest.raises(ij.SiteError, match="empty filter"):
        ij.iterate(model, sites=())
    with pytest.raises(ij.SiteError, match="no sites"):
        for _ in ij.iterate(jnp.sum, sites="a")(X):
            pass
    assert list(ij.iterate(jnp.sum)(X)) == []


def test_things_asked_for_at_the_wrong_time():
    running = ij.iterate(model)(X)
    with pytest.raises(RuntimeError, match="not been looped over"):
        _ = running.retval
    with pytest.raises(RuntimeError, match="after the loop"):
        _ = running.saved
    with pytest.raises(RuntimeError, match="inside the loop"):
        running.save("a", jnp.ones(2))
    with pytest.raises(RuntimeError, match="inside the loop"):
        running.modified_value = jnp.ones(2)
    for _ in running:
        with pytest.raises(RuntimeError, match="still running"):
            _ = running.retval
        with pytest.raises(AttributeError, match="was not assigned"):
            _ = running.modified_value
    with pytest.raises(RuntimeError, match="looped over once"):
        iter(running)
    with pytest.raises(RuntimeError, match="inside the loop"):
        running.modified_value = jnp.ones(2)


def test_a_layer_that_is_no_number_known_while_the_model_is_traced():
    def in_a_loop(x):
        return jax.lax.fori_loop(0, 2, lambda layer, x: ij.site(x, "s", layer=layer), x)

    def at(layer):
        return lambda x: ij.site(x, "s", layer=layer)

    in_a_loop(jnp.asarray(X))  # with nothing listening it does not matter
    for fn in (in_a_loop, at(jnp.int32(1)), at("1")):
        with pytest.raises(ij.SiteError, match=r"layer of site 's' must be a Python or NumPy integer.*ij\.layer_scan"):
            list(ij.iterate(fn)(X))


def test_saving_one_name_twice():
    with pytest.raises(ij.ReapError, match="'x' was saved more than once"):
        for _, _, value in (running := ij.iterate(model, sites="mlp_out")(X)):
            running.save("x", value)


def test_a_typing_error_in_an_assignment_is_told():
    running = ij.iterate(model)(X)
    with pytest.raises(AttributeError, match=r"no 'modifed_value' to assign to\. Assign to modified_value"):
        for _, _, value in running:
            running.modifed_value = value * 2.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        running.retval = 0  # pyright: ignore[reportAttributeAccessIssue]

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
    def compare(one, other):
        largest = max(1.0, np.abs(other).max(initial=0))  # small entries of a large array are differences of large ones
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * largest)

    jax.tree.map(compare, actual, expected)


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
            running.modified_value = value * (1.0 + layer / 10)
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
@pytest.mark.parametrize("loop", [modify, pytest.param(save, marks=pytest.mark.slow)], ids=["modify", "save"])
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


# Nested scans


def nested(x, w):
    """Two layers in each of three groups, and a site of the group."""

    def group(x, w):
        x = ij.site(x, "group_in")
        x, _ = ij.layer_scan(lambda x, w: (block(x, w, ij.site), None), x, w)
        return ij.site(x * 0.5, "group_out"), None

    return ij.layer_scan(group, x, w)[0].sum(-1)


def nested_by_hand(x, w):
    for group in range(len(w)):
        x = ij.site(x, "group_in", layer=group)
        for inner in range(len(w[group])):
            layer = group * len(w[group]) + inner
            x = block(x, w[group, inner], functools.partial(ij.site, layer=layer))
        x = ij.site(x * 0.5, "group_out", layer=group)
    return x.sum(-1)


def in_groups(fn, x, w):
    order = []
    for layer, name, value in (running := ij.iterate(fn)(x, w)):
        order.append((layer, name))
        if name == "mlp_out":
            running.save(f"out/{layer}", value)
        if layer == 1 and name in ("group_out", "resid_pre"):
            running.save(f"{name}/{layer}", value)
            running.modified_value = value + 1
        if layer == 4 and name == "resid_post":
            running.modified_value = value * 2
        del value
    return running.retval, running.saved, order


@arounds
def test_nested_scans_count_the_layers_through(around):
    w = W[:1].repeat(6, 0).reshape(3, 2, 4, 4) * np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(3, 2, 1, 1)
    orders = []

    def run(x, w, fn):
        out, saved, order = in_groups(fn, x, w)
        orders.append(order)
        return out, saved

    close(around(functools.partial(run, fn=nested))(X, w), jax.jit(functools.partial(run, fn=nested_by_hand))(X, w))
    assert orders[0] == orders[1]


def test_a_layer_scan_in_a_scan_over_steps_saves_for_every_step():
    def steps(fn):
        return lambda x, w: jax.lax.scan(lambda x, _: (x * 0.5, fn(x, w)[0]), x, None, length=3)

    def run(fn, x, w):
        for layer, name, value in (running := ij.iterate(steps(fn), sites="mlp_out")(x, w)):
            running.save(layer, value.sum(-1))
            del value, name
        return running.retval, running.saved

    expected = run(by_hand, X, W)
    assert expected[1][2].shape == (3, 2)
    close(run(model, X, W), expected)


def test_layers_before_the_scan():
    def mixed(x, w):
        x = block(x, w[0], functools.partial(ij.site, layer=0))
        x, _ = ij.layer_scan(lambda x, w: (block(x, w, ij.site), None), x, w[1:], first_layer=1)
        return x.sum(-1), None

    expected = jax.jit(functools.partial(modify, lambda x, w: (by_hand(x, w)[0], None)))(X, W)
    table = ij.list_sites(mixed)(X, W)
    assert [(row.layer, row.name) for row in table] == [(layer, name) for layer in range(LAYERS) for name in NAMES]
    close(jax.jit(functools.partial(modify, mixed))(X, W), expected)


# The program


def test_with_nothing_listening_it_is_the_plain_scan():
    def plain(x, w):
        def body(x, w):
            x = block(x, w, lambda value, _: value)
            return x, x.sum()

        x, sums = jax.lax.scan(body, x, w)
        return x.sum(-1), sums

    assert str(jax.make_jaxpr(model)(X, W)) == str(jax.make_jaxpr(plain)(X, W))

    # Where the pass wants something else, too.
    def elsewhere(x, w):
        for _ in (running := ij.iterate(model, sites="logits")(x, w)):
            pass
        return running.retval

    assert str(jax.make_jaxpr(elsewhere)(X, W)) == str(jax.make_jaxpr(plain)(X, W))


def steered(which, same=False):
    def run(x, w):
        for layer, _, value in (running := ij.iterate(model, sites="mlp_out", layers=which)(x, w)):
            running.modified_value = value * (2.0 if same else 1.0 + layer)
            del value
        return running.retval

    return jax.make_jaxpr(run)(X, W).jaxpr


def test_one_scan_and_one_branch_for_each_thing_that_is_done():
    for which, same, branches in (((1,), False, 2), ((1, 3), False, 3), ((1, 3), True, 2)):
        jaxpr = steered(which, same)
        assert len(equations(jaxpr, "scan")) == 1
        (switch,) = equations(jaxpr, "cond")
        assert len(switch.params["branches"]) == branches
    jaxpr = steered(None, same=True)  # all layers alike: in line
    assert len(equations(jaxpr, "scan")) == 1
    assert equations(jaxpr, "cond") == []


def test_the_body_is_traced_twice_whatever_the_number_of_layers():
    traced = []

    def counting(x, w):
        def body(x, w):
            traced.append(1)
            return block(x, w, ij.site), None

        return ij.layer_scan(body, x, w)[0], None

    jax.make_jaxpr(functools.partial(modify, counting))(X, W)
    assert len(traced) == 2


def temporary_bytes(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.caches
def test_a_fetched_layer_costs_no_memory_but_its_own():
    x, w = (256, 512), (12, 512, 512)
    plain = temporary_bytes(lambda x, w: model(x, w)[0], x, w)
    fetched = temporary_bytes(lambda x, w: ij.fetch(lambda x, w: model(x, w)[0], "mlp_out", 5)(x, w), x, w)
    assert fetched <= 1.02 * plain + 1024


@pytest.mark.caches
@pytest.mark.parametrize("wrap", [WRAPS["plain"], WRAPS["checkpoint"]], ids=["plain", "checkpoint"])
def test_a_gradient_keeps_no_weights_and_nothing_of_the_layers_before(wrap):
    x, w = (256, 512), (12, 512, 512)
    activation = 4 * 256 * 512

    def scanned(x, w):
        return model(x, w, wrap)[0].sum()

    late, early = (temporary_bytes(ij.gradients(scanned, "resid_post", layer), x, w) for layer in (9, 3))
    kept = 1 if wrap is WRAPS["checkpoint"] else 2  # activations a layer that is differentiated
    assert early - late <= 6 * kept * activation * 1.05
    assert late <= (3 * kept + 7) * activation


# Leaving early


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_after_break_what_was_saved_before_is_there(compiled, reverse):
    def run(x, w):
        for layer, name, value in (running := ij.iterate(model)(x, w, reverse=reverse)):
            if name == "mlp_out":
                running.save(f"out/{layer}", value)
            del value
            if layer == 2 and name == "mlp_out":
                break
        with pytest.raises(RuntimeError, match="left before the end"):
            _ = running.retval
        return running.saved

    def by_hand_saved(x, w):
        return save(functools.partial(by_hand, reverse=reverse), x, w)[1]

    saved = (jax.jit(run) if compiled else run)(X, W)
    expected = jax.jit(by_hand_saved)(X, W)
    layers = (4, 3, 2) if reverse else (0, 1, 2)
    assert sorted(saved) == sorted(f"out/{layer}" for layer in layers)
    close(saved, {name: expected[name]["value"] for name in saved})


def test_an_error_in_the_loops_body_comes_out_with_its_frames():
    def failing_loop(x, w):
        for layer, _, value in ij.iterate(model)(x, w):
            del value
            if layer == 3:
                raise KeyError("mine")

    for around in (lambda function: function, jax.jit):
        with pytest.raises(KeyError, match="mine") as error:
            around(failing_loop)(X, W)
        assert any(entry.name == "failing_loop" for entry in error.traceback)
        assert not isinstance(jnp.ones(2) + 1, jax.core.Tracer)


# Mistakes


@pytest.mark.caches
def test_a_value_of_one_layer_used_in_another():
    def run(x, w):
        for layer, name, value in (running := ij.iterate(model)(x, w)):
            if name == "mlp_out" and layer == 1:
                early = value
            if name == "mlp_out" and layer == 3:
                running.modified_value = early * 2
        return running.retval

    expected, _ = jax.jit(lambda x, w: run_by_hand_with_early(x, w))(X, W)
    close(run(X, W)[0], expected)  # a Python loop: right
    with pytest.raises(ij.SiteError, match=r"'mlp_out' of layer 1 at site 'mlp_out' of layer 3.*save"):
        jax.jit(run)(X, W)


def run_by_hand_with_early(x, w):
    def replacing(value, name, layer=None):
        if name == "mlp_out" and layer == 1:
            kept.append(value)
        return kept[0] * 2 if name == "mlp_out" and layer == 3 else value

    kept = []
    for layer in range(len(w)):
        x = block(x, w[layer], functools.partial(replacing, layer=layer))
    return x.sum(-1), None


@pytest.mark.caches
def test_a_value_of_an_inner_function_that_has_returned():
    def two_functions(x, w):
        def body(x, w):
            x = jax.jit(lambda x: ij.site(x * 2, "inner"))(x)
            return ij.site(x @ w, "outer"), None

        return ij.layer_scan(body, x, w)[0]

    def run(x, w):
        for _, name, value in (running := ij.iterate(two_functions)(x, w)):
            if name == "inner":
                inner = value
            else:
                running.modified_value = value + inner
        return running.retval

    with pytest.raises(ij.SiteError, match="stands in another function"):
        jax.jit(run)(X, W)


def test_filters_know_every_layer():
    for around in (lambda function: function, jax.jit):
        with pytest.raises(ij.SiteError, match=r"layer 9.*\n.*\n  layers 0 to 4: resid_pre, mlp_out, resid_post"):
            around(ij.fetch(model, "mlp_out", (1, 9)))(X, W)
        with pytest.raises(ij.SiteError, match=r"did you mean 'mlp_out'"):
            around(ij.fetch(model, "mlp_ou"))(X, W)


def test_a_site_in_the_body_takes_no_layer():
    def wrong(x, w):
        return ij.layer_scan(lambda x, w: (ij.site(x, "resid_pre", layer=3), None), x, w)[0]

    for around in (lambda function: function, jax.jit):
        with pytest.raises(ij.SiteError, match="leave it out"):
            around(ij.fetch(wrong))(X, W)


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_a_carry_that_changes_its_type_is_jaxs_own_error_and_a_weak_one_is_promoted(around):
    def promoted(x, w):
        return ij.layer_scan(lambda total, w: (ij.site(total + w.sum(), "total"), None), 0.0, w)[0]

    close(around(lambda x, w: ij.fetch(promoted, "total")(x, w)[0])(X, W), W.sum())

    def changing(x, w):
        return ij.layer_scan(lambda x, w: (ij.site(x.sum(), "total"), None), x, w)[0]

    with pytest.raises(TypeError, match="carry"):
        around(lambda x, w: ij.fetch(changing, "total")(x, w)[0])(X, W)


# One-liners


@jax.tree_util.register_pytree_node_class
class _Column:
    """As a library's array with named axes: a pytree that is compared entry by entry, and holds nothing but arrays."""

    def __init__(self, array):
        self.array = array

    def __eq__(self, other):
        return self.array.shape == other.array.shape and self.array == other.array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@arounds
def test_a_carry_of_containers_that_are_not_plain(around):
    def boxed(x, w):
        return ij.layer_scan(lambda x, w: (_Column(block(x.array, w, ij.site)), None), _Column(x), w)[0].array

    _, values = around(lambda x, w: ij.fetch(boxed, "resid_post")(x, w))(X, W)
    _, expected = ij.fetch(by_hand, "resid_post")(X, W)
    assert values.keys() == expected.keys()
    close(values, expected)


@arounds
def test_fetch_and_inject(around):
    out, values = around(ij.fetch(model, ("mlp_out", "logits")))(X, W)
    assert list(values) == [*((layer, "mlp_out") for layer in range(LAYERS)), (None, "logits")]
    close(out, jax.jit(by_hand)(X, W))
    mask = np.array([[True], [False]])
    given = {(3, "mlp_out"): values[1, "mlp_out"], (0, "resid_post"): (values[2, "mlp_out"], mask)}
    actual = around(lambda x, w: ij.inject(model)(given, x, w))(X, W)
    close(actual, jax.jit(lambda x, w: ij.inject(by_hand)(given, x, w))(X, W))


@pytest.mark.caches
def test_a_clean_call_is_the_same_to_the_bit_before_and_after():
    clean = jax.jit(model)
    before = jax.tree.map(np.asarray, clean(X, W))
    once, again = (jax.jit(functools.partial(modify, clean))(X, W) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert not np.allclose(once[0], before[0])
    jax.tree.map(np.testing.assert_array_equal, clean(X, W), before)

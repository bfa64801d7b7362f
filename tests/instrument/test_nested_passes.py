"""Passes over passes over a layer scan, compiled and not, against callbacks in a Python loop over the layers.

The double of a pass is `Callbacks`: a site calls the innermost pass that wants it, and what that does sees the passes
around it only. It knows nothing of JAX, so it is differentiated, mapped and scanned as plain code is.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.instrument.pull_back import pull_back

LAYERS = 3
X = np.array([0.3, -0.7], np.float32)
W = np.array([[1.0, 1.3], [0.7, 2.0], [1.5, -0.4]], np.float32)


class Left(Exception):
    """A loop was left."""


class Callbacks:
    """A pass by hand: what it saves, and what is done at a site."""

    around: "tuple[Callbacks, ...]" = ()

    def __init__(self, does, sites):
        self.does, self.sites, self.saved = does, sites, {}

    def save(self, name, value):
        assert name not in self.saved
        self.saved[name] = value

    @classmethod
    def site(cls, value, name, layer=None):
        around = cls.around
        for number in reversed(range(len(around))):
            if around[number].sites is None or name in around[number].sites:
                cls.around = around[:number]
                try:
                    return around[number].does(around[number], layer, name, value)
                finally:
                    cls.around = around
        return value


def looped_by_hand(fn, does, *args, sites=None):
    running, around = Callbacks(does, sites), Callbacks.around
    Callbacks.around = (*around, running)
    try:
        return fn(*args), running.saved
    except Left as error:
        if error.args[0] is not running:
            raise
        return None, running.saved
    finally:
        Callbacks.around = around


def looped(fn, does, *args, sites=None):
    for layer, name, value in (running := ij.iterate(fn, sites=sites)(*args)):
        try:
            new = does(running, layer, name, value)
        except Left as error:
            if error.args[0] is not running:
                raise
            break
        finally:
            del value
        running.modified_value = new
        del new
    else:
        return running.retval, running.saved
    return None, running.saved


def block(x, w, site):
    x = site(jnp.sin(x * w), "a") * 1.1
    return site(x + 0.1, "z")


def scanned(x, wrap=lambda function: function, **options):
    return ij.layer_scan(lambda x, w: (wrap(functools.partial(block, site=ij.site))(x, w), None), x, W, **options)[0]


def unrolled(x, site=ij.site, reverse=False):
    for layer in reversed(range(LAYERS)) if reverse else range(LAYERS):
        x = block(x, W[layer], functools.partial(site, layer=layer))
    return x


def grouped(x):
    """Four layers, in groups of two."""

    def group(x, w):
        x, _ = ij.layer_scan(lambda x, w: (block(x, w, ij.site), None), ij.site(x, "in"), w)
        return ij.site(x * 0.9, "out"), None

    return ij.layer_scan(group, x, np.stack([W[:2], W[1:]]))[0]


def grouped_by_hand(x, site=ij.site):
    for group in range(2):
        x = site(x, "in", layer=group)
        for inner in range(2):
            x = block(x, W[group + inner], functools.partial(site, layer=2 * group + inner))
        x = site(x * 0.9, "out", layer=group)
    return x


def close(actual, expected):
    assert jax.tree.map(jnp.shape, actual) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), actual, expected)


# What the inner loop does: places sites of its own. `site` and `loop` are those of the library, or by hand.


def one_site(site, running, layer, name, value):
    return site(value * 1.5 + 1, "b", layer=layer)


def the_models_name(site, running, layer, name, value):
    return site(value * 1.5 + 1, "a", layer=layer)


def masked(site, running, layer, name, value):
    mask = jnp.array([True, False, True, True])[layer]
    return site(jnp.where(mask, value + 1, value), "b", layer=layer)


def some_layers(site, running, layer, name, value):
    return site(value - layer, "b", layer=layer) if layer != 1 else value


def several(site, running, layer, name, value):
    running.save(layer, site(value.sum(), "sum", layer=layer) * 2)  # not assigned: only looked at
    value = site(value + 1, "b", layer=layer)
    if layer == 2:
        value = site({"value": value * 2, "count": jnp.int32(layer)}, "c", layer=layer)["value"]
    return value * 0.5


PLACES = [one_site, the_models_name, masked, some_layers, several]


def fetched(loop, site, fn, places):
    """A pass that keeps every site, over one that places sites at the model's `a`, and changes what it came to."""

    def inner(x):
        out, saved = loop(fn, functools.partial(places, site), x, sites=["a"])
        return site(out + sum(saved.values()), "after")

    def keep(running, layer, name, value):
        running.save(f"{layer}/{name}", value)
        return value * (1.0 + 0.1 * layer) if name == "b" else value

    return lambda x: loop(inner, keep, x)


def by_hand(x, places, fn=unrolled):
    return jax.jit(fetched(looped_by_hand, Callbacks.site, functools.partial(fn, site=Callbacks.site), places))(x)


def of_leaves(function):
    return jax.grad(lambda x: sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(function(x))))


def in_a_scan(function):
    return lambda x: jax.lax.scan(lambda x, step: (x * step, function(x)), x, jnp.array([0.5, 2.0]))[1]


def mapped(function):
    return lambda x: jax.vmap(function)(jnp.stack([x, x * 2]))


AROUND = {"jit": jax.jit, "checkpoint": jax.checkpoint, "grad": of_leaves, "vmap": mapped, "scan": in_a_scan}
EAGER = pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])


@pytest.mark.caches
@EAGER
@pytest.mark.parametrize("places", PLACES)
def test_a_site_that_a_loop_places_in_a_layer(places, around):
    actual = around(fetched(looped, ij.site, scanned, places))(X)
    close(actual, by_hand(X, places))


@pytest.mark.caches
@pytest.mark.parametrize("places", [several, pytest.param(masked, marks=pytest.mark.slow)])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_under_a_transformation(places, around):
    actual = jax.jit(around(fetched(looped, ij.site, scanned, places)))(X)
    close(actual, jax.jit(around(functools.partial(by_hand, places=places)))(X))


@pytest.mark.parametrize("places", [some_layers, several])
def test_nothing_leaks(places):
    jax.eval_shape(fetched(looped, ij.site, scanned, places), X)


@pytest.mark.caches
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=["jit", "checkpoint", "vmap"])
def test_the_models_site_in_a_function_inside_the_body(wrap):
    """Under vmap the loop sees a number of the vector, as the double does all of them."""

    def of_numbers(x, w):
        x = jax.vmap(lambda x, w: ij.site(jnp.sin(x * w), "a") * 1.1)(x, w)
        return ij.site(x + 0.1, "z"), None

    def function(x):
        return ij.layer_scan(of_numbers, x, W)[0] if wrap is jax.vmap else scanned(x, wrap)

    close(jax.jit(fetched(looped, ij.site, function, some_layers))(X), by_hand(X, some_layers))


@pytest.mark.caches
def test_in_groups_and_from_the_last_layer():
    close(jax.jit(fetched(looped, ij.site, grouped, some_layers))(X), by_hand(X, some_layers, grouped_by_hand))
    backwards = functools.partial(scanned, reverse=True)
    expected = by_hand(X, several, functools.partial(unrolled, reverse=True))
    close(jax.jit(fetched(looped, ij.site, backwards, several))(X), expected)


def placing(fn, places=some_layers):
    return lambda x: looped(fn, functools.partial(places, ij.site), x, sites=["a"])[0]


@pytest.mark.caches
@EAGER
def test_one_liners_on_such_a_site(around):
    out, values = around(ij.fetch(placing(scanned), "b", 2))(X)
    expected_out, expected = jax.jit(ij.fetch(placing(unrolled), "b", 2))(X)
    assert list(values) == [(2, "b")]
    close((out, values[2, "b"]), (expected_out, expected[2, "b"]))
    given = {(0, "b"): X * 2, (2, "b"): (X * 3, np.array([True, False]))}
    actual = around(lambda x: ij.inject(placing(scanned))(given, x))(X)
    close(actual, jax.jit(lambda x: ij.inject(placing(unrolled))(given, x))(X))


def test_list_sites_has_them_in_the_order_of_the_pass():
    for places in (several, the_models_name):
        assert ij.list_sites(placing(scanned, places))(X).rows == ij.list_sites(placing(unrolled, places))(X).rows
    table = ij.list_sites(placing(scanned))(X)
    assert [(row.layer, row.name) for row in table] == [(0, "b"), (0, "z"), (1, "z"), (2, "b"), (2, "z")]


@EAGER
def test_one_name_for_all_layers_is_saved_twice(around):
    def unnumbered(site, running, layer, name, value):
        return site(value, "b")

    with pytest.raises(ij.ReapError, match="saved more than once"):
        around(ij.fetch(placing(scanned, unnumbered), "b"))(X)


# Three passes, a pass in a loop's body, loops that are left


@pytest.mark.caches
def test_three_passes():
    def run(loop, site, fn):
        def middle(running, layer, name, value):
            running.save(layer, value.sum())
            return site(value + layer, "d", layer=layer)

        def inner(x):
            return loop(fn, functools.partial(some_layers, site), x, sites=["a"])[0]

        def with_middle(x):
            out, saved = loop(inner, middle, x, sites=["b"])
            return out + sum(saved.values())

        def outer(running, layer, name, value):
            running.save(f"{layer}/{name}", value)
            return value * 0.9

        return lambda x: loop(with_middle, outer, x)

    expected = jax.jit(run(looped_by_hand, Callbacks.site, functools.partial(unrolled, site=Callbacks.site)))(X)
    assert {"0/d", "2/d", "1/z"} < set(expected[1])
    close(jax.jit(run(looped, ij.site, scanned))(X), expected)


@pytest.mark.caches
@pytest.mark.parametrize("left_at", [None, 1])
def test_a_pass_in_the_body_of_another_saves_for_that_one(left_at):
    def run(loop, site, fn):
        def outer(around, _, outer_name, given):
            def inner(running, layer, name, value):
                if name == "a" and layer != 1:
                    around.save(f"{outer_name}/{layer}", value * given)
                running.save(f"{layer}/{name}", value.sum())
                if (layer, name) == (left_at, "z"):
                    raise Left(running)
                return value + given if name == "a" else value

            out, saved = loop(fn, inner, given)
            return sum(saved.values()) * given + (0.0 if out is None else out)

        return lambda x: loop(lambda x: site(site(x * 2, "p") + 1, "q"), outer, x)

    expected = jax.jit(run(looped_by_hand, Callbacks.site, functools.partial(unrolled, site=Callbacks.site)))(X)
    assert len(expected[1]) == (4 if left_at is None else 2)
    close(jax.jit(run(looped, ij.site, scanned))(X), expected)


# Gradients, and a backward pass that visits


def at_zeros():
    """The gradients by a zero that is added at each site."""
    zeros = {(layer, name): jnp.zeros(2) for layer in range(LAYERS) for name in ("b", "z")}

    def objective(zeros):
        def add(running, layer, name, value):
            return value + zeros[layer, name]

        def inner(x):
            fn = functools.partial(unrolled, site=Callbacks.site)
            return looped_by_hand(fn, functools.partial(some_layers, Callbacks.site), x, sites=["a"])[0]

        out = jnp.asarray(looped_by_hand(inner, add, X)[0])
        return (out**2).sum()

    return jax.jit(jax.grad(objective))(zeros)


@pytest.mark.caches
def test_gradients_at_such_a_site():
    expected = at_zeros()
    gradients_of = functools.partial(ij.gradients, placing(scanned), objective=lambda out: (out**2).sum())
    _, gradients = jax.jit(gradients_of())(X)
    assert set(gradients) == {(0, "b"), (2, "b"), (0, "z"), (1, "z"), (2, "z")}
    close(dict(gradients), {key: expected[key] for key in gradients})
    _, one = gradients_of("b", 2)(X)
    close(dict(one), {(2, "b"): expected[2, "b"]})


@pytest.mark.caches
def test_a_backward_pass_visits_such_a_site():
    def visit(given, layer, name, value, gradient):
        return (value * gradient).sum(), gradient * given if name == "b" else None

    def run(fn, x):
        out, back = pull_back(placing(fn), visit, ("b", "z"), objective=lambda out: (out**2).sum())(x)
        return out, {f"{layer}/{name}": kept for (layer, name), kept in back(2.0).items()}

    close(jax.jit(functools.partial(run, scanned))(X), jax.jit(functools.partial(run, unrolled))(X))


# Sites in a function inside the body that is more than jit or checkpoint


def with_inner(fn_of_site, x, is_scanned):
    if is_scanned:
        return ij.layer_scan(lambda x, w: (fn_of_site(ij.site, x, w), None), x, W)[0]
    for layer in range(LAYERS):
        x = fn_of_site(functools.partial(ij.site, layer=layer), x, W[layer])
    return x


def scan_inside(site, x, w):
    return jax.lax.scan(lambda x, step: (site(jnp.sin(x * w + step), "a"), None), x, jnp.arange(2.0))[0]


def while_inside(site, x, w):
    return jax.lax.fori_loop(0, jnp.int32(w[0] * 2), lambda step, x: site(x + w, "a"), x)


def cond_inside(site, x, w):
    return jax.lax.cond(w[0] > 0.8, lambda x: site(x + w, "a"), lambda x: x, x)


def vmap_inside(site, x, w):
    return jax.vmap(lambda x, w: site(jnp.sin(x * w), "a"))(x, w)


def custom_inside(site, x, w):
    @jax.custom_jvp
    def function(x):
        return site(jnp.sin(x), "a")

    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0] * 5))
    return function(x) * w


@pytest.mark.caches
@pytest.mark.parametrize("layers", [None, 1, (0, 2)], ids=["all", "one", "two"])
@pytest.mark.parametrize("inside", [scan_inside, while_inside, cond_inside, vmap_inside, custom_inside])
def test_what_is_saved_in_a_function_inside_the_body(inside, layers):
    def run(is_scanned):
        def along(x):
            fetching = ij.fetch(lambda x: with_inner(inside, x, is_scanned), "a", layers)
            return jax.jvp(fetching, (x,), (jnp.ones_like(x),))

        return jax.jit(along)(jnp.asarray(X))

    for (out, values), (expected_out, expected) in zip(run(True), run(False), strict=True):
        assert list(values) == list(expected)
        close((out, dict(values)), (expected_out, dict(expected)))


@pytest.mark.caches
def test_forward_jacobian_of_what_one_layer_saves_in_a_custom_derivative():
    @jax.custom_jvp
    def function(x):
        return ij.site(jnp.sin(x), "a")

    function.defjvp(lambda primals, tangents: (function(*primals), jnp.cos(primals[0]) * tangents[0]))

    def saved(x):
        def model(x):
            return ij.layer_scan(lambda x, w: (function(x * w), None), x, jnp.arange(1.0, 4.0))[0]

        for layer, _, value in (running := ij.iterate(model)(x)):
            if layer == 1:
                running.save("twice", 2 * value)
        return running.saved["twice"]

    x = jnp.array([0.3, 0.7])
    expected = jnp.diag(4 * jnp.cos(2 * jnp.sin(x)) * jnp.cos(x))
    for jacobian in (jax.jacfwd(saved), jax.jacfwd(jax.jit(saved)), jax.jacrev(saved)):
        close(jacobian(x), expected)


def test_a_layer_of_its_own_in_a_vmapped_cond():
    """The function inside asks for the layer's number, which is one for the whole batch."""

    def inside(site, x, w):
        return jax.vmap(lambda x: jax.lax.cond(x > 0, lambda x: site(x * 2, "a"), lambda x: x, x))(x)

    def fetched(is_scanned):
        return jax.jit(ij.fetch(lambda x: with_inner(inside, x, is_scanned), "a", 1))(X)

    (out, values), (expected_out, expected) = fetched(True), fetched(False)
    assert list(values) == list(expected) == [(1, "a")]
    close((out, dict(values)), (expected_out, dict(expected)))


@pytest.mark.caches
def test_gradients_across_a_layer_scan_and_another_scan_are_refused():
    """They came from one iteration of the other scan alone."""

    def around(x):
        return jax.lax.scan(lambda x, _: (scanned(x), None), x, length=2)[0].sum()

    def inside(x):
        return with_inner(scan_inside, x, True).sum()

    for fn in (around, inside):
        with pytest.raises(ij.ReapError, match=r"site 'a' stands in a layer_scan and in a scan besides.*Python loop"):
            ij.gradients(fn, "a", 1)(X)


def test_a_layer_scan_in_a_scan_in_a_layer_scan_is_refused_where_it_is_saved():
    def model(x):
        return ij.layer_scan(lambda x, w: (jax.lax.scan(lambda x, _: (scanned(x), w), x, length=2)[0], None), x, W)[0]

    with pytest.raises(ij.ReapError, match=r"site 'a' stands in a layer_scan and in a scan besides"):
        jax.jit(ij.fetch(model, "a"))(X)


# At random


def at_random(seed):
    """Two passes whose loops do something else at every site."""
    draw = random.Random(seed)
    plans = [
        {(layer, name): [draw.choice(["edit", "save", "place", "place twice"]) for _ in range(draw.choice([0, 1, 2]))]
         for layer in range(LAYERS) for name in ("a", "z", "n")}
        for _ in range(2)
    ]  # fmt: skip
    leaves_at = draw.choice([None, (1, "z"), (2, "a"), (2, "n")])
    leaver = draw.choice([0, 1])

    def run(loop, site, fn):
        def does(pass_number, running, layer, name, value):
            for number, step in enumerate(plans[pass_number].get((layer, name), ())):
                if step == "edit":
                    value = value * 1.2 + layer
                elif step == "save" or pass_number == 1:
                    counts[layer, name] = counts.get((layer, name), 0) + 1
                    running.save(f"{layer}/{name}/{number}/{counts[layer, name]}", value)
                else:
                    for _ in range(1 + (step == "place twice")):
                        value = site(value * 0.5 + 1, "n", layer=layer)
            if (layer, name) == leaves_at and pass_number == leaver:
                raise Left(running)
            return value

        def inner(x):
            out, saved = loop(fn, functools.partial(does, 0), x)
            return sum((value.sum() for value in saved.values()), 0.0) + (x if out is None else out)

        counts = {}
        return lambda x: (counts.clear(), loop(inner, functools.partial(does, 1), x))[1]

    return run


@pytest.mark.caches
@EAGER
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 3), id=str(seed)) for seed in range(16)]
)
def test_passes_at_random(seed, around):
    run = at_random(seed)
    expected = jax.jit(run(looped_by_hand, Callbacks.site, functools.partial(unrolled, site=Callbacks.site)))(X)
    close(around(run(looped, ij.site, scanned))(jnp.asarray(X)), expected)

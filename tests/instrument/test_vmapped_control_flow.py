"""Sites in control flow and in shard_map under vmap, against one example after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import interp_jax as ij
from interp_jax.instrument import harvest
from interp_jax.instrument.pull_back import pull_back

X = np.linspace(-0.5, 1.5, 12, dtype=np.float32).reshape(4, 3)


def first(z):
    return ij.site(jnp.sin(z), "s")


def scanned(z):
    return lax.scan(lambda c, _: (first(c), None), z, None, length=2)[0]


def branched(z):
    return lax.cond(z.sum() > 0, first, lambda z: z * 2, z)


def looped(z):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, first(c[1])), (0, z))[1]


def counted(z):
    return lax.fori_loop(0, 2, lambda _, c: first(c), z)


def mapped(z):
    return lax.map(first, z)


def by_hand(function, z):
    """The result and the saved value, for one example."""
    once = np.sin(z)
    if function is branched:
        return (once, once) if z.sum() > 0 else (z * 2, np.zeros_like(z))
    if function is mapped:
        return once, once
    twice = np.sin(once)
    return (twice, twice) if function is looped else (twice, np.stack([once, twice]))


FUNCTIONS = [scanned, branched, looped, counted, mapped]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=[function.__name__ for function in FUNCTIONS])
arounds = pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])


def close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


def sharded(function, **options):
    """Over all devices; the leading axis of what is saved is theirs."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"), **options)


@pytest.mark.caches
@functions
@arounds
@pytest.mark.parametrize("check_vma", [True, False])
def test_examples_that_are_spread_over_devices(function, around, check_vma):
    """Data parallelism: the devices share the batch."""
    out, values = around(ij.fetch(sharded(jax.vmap(function), check_vma=check_vma)))(X)
    outs, saved = zip(*[by_hand(function, z) for z in X], strict=True)
    close(out, np.stack(outs))
    close(values[None, "s"].reshape(len(X), *saved[0].shape), np.stack(saved))


@functions
def test_examples_each_of_which_is_spread_over_devices(function):
    out, values = ij.fetch(jax.vmap(sharded(function)))(X)
    outs, saved = zip(*[by_hand(function, z) for z in X], strict=True)
    close(out, np.stack(outs))
    close(values[None, "s"][:, 0], np.stack(saved))


@arounds
def test_under_vmap_of_shard_map_the_batch_comes_before_the_devices(around):
    close(around(ij.fetch(jax.vmap(sharded(first))))(X)[1][None, "s"], np.sin(X)[:, None])
    close(around(ij.fetch(jax.vmap(sharded(first), in_axes=1)))(X)[1][None, "s"], np.sin(X).T[:, None])
    # In a scan, in two vmaps, and in a branch that not every row takes.
    steps = around(ij.fetch(lambda x: lax.scan(lambda c, _: (jax.vmap(sharded(first))(c), None), x, None, length=2)[0]))
    close(steps(X)[1][None, "s"], np.stack([np.sin(X), np.sin(np.sin(X))])[:, :, None])
    batches = np.stack([X, -X])
    close(around(ij.fetch(jax.vmap(jax.vmap(sharded(first)))))(batches)[1][None, "s"], np.sin(batches)[:, :, None])
    taken = jax.vmap(lambda z: lax.cond(z.sum() > 0, sharded(first), lambda z: z, z))
    positive = X.sum(1, keepdims=True) > 0
    close(around(ij.fetch(taken))(X)[1][None, "s"], np.where(positive, np.sin(X), 0.0)[:, None])


@pytest.mark.caches
def test_a_function_under_vmap_of_shard_map_is_shown_once_and_edited():
    visits = []

    def run(x):
        for layer, name, value in (running := ij.iterate(jax.vmap(sharded(first)))(x)):
            visits.append((layer, name, value.shape))
            running.modified_value = value * 2
            del value
        return running.retval

    close(run(X), 2 * np.sin(X))
    assert visits == [(None, "s", (3,))]
    objective = jax.grad(lambda x: (ij.fetch(jax.vmap(sharded(first)))(x)[1][None, "s"] ** 2).sum())
    close(objective(jnp.asarray(X)), 2 * np.sin(X) * np.cos(X))


def test_what_was_reaped_of_a_vmapped_shard_map_can_be_planted_there():
    function = jax.vmap(sharded(lambda z: harvest.sow(jnp.sin(z), tag="t", name="s", mode="clobber") * 2))
    reaped = harvest.reap(function, tag="t")(X)["s"]
    close(reaped, np.sin(X)[:, None])
    close(harvest.plant(function, tag="t")({"s": reaped + 1}, X), 2 * (np.sin(X) + 1))


def test_what_branches_save_inside_shard_map_may_differ_in_whether_the_devices_agree():
    def run(x):
        function = sharded(
            lambda z: lax.cond(z[0] > 0, lambda z: ij.site(z * 2, "a"), lambda z: ij.site(z * 3, "b"), z)
        )
        for _, name, value in (running := ij.iterate(function)(x)):
            running.save("kept", jnp.ones(3) if name == "a" else value)
            del value
        return running.saved["kept"][0]

    close(run(X[-1]), np.ones(3))
    close(run(X[0]), 3 * X[0])


@functions
@arounds
def test_a_result_that_does_not_depend_on_the_batch_has_no_batch_axis(function, around):
    """`jacfwd` insists that the primal value is one for all directions."""
    z = X[-1]
    jacobian, values = around(ij.fetch(jax.jacfwd(lambda z: function(z).sum())))(z)
    once = np.cos(z)
    close(jacobian, once if function in (branched, mapped) else np.cos(np.sin(z)) * once)
    close(values[None, "s"], by_hand(function, z)[1])


def test_only_one_of_two_carried_values_depends_on_the_batch():
    def of_row(row):
        return lax.scan(lambda c, _: ((first(c[0]), c[1] * 2), None), (X[0], row), None, length=2)[0]

    (out, doubled), values = ij.fetch(jax.vmap(of_row, out_axes=(None, 0)))(X)
    close(out, np.sin(np.sin(X[0])))
    close(doubled, X * 4)
    close(values[None, "s"], np.stack([np.sin(X[0]), np.sin(np.sin(X[0]))]))


# Gradients


def added(zs):
    """What a site is by hand: a zero is added at each visit, and differentiated."""
    left = iter(zs)
    return lambda value: value + next(left)


def layers_of_loops(z, site, loop):
    return loop(lambda z: loop(lambda z: site(jnp.sin(z)), z, 2) * 1.5, z, 3)


def by_loops(body, z, length):
    for _ in range(length):
        z = body(z)
    return z


def by_scans(body, z, length):
    return lax.scan(lambda z, _: (body(z), None), z, None, length=length)[0]


def gradients_by_hand(z, weight):
    """One example's: `[outer iteration, inner iteration, ...]`."""
    zs = jnp.zeros((6, *z.shape))
    gradients = jax.grad(lambda zs: (layers_of_loops(z, added(zs), by_loops) * weight).sum())(zs)
    return gradients.reshape(3, 2, *z.shape)


WEIGHTS = np.arange(1.0, 5.0, dtype=np.float32)


def weighted(model):
    return lambda x: (model(x) * WEIGHTS[:, None]).sum()


@pytest.mark.caches
@arounds
@pytest.mark.parametrize(
    "wrap", [lambda function: function, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"]
)
def test_gradients_in_vmapped_scans_have_the_axes_of_what_is_saved(around, wrap):
    model = weighted(jax.vmap(wrap(lambda z: layers_of_loops(z, lambda value: ij.site(value, "s"), by_scans))))
    _, gradients = around(ij.gradients(model))(X)
    expected = np.stack([gradients_by_hand(z, weight) for z, weight in zip(X, WEIGHTS, strict=True)])
    close(gradients[None, "s"], expected)
    assert gradients[None, "s"].shape == ij.fetch(model)(X)[1][None, "s"].shape


@pytest.mark.caches
def test_gradients_where_vmaps_and_scans_alternate():
    expected = np.stack([gradients_by_hand(z, weight) for z, weight in zip(X, WEIGHTS, strict=True)])

    def steps(z):
        return by_scans(first, z, 2)

    def scan_of_vmap(x):
        return by_scans(lambda x: jax.vmap(steps)(x) * 1.5, x, 3)

    _, gradients = ij.gradients(weighted(scan_of_vmap))(X)
    close(gradients[None, "s"], np.moveaxis(expected, 1, 0))  # [outer, example, inner, ...]
    vmap_of_scan_of_vmap = jax.vmap(lambda z: by_scans(lambda z: jax.vmap(steps)(z) * 1.5, z, 3))
    _, gradients = ij.gradients(weighted(vmap_of_scan_of_vmap))(X)
    close(gradients[None, "s"], np.moveaxis(expected, 3, 2))  # [example, outer, entry, inner]

    def of_batch(scale):
        model = jax.vmap(lambda z: layers_of_loops(z, lambda value: ij.site(value, "s"), by_scans))
        return ij.gradients(lambda x: weighted(model)(x) * scale)(X)[1][None, "s"]

    scales = np.array([1.0, 2.0], np.float32)
    close(jax.vmap(of_batch)(scales), np.stack([expected, 2 * expected]))
    close(lax.map(of_batch, scales), np.stack([expected, 2 * expected]))


@arounds
def test_gradients_in_a_vmapped_branch(around):
    """Zero for the rows that do not take it."""
    _, gradients = around(ij.gradients(weighted(jax.vmap(branched))))(X)
    taken = X.sum(1, keepdims=True) > 0
    close(gradients[None, "s"], np.where(taken, WEIGHTS[:, None], 0.0) * np.ones_like(X))


def test_gradients_in_a_branch_that_holds_a_vmap():
    def model(x):
        return lax.cond(x[0, 0] < 0, lambda x: jax.vmap(scanned)(x), lambda x: ij.site(x, "t"), x)

    _, gradients = ij.gradients(weighted(model))(X)
    last = WEIGHTS[:, None] * np.ones_like(X)
    close(gradients[None, "s"], np.stack([np.cos(np.sin(X)) * last, last], 1))
    close(gradients[None, "t"], np.zeros_like(X))


@pytest.mark.caches
def test_pull_back_in_vmapped_scans():
    """What goes on is changed in each example and iteration, and what is kept has their axes."""

    def visit(given, layer, name, value, gradient):
        return (value * gradient).sum(), gradient * given

    _, back = pull_back(weighted(jax.vmap(scanned)), visit)(jnp.asarray(X))
    once, twice = np.sin(X), np.sin(np.sin(X))
    last = WEIGHTS[:, None] * np.ones_like(X)
    kept = [(np.cos(once) * 3 * last * once).sum(1), (last * twice).sum(1)]
    close(back(jnp.array(3.0))[None, "s"], np.stack(kept, 1))


@pytest.mark.caches
@arounds
def test_gradients_on_several_devices(around):
    once, last = np.sin(X), WEIGHTS[:, None] * np.ones_like(X)
    expected = np.stack([np.cos(once) * last, last], 1)  # [example, iteration, ...]
    _, gradients = around(ij.gradients(weighted(sharded(jax.vmap(scanned)))))(X)
    close(gradients[None, "s"].reshape(expected.shape), expected)
    _, gradients = around(ij.gradients(weighted(sharded(scanned))))(X)
    shards = jax.device_count()
    stacked = np.moveaxis(expected, 1, 0).reshape(2, shards, len(X) // shards, 3)
    close(gradients[None, "s"], np.moveaxis(stacked, 1, 0))

    def of_row(row):
        return ij.gradients(lambda row: sharded(scanned)(row).sum())(row)[1][None, "s"]

    close(around(jax.vmap(of_row))(X)[:, 0], np.stack([np.cos(once), np.ones_like(X)], 1))


@pytest.mark.caches
def test_gradients_that_would_lose_their_axes_are_refused():
    with pytest.raises(ij.ReapError, match=r"shard_map under vmap.*put the vmap inside the shard_map"):
        ij.gradients(lambda x: jax.vmap(sharded(first))(x).sum())(X)

    def layers(x):
        return ij.layer_scan(lambda x, _: (first(x), None), x, None, length=2)[0]

    with pytest.raises(ij.ReapError, match=r"site 's' stands in a layer_scan in a shard_map.*inside the shard_map"):
        ij.gradients(lambda x: sharded(layers)(x).sum(), "s", 1)(X)
    inside = sharded(lambda x: ij.gradients(lambda x: layers(x).sum(), "s", 0)(x)[1][0, "s"])
    close(inside(X), np.cos(np.sin(X)))
    with pytest.raises(ij.ReapError, match="give each value a name of its own"):
        ij.gradients(lambda x: jax.vmap(lambda z: lax.cond(z[0] > 0, first, lambda z: first(2 * z), z))(x).sum())(X)

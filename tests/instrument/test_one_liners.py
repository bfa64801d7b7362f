"""fetch, inject and list_sites against a model written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij

X = np.linspace(-0.5, 1.5, 6, dtype=np.float32).reshape(2, 3)


def model(x, *, scale=1.0):
    x = ij.site(x * scale, "embed")
    for layer in range(2):
        out = ij.site(jnp.sin(x), "mlp_out", layer=layer)
        x = ij.site(x + out, "resid_post", layer=layer)
    return x


def by_hand(x, first=None):
    out0 = jnp.sin(x) if first is None else first
    x1 = x + out0
    out1 = jnp.sin(x1)
    return x1 + out1, out0, x1, out1


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_fetch(around):
    out, values = around(ij.fetch(model, ("embed", "mlp_out")))(X)
    end, out0, _, out1 = by_hand(X)
    np.testing.assert_allclose(out, end, rtol=1e-6)
    assert list(values) == [(None, "embed"), (0, "mlp_out"), (1, "mlp_out")]
    np.testing.assert_allclose(values[None, "embed"], X)
    np.testing.assert_allclose(values[0, "mlp_out"], out0, rtol=1e-6)
    np.testing.assert_allclose(values[1, "mlp_out"], out1, rtol=1e-6)


def test_fetched_values_can_be_mapped_over():
    _, values = ij.fetch(model, "resid_post")(X)
    doubled = jax.tree.map(lambda value: value * 2, values)
    assert isinstance(doubled, ij.SiteValues)
    np.testing.assert_allclose(doubled[1, "resid_post"], 2 * by_hand(X)[0], rtol=1e-6)


def test_fetch_of_a_site_that_occurs_twice():
    with pytest.raises(ij.ReapError, match="more than once"):
        ij.fetch(lambda x: model(model(x)), "embed")(X)


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_inject_with_and_without_a_mask(around):
    new = np.full((2, 3), 7.0, np.float32)
    mask = np.array([[True], [False]])
    injected = around(lambda new, x: ij.inject(model)({(0, "mlp_out"): new}, x))(new, X)
    np.testing.assert_allclose(injected, by_hand(X, new)[0], rtol=1e-6)
    injected = around(lambda new, mask, x: ij.inject(model)({(0, "mlp_out"): (new, mask)}, x))(new, mask, X)
    np.testing.assert_allclose(injected, by_hand(X, np.where(mask, new, np.sin(X)))[0], rtol=1e-6)
    np.testing.assert_allclose(around(lambda x: ij.inject(model)({}, x, scale=2.0))(X), by_hand(2 * X)[0], rtol=1e-6)


def test_inject_mistakes():
    with pytest.raises(ij.SiteError, match="no site is named 'mlp'"):
        ij.inject(model)({(0, "mlp"): X}, X)
    with pytest.raises(ij.SiteError, match=r"no site is \(1, 'embed'\)"):
        ij.inject(model)({(1, "embed"): X, (None, "embed"): X}, X)
    with pytest.raises(ij.SiteError, match=r"site 'mlp_out' of layer 0.*\(2, 3\).*\(3,\)"):
        ij.inject(model)({(0, "mlp_out"): X[0]}, X)
    with pytest.raises(ij.SiteError, match="mask must be boolean"):
        ij.inject(model)({(0, "mlp_out"): (X, X)}, X)


def pairs(x):
    """A site of a tuple of two, and one of three."""
    first, second = ij.site((x, 2 * x), "two")
    return sum(ij.site((first, second, first * second), "three"))


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_inject_a_tuple_into_a_site_of_tuples(around):
    new, mask = np.full((2, 3), 7.0, np.float32), np.array([[True], [False]])

    def inject(values):
        return around(lambda x: ij.inject(pairs)(values, x))(X)

    np.testing.assert_allclose(inject({(None, "two"): (new, new)}), np.full((2, 3), 7 + 7 + 49.0), rtol=1e-6)
    np.testing.assert_allclose(inject({(None, "three"): (new, new, new)}), np.full((2, 3), 21.0), rtol=1e-6)
    first, second = np.where(mask, 7.0, X), np.where(mask, 7.0, 2 * X)
    masked = inject({(None, "two"): ((new, new), mask)})
    np.testing.assert_allclose(masked, first + second + first * second, rtol=1e-5)


def test_inject_random_keys_under_a_mask():
    ours, theirs = (jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))
    injected = ij.inject(lambda keys: ij.site(keys, "keys"))({(None, "keys"): (theirs, np.array([True, False]))}, ours)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(injected), [data(theirs)[0], data(ours)[1]])


def test_inject_inside_shard_map_a_value_that_is_the_same_on_every_device():
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (ij.site(jnp.sin(x), "s") + 1, None), x, None, length=2)[0]

    sharded = jax.shard_map(
        lambda x: ij.inject(scanned)({(None, "s"): np.full((2, 3), 7.0, np.float32)}, x),
        mesh=mesh,
        in_specs=jax.P("d"),
        out_specs=jax.P("d"),
    )
    np.testing.assert_allclose(sharded(X), np.full((2, 3), 8.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed": X}, r"by \(layer, name\), but 'embed' is no such pair"),
        ({"ab": X}, "'ab' is no such pair"),
        ({(None, "embed"): (X, X, X)}, r"site 'embed': a tuple .* is its value.*\(value, mask\).*\(\*, \*, \*\)"),
        ({(None, "embed"): (X, None)}, r"site 'embed'.*\(\*, None\)"),
        ({(None, "embed"): (X, X)}, "site 'embed': a mask must be boolean, but it is of dtype float32.*tuple"),
        ({(None, "embed"): (X, [True])}, "a mask must be boolean, but it is a list"),
        ({(None, "embed"): (X[0], np.array(True))}, r"site 'embed'.*shape \(2, 3\).*shape \(3,\)"),
        ({(None, "embed"): (X.astype(int), np.array(True))}, "site 'embed'.*float32.*int32.*astype"),
        ({(None, "embed"): (X, np.ones(2, bool))}, r"site 'embed'.*shape \(2, 3\), but it has shape \(2,\)"),
        ({(None, "embed"): (X, np.ones((1, 2, 3), bool))}, r"site 'embed'.*it has shape \(1, 2, 3\)"),
    ],
)
def test_inject_what_does_not_fit(given, message):
    with pytest.raises(ij.SiteError, match=message):
        ij.inject(model)(given, X)


@pytest.mark.parametrize("layers", [np.int64(1), [np.int32(1)], np.arange(1, 2)], ids=["one", "list", "array"])
def test_layers_may_be_numbers_of_numpy(layers):
    def numbered(x):
        for layer in np.arange(2):
            x = ij.site(x * 2, "resid_post", layer=layer)
        return x

    _, values = ij.fetch(numbered, layers=layers)(X)
    assert [(type(layer), layer, name) for layer, name in values] == [(int, 1, "resid_post")]
    np.testing.assert_allclose(values[1, "resid_post"], 4 * X, rtol=1e-6)


def test_list_sites_prints_a_table_and_computes_nothing():
    computed = []

    def counted(x, *, kind):
        jax.debug.callback(lambda _: computed.append(1), x)
        assert kind == "static"
        return model(x).astype(jnp.bfloat16)

    table = ij.list_sites(counted)(jax.ShapeDtypeStruct((1000, 3), jnp.float32), kind="static")
    assert computed == []
    assert len(table) == 5
    assert table[1] == (0, "mlp_out", (1000, 3), jnp.float32)
    assert [row.name for row in table] == ["embed", "mlp_out", "resid_post", "mlp_out", "resid_post"]
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "site", "shape", "dtype"]
    assert lines[1].split() == ["-", "embed", "(1000,", "3)", "float32"]
    assert "<td>mlp_out</td>" in table._repr_html_()


def test_list_sites_of_a_tree_escapes_its_html():
    table = ij.list_sites(lambda x: ij.site({"a": x}, "<b>"))(X)
    assert table[0].shape == {"a": (2, 3)}
    assert "<td>&lt;b&gt;</td>" in table._repr_html_()

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

"""Rows of a table by their numbers, against NumPy's indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.models.rows_of import rows_of

NUMBERS = np.array([[3, 0, 4], [4, 4, 1]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_and_their_derivatives(dtype, way):
    table, change = jax.random.normal(jax.random.key(0), (2, 5, 3), dtype)
    table = table.at[4, 1].set(-jnp.inf).at[0, 0].set(-0.0)
    found, derivative = way(
        lambda table, change: jax.jvp(lambda t: rows_of(t, jnp.asarray(NUMBERS)), (table,), (change,))
    )(table, change)
    assert found.dtype == derivative.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(table)[NUMBERS])
    np.testing.assert_array_equal(derivative, np.asarray(change)[NUMBERS])
    assert np.signbit(np.asarray(found[0, 1, 0], np.float32))
    gradient = way(jax.grad(lambda table: rows_of(table, jnp.asarray(NUMBERS)).astype(jnp.float32).sum()))(change)
    np.testing.assert_array_equal(gradient, np.bincount(NUMBERS.ravel(), minlength=5)[:, None] * np.ones(3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_that_is_not_there_is_nan(dtype):
    numbers = jnp.array([4, 5, -1])
    found = jax.jit(rows_of)(jnp.ones((5, 3), dtype), numbers)
    assert np.isnan(np.asarray(found, np.float32)).tolist() == [[False] * 3, [True] * 3, [True] * 3]
    gradient = jax.grad(lambda table: rows_of(table, numbers).astype(jnp.float32).sum())(jnp.ones((5, 3), dtype))
    assert np.asarray(gradient, np.float32)[:, 0].tolist() == [0, 0, 0, 0, 1]

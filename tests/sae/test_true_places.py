"""Where a mask is true, against NumPy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from interp_jax.sae.true_places import first_true, true_places


@pytest.mark.caches
@hypothesis.given(st.integers(1, 200), st.floats(0, 1), st.integers(1, 50), st.integers(0, 100))
@hypothesis.settings(deadline=None, max_examples=15)
def test_the_first_true_entries_are_found_in_order(size, share, k, seed):
    mask = np.random.default_rng(seed).random(size) < share
    places = jax.jit(true_places)(jnp.asarray(mask))
    expected = np.flatnonzero(mask)
    assert int(places.total) == len(expected)
    padded = np.concatenate([expected, np.full(k, -1)])[:k]
    np.testing.assert_array_equal(jax.jit(first_true, static_argnums=1)(places, k), padded)


@pytest.mark.parametrize("value", [True, False])
def test_all_or_none(value):
    found = first_true(true_places(jnp.full((3, 43), value)), 129)
    np.testing.assert_array_equal(found, np.arange(129) if value else np.full(129, -1))

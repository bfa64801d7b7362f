"""MMCS against scikit-learn's cosine similarities, all at once."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from interp_jax.sae import max_cosines, mean_max_cosine


def test_it_sees_directions_alone():
    truth = np.eye(4, dtype=np.float32)[:3]
    found = np.array([[0, 5, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32)
    assert mean_max_cosine(jnp.asarray(truth), jnp.asarray(found)) == pytest.approx((1 + 1 + np.sqrt(0.5)) / 3)


@pytest.mark.caches
@pytest.mark.parametrize(("n", "d_sae"), [(2050, 1500), (3, 2048), (1024, 1)])
def test_blocks_do_not_show(n, d_sae):
    random = np.random.default_rng(0)
    truth = random.normal(size=(n, 7)).astype(np.float32)
    dictionary = random.normal(size=(d_sae, 7)).astype(np.float32) * random.exponential(size=(d_sae, 1))
    dictionary = dictionary.astype(np.float32)
    expected = cosine_similarity(truth, dictionary).max(axis=1)
    np.testing.assert_allclose(max_cosines(jnp.asarray(truth), jnp.asarray(dictionary)), expected, atol=1e-6)
    assert mean_max_cosine(jnp.asarray(truth), jnp.asarray(dictionary)) == pytest.approx(expected.mean(), rel=1e-5)


def test_rows_of_zero_have_no_direction():
    one, opposite, zero = jnp.array([[1.0, 0]]), jnp.array([[-2.0, 0]]), jnp.zeros((1, 2))
    assert mean_max_cosine(one, jnp.concatenate([opposite, zero])) == pytest.approx(-1)
    assert mean_max_cosine(jnp.concatenate([one, zero]), one) == pytest.approx(1)
    assert np.isnan(mean_max_cosine(one, zero))
    assert np.isnan(mean_max_cosine(zero, one))


def test_nan_is_not_hidden():
    nan = jnp.array([[1.0, 0], [jnp.nan, 0]])
    assert np.isnan(mean_max_cosine(jnp.eye(2), nan))
    assert np.isnan(mean_max_cosine(nan, jnp.eye(2)))


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"truth has shape \(3, 4\) and dictionary \(5, 6\)"):
        mean_max_cosine(jnp.ones((3, 4)), jnp.ones((5, 6)))

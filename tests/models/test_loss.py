"""The next-token loss against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.models.loss import next_token_loss, next_token_losses

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.


def _reference(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits = logits[:, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-6)])
def test_agrees_with_numpy(dtype, tolerance):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(scale=20.0, size=(3, 7, 50)), dtype)
    tokens = rng.integers(0, 50, size=(3, 7))
    expected = _reference(np.asarray(logits, np.float64), tokens)
    losses = next_token_losses(logits, jnp.asarray(tokens))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=1e-5)
    np.testing.assert_allclose(next_token_loss(logits, jnp.asarray(tokens)), expected.mean(), rtol=1e-5)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    tokens = jnp.array([[1, 2, 3]])
    assert float(next_token_loss(jnp.zeros((1, 3, 49)), tokens)) == pytest.approx(np.log(49), rel=1e-6)


def test_gradient_is_probabilities_less_the_target():
    logits, tokens = jnp.zeros((1, 2, 4)), jnp.array([[0, 3]])
    gradient = jax.grad(next_token_loss)(logits, tokens)
    np.testing.assert_allclose(gradient, [[[0.25, 0.25, 0.25, -0.75], [0.0, 0.0, 0.0, 0.0]]], atol=1e-6)


@pytest.mark.parametrize("outside", [-1, 4])
def test_ids_outside_the_vocabulary_give_nan_and_no_plausible_number(outside):
    losses = next_token_losses(jnp.zeros((1, 3, 4)), jnp.array([[0, outside, 1]]))
    assert np.isnan(losses[0, 0])
    assert np.isfinite(losses[0, 1])


def test_a_row_of_one_token_predicts_nothing():
    with pytest.raises(ValueError, match=r"at least 2 tokens.*\(5, 1\)"):
        next_token_loss(jnp.zeros((5, 1, 4)), jnp.zeros((5, 1), jnp.int32))

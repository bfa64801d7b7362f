"""Gradients a slice of rows at a time are those of the whole batch, here worked out by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import ReLUSAE
from interp_jax.sae.autoencoder import Batch, Sparsity
from interp_jax.sae.gradient_by_slices import gradient_by_slices

COEFFICIENT = 0.3


def by_hand(sae, batch):
    """The loss, the error, the firings and the gradients of a ReLU autoencoder."""
    W_enc, W_dec, b_enc, b_dec = (np.asarray(sae.parameter(name), np.float64) for name in ARRAYS)
    x, weights = np.asarray(batch.x, np.float64), np.asarray(batch.row_weights, np.float64)[:, None]
    codes = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    error = x - (codes @ W_dec + b_dec)
    squared = np.mean(weights * np.sum(error**2, axis=1, keepdims=True))
    by_output = -2 * weights * error / len(x)
    by_pre = (codes > 0) * (by_output @ W_dec.T + COEFFICIENT / len(x))
    by_b_enc = by_pre.sum(axis=0)
    gradients = (x - b_dec).T @ by_pre, codes.T @ by_output, by_b_enc, by_output.sum(axis=0) - W_enc @ by_b_enc
    return squared, squared + COEFFICIENT * codes.sum() / len(x), error, (codes > 0).sum(axis=0), gradients


ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec")


@pytest.mark.parametrize("n_rows", [1024, 1500, 1021, 96], ids=["slices", "odd_slices", "prime", "few"])
def test_slices_give_the_gradient_of_the_whole(n_rows):
    keys = jax.random.split(jax.random.key(n_rows), 3)
    sae = ReLUSAE.random(12, 40, key=keys[0])
    sae = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(keys[1], leaf.shape), sae)
    x = jax.random.normal(keys[2], (n_rows, 12))
    batch = Batch(x, x, jnp.linspace(0.5, 1, n_rows))

    @jax.jit
    def run(sae, batch):
        return gradient_by_slices(lambda sae, rows: sae.objective(rows, Sparsity(COEFFICIENT)), sae, batch)

    outcome, gradient = run(sae, batch)
    squared, loss, error, firings, gradients = by_hand(sae, batch)
    # float32 against float64: sums over a thousand rows of numbers about one, in losses and gradients alike.
    np.testing.assert_allclose(outcome.squared_error, squared, rtol=1e-5)
    np.testing.assert_allclose(outcome.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.error, error, atol=1e-5)
    np.testing.assert_array_equal(outcome.firings, firings)
    for name, expected in zip(ARRAYS, gradients, strict=True):
        np.testing.assert_allclose(gradient.parameter(name), expected, atol=1e-5)


def test_memory_is_that_of_a_slice():
    sae = jax.eval_shape(lambda: ReLUSAE.random(8, 4096, key=jax.random.key(0)))
    x = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    batch = Batch(x, x, jax.ShapeDtypeStruct((4096,), jnp.float32))

    def run(sae, batch):
        return gradient_by_slices(lambda sae, rows: sae.objective(rows, Sparsity(COEFFICIENT)), sae, batch)

    memory = jax.jit(run).lower(sae, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 * 4

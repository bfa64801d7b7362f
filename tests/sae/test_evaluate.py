"""Measures against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import TopKSAE, evaluate, loss_recovered, mean_max_cosine


def test_evaluate_equals_its_definitions_whatever_the_batches():
    sae = TopKSAE.random(6, 20, 3, key=jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 2
    found = evaluate(sae, [x[:13], x[13:]])
    codes = np.asarray(sae.encode(jnp.asarray(x)))
    output = np.asarray(sae(jnp.asarray(x)))
    assert found.n_rows == 50
    assert found.l0 == pytest.approx((codes > 0).sum(1).mean())
    assert found.fvu == pytest.approx(((x - output) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    cosine = (x * output).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(output, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-4)
    assert found.dead_share == pytest.approx((codes > 0).any(0).mean() * -1 + 1)
    np.testing.assert_allclose(found.density, (codes > 0).mean(0))


def test_constant_and_zero_activations_have_no_nan_but_where_it_is_meant():
    sae = TopKSAE.random(6, 20, 3, key=jax.random.key(0))
    found = evaluate(sae, [np.zeros((4, 6), np.float32)])
    assert np.isnan(found.fvu)
    assert found.cosine == 0
    assert found.dead_share == 1


def test_outliers_are_told_apart():
    sae = TopKSAE.random(6, 20, 3, key=jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    x[4] *= 1000
    found = evaluate(sae, [x])
    typical = evaluate(sae, [np.delete(x, 4, axis=0)])
    assert found.outlier_share == pytest.approx(0.02)
    assert found.fvu_typical == pytest.approx(typical.fvu, rel=1e-4)
    assert abs(found.fvu - typical.fvu) > 0.01


def test_loss_recovered():
    assert loss_recovered(3.0, 3.0, 8.0) == 1
    assert loss_recovered(3.0, 8.0, 8.0) == 0
    assert loss_recovered(3.0, 4.0, 8.0) == pytest.approx(0.8)
    assert np.isnan(loss_recovered(3.0, 3.0, 3.0))


def test_mean_max_cosine_sees_directions_alone():
    truth = np.eye(4, dtype=np.float32)[:3]
    found = np.array([[0, 5, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32)
    assert mean_max_cosine(jnp.asarray(truth), jnp.asarray(found)) == pytest.approx((1 + 1 + np.sqrt(0.5)) / 3)


def test_bad_inputs():
    sae = TopKSAE.random(6, 20, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no activations"):
        evaluate(sae, [])
    with pytest.raises(ValueError, match=r"shape \(4, 7\); expected \[batch, 6\]"):
        evaluate(sae, [np.zeros((4, 7))])

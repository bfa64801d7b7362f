"""Measures against their definitions in NumPy, scikit-learn and SciPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.metrics import explained_variance_score, r2_score
from sklearn.metrics.pairwise import paired_cosine_distances

from interp_jax.sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
    evaluate,
    loss_recovered,
)

D_IN, D_SAE, D_OUT = 6, 20, 9
KINDS = {
    TopKSAE: {"k": 3},
    BatchTopKSAE: {"k": 3},
    MatryoshkaSAE: {"k": 3, "widths": (5, 20)},
    ReLUSAE: {},
    GatedSAE: {},
    JumpReLUSAE: {"threshold": 0.5},
}


def rows(n, width, seed=0, offset=2.0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32) + np.float32(offset)


def assert_equals_its_definitions(found, codes, output, target):
    codes, output, target = (np.asarray(array, np.float64) for array in (codes, output, target))
    assert found.n_rows == len(target)
    assert found.l0 == pytest.approx(np.count_nonzero(codes, axis=1).mean())
    r2 = r2_score(target, output, multioutput="variance_weighted")
    assert found.fvu == pytest.approx(1 - r2, rel=1e-4)
    explained = explained_variance_score(target, output, multioutput="variance_weighted")
    assert found.explained_variance == pytest.approx(explained, rel=1e-4, abs=1e-4)
    assert found.explained_variance > r2 + 1e-3, "the offset of a random SAE's error should have been seen"
    cosines = 1 - paired_cosine_distances(target, output)
    assert found.cosine == pytest.approx(cosines.mean(), rel=1e-4)
    norms = (np.linalg.norm(array, axis=1).mean() for array in (output, target))
    assert found.l2_ratio == pytest.approx(next(norms) / next(norms), rel=1e-4)
    best = scipy.optimize.minimize_scalar(lambda log: np.mean((output / np.exp(log) - target) ** 2), bracket=(-1, 1))
    assert found.relative_reconstruction_bias == pytest.approx(np.exp(best.x), rel=1e-3)
    is_active = codes != 0
    assert found.dead_share == pytest.approx(1 - is_active.any(0).mean())
    np.testing.assert_allclose(found.density, is_active.mean(0))


@pytest.mark.caches
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_whatever_the_batches(kind):
    sae = kind.random(D_IN, D_SAE, key=jax.random.key(0), **KINDS[kind])
    x = rows(50, D_IN)
    found = evaluate(sae, [x[:13], x[13:13], jnp.asarray(x[13:])])
    assert_equals_its_definitions(found, sae.encode(jnp.asarray(x)), sae(jnp.asarray(x)), x)


@pytest.mark.parametrize("has_skip", [False, True])
def test_a_transcoder_on_pairs(has_skip):
    sae = ReLUSAE.random(D_IN, D_SAE, key=jax.random.key(0), d_out=D_OUT, has_skip=has_skip)
    if has_skip:
        sae = sae.replace(W_skip=jax.random.normal(jax.random.key(1), (D_OUT, D_IN)))
    x = rows(50, D_IN)
    target = np.asarray(sae(jnp.asarray(x))) * 1.3 + rows(50, D_OUT, seed=1, offset=0.5)
    found = evaluate(sae, ((x[part], target[part]) for part in (slice(0, 20), slice(20, 50))))
    assert_equals_its_definitions(found, sae.encode(jnp.asarray(x)), sae(jnp.asarray(x)), target)


def test_a_pair_may_be_of_one_width():
    sae = ReLUSAE.random(D_IN, D_SAE, key=jax.random.key(0), d_out=D_IN)
    x = rows(50, D_IN)
    target = np.asarray(sae(jnp.asarray(x))) * 1.3 + rows(50, D_IN, seed=1, offset=0.5)
    found = evaluate(sae, [(x, target)])
    assert_equals_its_definitions(found, sae.encode(jnp.asarray(x)), sae(jnp.asarray(x)), target)


def scaled_identity(factor, offset=0.0):
    """Gives back what it gets times a factor, plus an offset."""
    both = jnp.concatenate([jnp.eye(D_IN), -jnp.eye(D_IN)])
    return ReLUSAE(
        W_enc=both.T,
        b_enc=jnp.zeros(2 * D_IN),
        W_dec=factor * both,
        b_dec=jnp.full(D_IN, offset),
        apply_b_dec_to_input=False,
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_shrinkage_is_the_factor_that_reconstructions_are_shrunk_by(factor):
    found = evaluate(scaled_identity(factor), [rows(50, D_IN)])
    assert found.l2_ratio == pytest.approx(factor, rel=1e-5)
    assert found.relative_reconstruction_bias == pytest.approx(factor, rel=1e-5)
    assert found.cosine == pytest.approx(1, rel=1e-5)
    assert found.l0 == pytest.approx(D_IN)


def test_a_constant_offset_counts_in_fvu_alone():
    x = rows(50, D_IN)
    found = evaluate(scaled_identity(1.0, offset=0.25), [x])
    assert found.explained_variance == pytest.approx(1, abs=1e-5)
    assert found.fvu == pytest.approx(D_IN * 0.25**2 / x.var(axis=0).sum(), rel=1e-4)


def test_a_large_mean_does_not_drown_the_variance():
    x = (rows(4000, D_IN, offset=0.0) + np.float32(1000)).astype(np.float32)
    sae = TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0)).replace(b_dec=jnp.asarray(x.mean(0)))
    found = evaluate(sae, np.split(x, 40))
    exact = x.astype(np.float64)
    r2 = r2_score(exact, np.asarray(sae(jnp.asarray(x))), multioutput="variance_weighted")
    assert found.fvu == pytest.approx(1 - r2, rel=1e-3)


def test_shares_of_rare_latents():
    """Latent i is active where coordinate i is: one in 200,000 rows, one in 20,000, one in 100, never."""
    every = [200_000, 20_000, 100]
    sae = ReLUSAE(W_enc=jnp.eye(4), b_enc=jnp.zeros(4), W_dec=jnp.eye(4), b_dec=jnp.zeros(4))
    x = np.zeros((200_000, 4), np.float32)
    for latent, period in enumerate(every):
        x[::period, latent] = 1
    found = evaluate(sae, np.split(x, 4))
    assert (found.dead_share, found.share_below_1e_5, found.share_below_1e_4) == (0.25, 0.5, 0.75)
    np.testing.assert_allclose(found.density, [*(1 / period for period in every), 0])
    assert found.histogram.never == 1
    assert sum(found.histogram.counts) == 3


def test_constant_and_zero_activations_have_no_nan_but_where_it_is_meant():
    sae = TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0))
    found = evaluate(sae, [np.zeros((4, D_IN), np.float32)])
    nan = ("fvu", "fvu_typical", "explained_variance", "l2_ratio", "relative_reconstruction_bias")
    assert all(np.isnan(getattr(found, name)) for name in nan)
    assert found.cosine == 0
    assert found.dead_share == 1
    summary = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert {name for name, value in summary.items() if value is None} == set(nan)


def test_a_summary_is_json():
    sae = TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0))
    found = evaluate(sae, [rows(50, D_IN)])
    summary = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert summary == {name: getattr(found, name) for name in summary}
    assert "density" not in summary
    assert summary["n_rows"] == 50


def test_outliers_are_told_apart():
    sae = TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0))
    x = rows(50, D_IN, offset=0.0)
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


def test_bad_inputs():
    sae = TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no activations"):
        evaluate(sae, [])
    with pytest.raises(ValueError, match=r"batch 1 has shape \(4, 7\); expected \[batch, 6\], the SAE's d_in"):
        evaluate(sae, [np.zeros((4, 6)), np.zeros((4, 7))])
    with pytest.raises(ValueError, match="batch 0 holds NaN or infinity"):
        evaluate(sae, [np.full((4, 6), np.nan)])
    with pytest.raises(
        ValueError, match=r"activations have the shape \(4, 1\); expected \[..., 6\], the autoencoder's d_in"
    ):
        sae(jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"codes have the shape \(4, 6\); expected"):
        sae.decode(jnp.zeros((4, 6)))
    transcoder = TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0), d_out=D_OUT)
    with pytest.raises(ValueError, match=r"batch 0 is a ndarray; expected a pair .* from width 6 to 9"):
        evaluate(transcoder, [np.zeros((4, 6))])
    with pytest.raises(ValueError, match=r"shape \(4, 6\); expected \[batch, 9\], the SAE's d_out"):
        evaluate(transcoder, [(np.zeros((4, 6)), np.zeros((4, 6)))])
    with pytest.raises(ValueError, match="4 inputs and 3 targets"):
        evaluate(transcoder, [(np.zeros((4, 6)), np.zeros((3, 9)))])

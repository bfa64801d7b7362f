"""The structure of dictionaries against SciPy and scikit-learn, and of dictionaries whose structure is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics.pairwise import paired_cosine_distances

from interp_jax.sae import ReLUSAE, TopKSAE, dictionary_structure


def sae_of(W_dec, W_enc=None, **options):
    W_dec = jnp.asarray(W_dec, jnp.float32)
    W_enc = W_dec.T if W_enc is None else W_enc
    return ReLUSAE(W_enc=W_enc, b_enc=jnp.zeros(len(W_dec)), W_dec=W_dec, b_dec=jnp.zeros(W_dec.shape[1]), **options)


@pytest.mark.caches
@pytest.mark.parametrize("d_sae", [40, 5000])
def test_it_equals_scipy_and_scikit_learn(d_sae):
    random = np.random.default_rng(0)
    W_dec = (random.laplace(size=(d_sae, 24)) * random.exponential(size=24) + 0.3).astype(np.float32)
    W_enc = random.normal(size=(24, d_sae)).astype(np.float32) + W_dec.T
    found = dictionary_structure(sae_of(W_dec, jnp.asarray(W_enc)))
    unit = W_dec / np.linalg.norm(W_dec.astype(np.float64), axis=1, keepdims=True)
    # Not centred: the singular values' squares are the second moment about zero.
    squares = TruncatedSVD(10, algorithm="arpack", random_state=0).fit(unit).singular_values_ ** 2
    assert found.fve_top_1 == pytest.approx(squares[0] / d_sae, rel=1e-4)
    assert found.fve_next_9 == pytest.approx(squares[1:].sum() / d_sae, rel=1e-4)
    kurtoses = scipy.stats.kurtosis(W_dec.astype(np.float64), axis=1)
    np.testing.assert_allclose(found.kurtoses, kurtoses, rtol=1e-3, atol=1e-4)
    assert found.kurtosis == pytest.approx(kurtoses.mean(), rel=1e-4)
    cosines = 1 - paired_cosine_distances(W_enc.T, W_dec)
    np.testing.assert_allclose(found.encoder_decoder_cosines, cosines, atol=1e-5)
    assert found.encoder_decoder_cosine == pytest.approx(cosines.mean(), rel=1e-4)


def test_known_structures():
    axes = dictionary_structure(sae_of(np.eye(20)))
    assert axes.fve_top_1 == pytest.approx(1 / 20)
    assert axes.fve_next_9 == pytest.approx(9 / 20)
    assert axes.kurtosis == pytest.approx(scipy.stats.kurtosis(np.eye(20)[0]), rel=1e-4)
    assert axes.encoder_decoder_cosine == pytest.approx(1)
    collapsed = dictionary_structure(sae_of(np.arange(1, 6)[:, None] * np.linspace(-1, 2, 20)))
    assert collapsed.fve_top_1 == pytest.approx(1, rel=1e-5)
    assert collapsed.fve_next_9 == pytest.approx(0, abs=1e-5)
    spread = dictionary_structure(TopKSAE.random(50, 4000, 4, key=jax.random.key(0)))
    assert spread.fve_top_1 == pytest.approx(1 / 50, rel=0.3)
    assert spread.fve_next_9 == pytest.approx(9 / 50, rel=0.3)
    assert spread.kurtosis == pytest.approx(0, abs=0.15)


def test_rows_of_zero_count_in_nothing():
    W_dec = np.random.default_rng(0).normal(size=(6, 12))
    whole = dictionary_structure(sae_of(W_dec))
    with_dead = dictionary_structure(sae_of(np.concatenate([W_dec, np.zeros((2, 12))])))
    for name in ("fve_top_1", "fve_next_9", "kurtosis", "encoder_decoder_cosine"):
        assert getattr(with_dead, name) == pytest.approx(getattr(whole, name), rel=1e-5), name
    assert np.isnan(with_dead.kurtoses[6:]).all()
    assert np.isnan(with_dead.encoder_decoder_cosines[6:]).all()
    nothing = dictionary_structure(sae_of(np.zeros((3, 12))))
    assert set(nothing.as_dict().values()) == {None}


def test_constant_rows_have_no_kurtosis():
    found = dictionary_structure(sae_of(np.stack([np.full(12, 0.1), np.linspace(-1, 1, 12)])))
    assert np.isnan(found.kurtoses[0])
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(np.linspace(-1, 1, 12)), rel=1e-4)


def test_a_transcoder_has_no_cosine_between_its_two_widths():
    found = dictionary_structure(TopKSAE.random(12, 30, 4, key=jax.random.key(0), d_out=7))
    assert np.isnan(found.encoder_decoder_cosines).all()
    summary = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert summary["encoder_decoder_cosine"] is None
    assert summary["fve_top_1"] + summary["fve_next_9"] == pytest.approx(1)

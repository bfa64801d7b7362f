"""Orthogonal matching pursuit against scikit-learn, SciPy's non-negative least squares and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from pursuit_problems import KINDS, check_gradients, check_invariants, check_never_grows, hard_problem, problem
from sklearn.linear_model import orthogonal_mp

from interp_jax.pursuit import kkt_violation, matching_pursuit, nonnegative_omp, orthogonal_matching_pursuit

pytestmark = pytest.mark.caches  # a pursuit is compiled once for each size, not for each call


def signed(signals, dictionary, l0, **options):
    return orthogonal_matching_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), l0, nonnegative=False, **options)


def slow_nonnegative_omp(signals, dictionary, l0):
    """Pick by the greatest positive correlation, then SciPy's NNLS on all that was picked, in float64."""
    signals, dictionary = signals.astype(np.float64), dictionary.astype(np.float64)
    weights = np.zeros((len(signals), len(dictionary)))
    for row, signal in zip(weights, signals, strict=True):
        picked = []
        for _ in range(l0):
            correlations = (signal - row @ dictionary) @ dictionary.T
            best = int(correlations.argmax())
            if correlations[best] < 1e-9:
                break
            picked = sorted({*picked, best})
            row[:] = 0
            row[picked] = scipy.optimize.nnls(dictionary[picked].T, signal)[0]
    return weights


def test_signed_codes_are_scikit_learns():
    signals, dictionary = problem(0, batch=32, d_in=64, d_sae=128, noise=0.1)
    code = signed(signals, dictionary, 8)
    expected = orthogonal_mp(dictionary.T.astype(np.float64), signals.T.astype(np.float64), n_nonzero_coefs=8).T
    np.testing.assert_allclose(code.dense(128), expected, atol=2e-5)
    residual = np.linalg.norm(signals - expected @ dictionary, axis=1)
    np.testing.assert_allclose(code.residual_norm, residual, atol=1e-5)


def test_nonnegative_codes_are_those_of_nnls_at_every_step():
    signals, dictionary = problem(1, batch=24, d_in=24, d_sae=60, active=6, noise=0.3)
    code = nonnegative_omp(jnp.asarray(signals), jnp.asarray(dictionary), 10)
    expected = slow_nonnegative_omp(signals, dictionary, 10)
    np.testing.assert_allclose(code.dense(60), expected, atol=3e-5)
    assert (kkt_violation(code, jnp.asarray(signals), jnp.asarray(dictionary)) < 1e-5).all()
    assert (np.asarray(code.l0_reached) < 10).any(), "the problem must be one where a bound is in the way"


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
def test_what_holds_on_every_problem(seed, kind):
    signals, dictionary = hard_problem(kind, seed)
    arrays = jnp.asarray(signals), jnp.asarray(dictionary)
    code = nonnegative_omp(*arrays, 7)
    check_invariants(code, signals, dictionary, nonnegative=True)
    assert (kkt_violation(code, *arrays) < 1e-5).all()
    for row, signal, found in zip(np.asarray(code.weights), signals, np.asarray(code.indices), strict=True):
        if not row.any():  # SciPy's NNLS of no atoms aborts the process
            continue
        atoms = dictionary[found[row != 0]].astype(np.float64)
        norms = np.linalg.norm(atoms, axis=1)
        scale = np.linalg.norm(signal.astype(np.float64))
        _, best = scipy.optimize.nnls((atoms / norms[:, None]).T, signal.astype(np.float64) / scale)
        left = np.linalg.norm(signal.astype(np.float64) - row[row != 0].astype(np.float64) @ atoms) / scale
        assert left == pytest.approx(best, abs=1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
def test_the_signed_residual_is_orthogonal_to_the_atoms(seed, kind):
    signals, dictionary = hard_problem(kind, seed)
    code = signed(signals, dictionary, 7)
    check_invariants(code, signals, dictionary, nonnegative=False)
    scale = np.linalg.norm(signals.astype(np.float64), axis=1)
    scale[scale == 0] = 1
    norms = np.linalg.norm(dictionary.astype(np.float64), axis=1)
    decoded = np.asarray(code.dense(60), np.float64) @ dictionary.astype(np.float64)
    correlations = (signals - decoded) @ (dictionary / norms[:, None]).T / scale[:, None]
    used = np.asarray(code.dense(60)) != 0
    # Least squares in float32 leaves a share of the condition number in rounding: coherent atoms have one of a hundred.
    assert np.abs(correlations[used]).max() < (3e-5 if kind == "coherent" else 5e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_residual_never_grows(kind, nonnegative):
    check_never_grows(
        functools.partial(orthogonal_matching_pursuit, nonnegative=nonnegative), *hard_problem(kind, seed=2)
    )


@pytest.mark.parametrize(("scale", "norm"), [(1e-25, 1e-20), (1.0, 1e-20), (1.0, 1e20), (1e25, 1e20)])
def test_the_violation_of_a_code_does_not_depend_on_scales(scale, norm):
    signals, dictionary = problem(3)
    arrays = jnp.asarray(signals * np.float32(scale)), jnp.asarray(dictionary * np.float32(norm))
    crude = matching_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 5)
    expected = kkt_violation(crude, jnp.asarray(signals), jnp.asarray(dictionary))
    assert (expected > 1e-3).all(), "the codes must be far from their optimum"
    found = kkt_violation(matching_pursuit(*arrays, 5), *arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert (kkt_violation(nonnegative_omp(*arrays, 5), *arrays) < 1e-5).all()


def test_an_exact_fit_stops():
    dictionary = np.eye(8, dtype=np.float32)
    signals = np.stack([2 * dictionary[3], -dictionary[2], np.zeros(8, np.float32)])
    code = nonnegative_omp(jnp.asarray(signals), jnp.asarray(dictionary), 4)
    np.testing.assert_array_equal(code.l0_reached, [1, 0, 0])
    both = signed(signals, dictionary, 4)
    np.testing.assert_array_equal(both.l0_reached, [1, 1, 0])
    np.testing.assert_allclose(both.residual_norm, 0, atol=1e-6)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_gradients_are_those_of_least_squares_on_the_support(nonnegative):
    signals, dictionary = problem(6, batch=3)
    weighting = np.random.default_rng(0).normal(size=signals.shape)

    def objective(signals, dictionary):
        code = orthogonal_matching_pursuit(signals, dictionary, 5, nonnegative=nonnegative)
        return jnp.sum(weighting.astype(np.float32) * code.decode(dictionary)) + jnp.sum(code.residual_norm)

    arguments = (jnp.asarray(signals), jnp.asarray(dictionary))
    gradients = jax.grad(objective, argnums=(0, 1))(*arguments)
    code = orthogonal_matching_pursuit(*arguments, 5, nonnegative=nonnegative)

    def on_support(signals, dictionary):
        total = 0.0
        for signal, indices, weights, weight in zip(
            signals, np.asarray(code.indices), np.asarray(code.weights), weighting, strict=True
        ):
            atoms = dictionary[indices[weights != 0]]
            output = np.linalg.lstsq(atoms.T, signal, rcond=None)[0] @ atoms
            total += np.sum(weight * output) + np.linalg.norm(signal - output)
        return total

    check_gradients(gradients, arguments, on_support)

"""Gradient pursuit against the post's pseudocode in NumPy, scikit-learn, SciPy and finite differences."""

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

from interp_jax.pursuit import gradient_pursuit, greedy, kkt_violation, orthogonal_matching_pursuit

pytestmark = pytest.mark.caches  # a pursuit is compiled once for each size, not for each call


def dense_pursuit(signals, dictionary, l0, nonnegative=True):
    """The pseudocode with dense weights, in float64."""
    signals, dictionary = signals.astype(np.float64), dictionary.astype(np.float64)
    weights = np.zeros((len(signals), len(dictionary)))
    for _ in range(l0):
        residual = signals - weights @ dictionary
        products = residual @ dictionary.T
        selected = weights != 0
        selected[np.arange(len(signals)), (products if nonnegative else np.abs(products)).argmax(1)] = True
        gradient = selected * products
        direction = gradient @ dictionary
        size = (direction * residual).sum(1) / (direction**2).sum(1)
        weights = weights + size[:, None] * gradient
        if nonnegative:
            weights = np.maximum(weights, 0)
    return weights


@pytest.mark.parametrize("nonnegative", [True, False])
def test_equals_the_dense_pseudocode(nonnegative):
    signals, dictionary = problem(0, batch=32)
    code = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 8, nonnegative=nonnegative)
    expected = dense_pursuit(signals, dictionary, 8, nonnegative)
    np.testing.assert_allclose(code.dense(60), expected, atol=2e-5)
    np.testing.assert_array_equal(code.l0_reached, (expected != 0).sum(1))
    np.testing.assert_allclose(code.decode(jnp.asarray(dictionary)), expected @ dictionary, atol=2e-5)
    residual = np.linalg.norm(signals - expected @ dictionary, axis=1)
    np.testing.assert_allclose(code.residual_norm, residual, atol=2e-5)


def test_finds_the_atoms_and_nearly_the_error_of_orthogonal_matching_pursuit():
    signals, dictionary = problem(1, batch=24, d_in=64, d_sae=128, noise=0.01)
    code = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 4)
    expected = orthogonal_mp(dictionary.T.astype(np.float64), signals.T.astype(np.float64), n_nonzero_coefs=4).T
    same = [
        set(found) == set(np.flatnonzero(row)) for found, row in zip(np.asarray(code.indices), expected, strict=True)
    ]
    assert np.mean(same) > 0.8
    ours = np.sum(np.square(code.residual_norm)[same])
    theirs = np.sum(np.square(signals - expected @ dictionary)[same])
    assert theirs * 0.999 <= ours
    # The steps are not least squares, and stop after four: they come within a few percent of the signal.
    assert ours - theirs < 0.03 * np.sum(np.square(signals)[same])


def test_more_steps_than_atoms_come_to_nonnegative_least_squares_on_the_support():
    """With more steps allowed than atoms exist in the signal, refinement goes on to the optimum of the chosen atoms."""
    signals, dictionary = problem(2, batch=8, d_in=40, d_sae=12, active=3, noise=0.1)
    code = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 12)
    for signal, indices, weights, residual in zip(
        signals, *map(np.asarray, (code.indices, code.weights, code.residual_norm)), strict=True
    ):
        support = indices[weights > 0]
        _, best = scipy.optimize.nnls(dictionary[support].T.astype(np.float64), signal.astype(np.float64))
        assert best - 1e-5 <= residual <= best * 1.05 + 1e-5


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    nonnegative=st.booleans(),
)
def test_what_holds_on_every_problem(seed, kind, nonnegative):
    signals, dictionary = hard_problem(kind, seed)
    code = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 7, nonnegative=nonnegative)
    check_invariants(code, signals, dictionary, nonnegative=nonnegative)
    if not nonnegative:
        # Nothing is clipped, and a step is an exact line search.
        check_never_grows(functools.partial(gradient_pursuit, nonnegative=False), signals, dictionary)


def test_rescaling_atoms_rescales_weights_and_nothing_else():
    signals, dictionary = problem(3)
    scales = np.exp(np.random.default_rng(0).normal(size=60)).astype(np.float32)
    plain = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 5)
    scaled = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary * scales[:, None]), 5)
    np.testing.assert_array_equal(plain.indices, scaled.indices)
    used = np.asarray(plain.indices) >= 0
    np.testing.assert_allclose((scaled.weights * scales[scaled.indices])[used], plain.weights[used], rtol=1e-4)


def test_zero_signals_zero_atoms_exact_fits_and_negative_signals():
    dictionary = jnp.concatenate([jnp.zeros((1, 8)), jnp.eye(8)])
    signals = jnp.stack([jnp.zeros(8), 2.0 * jnp.eye(8)[3], -jnp.eye(8)[2]])
    code = gradient_pursuit(signals, dictionary, 4)
    np.testing.assert_array_equal(code.l0_reached, [0, 1, 0])
    np.testing.assert_array_equal(code.dense(9), np.zeros((3, 9)) + 2.0 * (np.arange(27).reshape(3, 9) == 13))
    np.testing.assert_allclose(code.residual_norm, [0, 0, 1], atol=1e-6)
    signed = gradient_pursuit(signals, dictionary, 4, nonnegative=False)
    np.testing.assert_allclose(signed.dense(9)[2], -1.0 * (np.arange(9) == 3), atol=1e-6)


def test_the_tolerance_stops_a_signal():
    signals, dictionary = problem(4)
    loose = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 12, tolerance=0.5)
    full = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 12)
    assert (loose.residual_norm <= 0.5 * np.linalg.norm(signals, axis=1)).all()
    assert (loose.l0_reached < full.l0_reached).all()


@pytest.mark.slow
def test_batch_shape_and_chunks_do_not_matter(monkeypatch):
    signals, dictionary = problem(5, batch=10)
    whole = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 5)
    monkeypatch.setattr(greedy, "_CHUNK_NUMBERS", {})
    monkeypatch.setattr(greedy, "_CHUNK_NUMBERS_ELSEWHERE", 0)
    monkeypatch.setattr(greedy, "_SMALLEST_CHUNK", 4)
    jax.clear_caches()
    chunked = gradient_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 5)
    shaped = gradient_pursuit(jnp.asarray(signals).reshape(2, 5, -1), jnp.asarray(dictionary), 5)
    single = gradient_pursuit(jnp.asarray(signals[0]), jnp.asarray(dictionary), 5)
    jax.clear_caches()
    np.testing.assert_array_equal(whole.indices, chunked.indices)
    np.testing.assert_allclose(whole.weights, chunked.weights, atol=1e-6)
    np.testing.assert_allclose(whole.weights.reshape(2, 5, 5), shaped.weights, atol=1e-6)
    np.testing.assert_allclose(whole.weights[0], single.weights, atol=1e-6)
    assert single.indices.shape == (5,)
    assert single.l0_reached.shape == ()
    mapped = jax.vmap(lambda signal: gradient_pursuit(signal, jnp.asarray(dictionary), 5).dense(60))(
        jnp.asarray(signals)
    )
    np.testing.assert_allclose(mapped, whole.dense(60), atol=1e-6)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_gradients_are_those_of_finite_differences(nonnegative):
    signals, dictionary = problem(6, batch=3)
    weighting = np.random.default_rng(0).normal(size=signals.shape)

    def objective(signals, dictionary):
        code = gradient_pursuit(signals, dictionary, 5, nonnegative=nonnegative)
        return jnp.sum(weighting.astype(np.float32) * code.decode(dictionary)) + jnp.sum(code.residual_norm)

    arguments = (jnp.asarray(signals), jnp.asarray(dictionary))
    gradients = jax.grad(objective, argnums=(0, 1))(*arguments)

    def dense_objective(signals, dictionary):
        # Unit norm inside: the pursuit does not depend on the norms of the atoms.
        unit = dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True)
        output = dense_pursuit(signals, unit, 5, nonnegative) @ unit
        return np.sum(weighting * output) + np.sum(np.linalg.norm(signals - output, axis=1))

    check_gradients(gradients, arguments, dense_objective)


def test_the_gradient_at_zero_directions_is_finite():
    dictionary = jnp.concatenate([jnp.zeros((1, 8)), jnp.eye(8)])
    signals = jnp.stack([jnp.zeros(8), 2.0 * jnp.eye(8)[3], -jnp.eye(8)[2]])

    def objective(signals, dictionary):
        code = gradient_pursuit(signals, dictionary, 4)
        return jnp.sum(code.weights**2) + jnp.sum(code.residual_norm)

    for gradient in jax.grad(objective, argnums=(0, 1))(signals, dictionary):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("pursuit", [gradient_pursuit, orthogonal_matching_pursuit])
@pytest.mark.parametrize("fill", [jnp.nan, 0.0])
def test_a_nan_is_told_in_batches_of_any_size(pursuit, fill):
    """Of 1,500 rows XLA for CPU takes several maxima at once, and leaves NaN out of them."""
    dictionary = jax.random.normal(jax.random.key(0), (32, 16))
    signals = jax.random.normal(jax.random.key(1), (1500, 16)).at[8].set(fill).at[8, 1].set(jnp.nan)
    code = pursuit(signals, dictionary, 2)
    np.testing.assert_array_equal(jnp.isnan(code.residual_norm), np.arange(1500) == 8)
    np.testing.assert_array_equal(jnp.isnan(kkt_violation(code, signals, dictionary)), np.arange(1500) == 8)


@pytest.mark.usefixtures("without_type_checks")
def test_a_count_beyond_the_range_of_int32_is_as_many_as_there_may_be():
    counts = jnp.asarray(np.array([1, 2**32 - 1, 4], np.uint32))
    code = gradient_pursuit(jnp.ones((3, 8)), jnp.eye(8), counts, max_l0=4)
    np.testing.assert_array_equal(code.l0_reached, [1, 4, 4])
    np.testing.assert_array_equal(gradient_pursuit(jnp.ones((1, 8)), jnp.eye(8), 2**40, max_l0=5).l0_reached, [5])


def test_a_signal_with_nan_spoils_only_its_own_code():
    signals, dictionary = map(jnp.asarray, problem(8))
    clean = gradient_pursuit(signals, dictionary, 4)
    code = gradient_pursuit(signals.at[2, 0].set(jnp.nan), dictionary, 4)
    assert jnp.isnan(code.residual_norm[2])
    assert code.l0_reached[2] == 0
    others = jnp.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(code.weights[others], clean.weights[others], rtol=1e-5)
    inside_jit = jax.jit(lambda dictionary: gradient_pursuit(signals, dictionary, 4))(dictionary.at[7, 3].set(jnp.nan))
    assert jnp.isnan(inside_jit.residual_norm).all()
    assert (inside_jit.weights == 0).all()

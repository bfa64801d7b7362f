"""Signals and dictionaries that the tests of all pursuits share."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest


def problem(seed, batch=6, d_in=24, d_sae=60, active=4, noise=0.05):
    """Sparse non-negative combinations of random unit atoms, and noise."""
    random = np.random.default_rng(seed)
    dictionary = random.normal(size=(d_sae, d_in))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.zeros((batch, d_sae))
    for row in codes:
        row[random.choice(d_sae, active, replace=False)] = random.exponential(size=active) + 0.3
    signals = codes @ dictionary + noise * random.normal(size=(batch, d_in))
    return signals.astype(np.float32), dictionary.astype(np.float32)


KINDS = ["random", "coherent", "duplicated", "zero signals", "exact fit", "tiny", "huge", "mixed norms"]


def hard_problem(kind, seed):
    """A problem of a kind that is hard in its own way."""
    signals, dictionary = problem(seed, noise=0 if kind == "exact fit" else 0.05)
    if kind == "coherent":
        # Of mean cosine 0.9: a direction that all share, and a part of each atom's own.
        dictionary = np.sqrt(np.float32(0.1)) * dictionary + np.sqrt(np.float32(0.9)) * dictionary[:1]
    elif kind == "duplicated":
        dictionary[30:] = dictionary[:30]
    elif kind == "zero signals":
        signals[::2] = 0
    elif kind in ("tiny", "huge"):
        signals = signals * np.float32(1e-25 if kind == "tiny" else 1e25)
    elif kind == "mixed norms":
        dictionary = dictionary * np.logspace(-6, 6, 60, dtype=np.float32)[:, None]
    return signals, dictionary


def check_invariants(code, signals, dictionary, *, nonnegative):
    """What holds of every code of every pursuit on every problem."""
    weights, indices = np.asarray(code.weights), np.asarray(code.indices)
    assert np.isfinite(weights).all()
    if nonnegative:
        assert (weights >= 0).all()
    for row, found in zip(weights, indices, strict=True):
        used = found[row != 0]
        assert len(set(used)) == len(used), "an atom stands in two slots"
        assert (found[row == 0] == -1).all()
    assert (np.asarray(code.l0_reached) == (weights != 0).sum(1)).all()
    norms = np.linalg.norm(signals.astype(np.float64), axis=1)
    assert (code.residual_norm <= norms * (1 + 1e-5)).all()
    decoded = np.asarray(code.dense(len(dictionary)), np.float64) @ dictionary.astype(np.float64)
    residual = np.linalg.norm(signals.astype(np.float64) - decoded, axis=1)
    np.testing.assert_allclose(code.residual_norm, residual, atol=2e-5 * norms.max())


def check_never_grows(pursuit, signals, dictionary):
    """The residual of no signal grows with a further step, to within the rounding of the residual itself."""
    norms = np.linalg.norm(signals.astype(np.float64), axis=1)
    arrays = jnp.asarray(signals), jnp.asarray(dictionary)
    by_steps = [norms, *(np.asarray(pursuit(*arrays, n).residual_norm, np.float64) for n in (1, 2, 3, 7))]
    for before, after in itertools.pairwise(by_steps):
        assert (after <= before + 1e-6 * norms).all()


def check_gradients(gradients, arguments, slow_objective):
    """Derivatives along a random direction of each argument, against central differences of a function in float64.

    A finite difference of float32 numbers would be mostly rounding.
    """
    random = np.random.default_rng(1)
    for position in (0, 1):
        direction = random.normal(size=arguments[position].shape)
        moved = [[np.asarray(value, np.float64) for value in arguments] for _ in range(2)]
        moved[0][position] += 1e-6 * direction
        moved[1][position] -= 1e-6 * direction
        expected = (slow_objective(*moved[0]) - slow_objective(*moved[1])) / 2e-6
        assert np.sum(gradients[position] * direction) == pytest.approx(expected, rel=2e-3, abs=2e-3)

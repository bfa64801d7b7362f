"""The toy model of superposition (TMS): what is in the activations is known, and trained SAEs must find it."""

import jax
import numpy as np
import pytest

from interp_jax.sae import TrainConfig, dictionary_structure, evaluate, max_cosines, mean_max_cosine, train
from interp_jax.sae.superposition import random_directions, superposed

pytestmark = pytest.mark.caches  # a compiled step that is traced anew for every batch would take minutes

D_IN, N_FEATURES, N_ACTIVE = 40, 96, 3
# Of a key that no training run starts from: a dictionary that starts at the truth would find it at once.
DIRECTIONS = random_directions(jax.random.key(12345), N_FEATURES, D_IN)


@jax.jit
def toy(step):
    return superposed(jax.random.key(step), DIRECTIONS, 256, N_ACTIVE) * 7.0 + 0.5


def trained(**options):
    config = TrainConfig(D_IN, N_FEATURES, dead_after=10_000, **{"learning_rate": 3e-3, **options})
    sae, _ = train(config, toy)
    return sae, evaluate(sae, [toy(100_000 + number) for number in range(8)])


def test_rows_are_sums_of_few_directions():
    x = np.asarray(superposed(jax.random.key(0), DIRECTIONS, 500, 1))
    strengths = np.linalg.norm(x, axis=1)
    cosines = (x / strengths[:, None]) @ np.asarray(DIRECTIONS).T
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-5)
    assert strengths.mean() == pytest.approx(1, abs=0.15)
    several = np.asarray(superposed(jax.random.key(0), DIRECTIONS, 20_000, N_ACTIVE))
    mean = N_ACTIVE * np.asarray(DIRECTIONS).mean(axis=0)
    np.testing.assert_allclose(several.mean(axis=0), mean, atol=0.03)


@pytest.mark.slow
def test_a_relu_sae_of_the_right_width_recovers_the_dictionary_and_shrinks():
    sae, found = trained(architecture="relu", n_steps=3000)
    assert mean_max_cosine(DIRECTIONS, sae.W_dec[...]) > 0.95
    # Both ways: at the right width no latent is left for anything else.
    assert mean_max_cosine(sae.W_dec[...], DIRECTIONS) > 0.95
    # One in ten directions shares a latent with another, here and at any other seed; the rest are found exactly.
    assert np.median(max_cosines(DIRECTIONS, sae.W_dec[...])) > 0.99
    assert found.l0 < N_ACTIVE
    assert found.relative_reconstruction_bias < 0.85, "L1 shrinks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "batch_topk", "k": 3, "learning_rate": 1e-2},
        {"architecture": "gated"},
        {"architecture": "jumprelu", "l0_coefficient": 2.0},
    ],
    ids=lambda options: options["architecture"],
)
def test_the_others_recover_it_without_shrinking(options):
    sae, found = trained(n_steps=3000, **options)
    assert mean_max_cosine(DIRECTIONS, sae.W_dec[...]) > 0.95
    assert found.l0 < N_ACTIVE + 0.2
    assert found.relative_reconstruction_bias == pytest.approx(1, abs=0.03)
    assert dictionary_structure(sae).fve_top_1 < 0.1

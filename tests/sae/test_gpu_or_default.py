"""What a GPU computes in another way is what the others compute: its ways are taken here, on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import TrainConfig
from interp_jax.sae.counts_up_to import by_counting, by_searching
from interp_jax.sae.step import initial_state, step
from interp_jax.sae.superposition import random_directions, superposed

BATCH = superposed(jax.random.key(1), random_directions(jax.random.key(0), 64, 24), 96, 4)


def as_on_a_gpu(*args, default, **by_platform):
    return by_platform.get("cuda", default)(*args)


def trained(config):
    jax.clear_caches()
    state = jax.jit(functools.partial(initial_state, config))(BATCH)
    run = jax.jit(functools.partial(step, config))
    for _ in range(4):
        state, metrics = run(state, BATCH, 5)
    return state.sae, metrics


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])  # the others are dense there
def test_training_on_a_gpu_s_ways_gives_the_same_dictionary(architecture, monkeypatch):
    config = TrainConfig(24, 256, architecture, k=3)
    expected = trained(config)
    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_a_gpu)
    found = trained(config)
    jax.clear_caches()
    # Adam's steps of 1e-3 are as long for gradients that are next to nothing, of which rounding is a hundredth.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("counted", [by_counting, by_searching])
def test_counts_are_those_of_numpy(counted):
    values = np.sort(np.random.default_rng(0).integers(0, 50, 200)).astype(np.int32)
    for size in (1, 30, 80):
        expected = np.searchsorted(values, np.arange(size), side="right")
        np.testing.assert_array_equal(counted(jnp.asarray(values), size), expected)

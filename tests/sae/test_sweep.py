"""Sweeps: every run is what it would be alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import TrainConfig, sweep, train
from interp_jax.sae.superposition import random_directions, superposed

pytestmark = pytest.mark.caches

DIRECTIONS = random_directions(jax.random.key(1), 60, 24)
BASE = TrainConfig(
    24, 48, "relu", n_steps=12, log_every=4, checkpoint_every=4, dead_after=300, sparsity_warmup_share=0.3
)
CONFIGS = [
    dataclasses.replace(BASE, l1_coefficient=0.5),
    dataclasses.replace(BASE, l1_coefficient=4.0, seed=3),
    dataclasses.replace(BASE, learning_rate=5e-3),
]


@jax.jit
def toy(number):
    return superposed(jax.random.key(number), DIRECTIONS, 64, 3) * 5.0


@pytest.mark.parametrize("how", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_each_run_is_what_it_is_alone(how):
    runs = sweep(CONFIGS, toy, how=how)
    assert [run.config for run in runs] == CONFIGS
    for run in runs:
        alone, history = train(run.config, toy)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            np.testing.assert_allclose(run.sae.parameter(name), alone.parameter(name), atol=2e-5, err_msg=name)
        assert [line["step"] for line in run.history] == [4, 8, 12]
        for ours, theirs in zip(run.history, history, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert runs[1].history[-1]["penalty"] > 4 * runs[0].history[-1]["penalty"]


@pytest.mark.slow
def test_a_resumed_sweep_ends_with_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def stop(number, metrics):
        assert len(metrics) == 3
        if number == 7:
            raise Stop

    whole = sweep(CONFIGS, toy)
    with pytest.raises(Stop):
        sweep(CONFIGS, toy, checkpoint_dir=tmp_path, on_step=stop)
    resumed = sweep(CONFIGS, toy, checkpoint_dir=tmp_path, resume=True)
    for ours, theirs in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(ours.sae.W_dec[...], theirs.sae.W_dec[...])
        assert ours.history == theirs.history
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["run"]) for line in lines] == [(at, run) for at in (4, 8, 12) for run in range(3)]
    with pytest.raises(ValueError, match="seed was 3, is 0 in run 1"):
        sweep([BASE, BASE, CONFIGS[2]], toy, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds arrays"):
        sweep(CONFIGS[:2], toy, checkpoint_dir=tmp_path, resume=True)


def test_a_run_that_diverges_does_not_stop_the_others():
    runs = sweep([BASE, dataclasses.replace(BASE, learning_rate=1e30)], toy)
    assert np.isfinite(runs[0].history[-1]["loss"])
    assert not np.isfinite(runs[1].history[-1]["loss"])
    assert bool(jnp.isfinite(runs[0].sae.W_dec[...]).all())


def test_configurations_that_need_programs_of_their_own_are_refused():
    with pytest.raises(ValueError, match="differ in bandwidth, d_sae; they may differ in learning_rate"):
        base = TrainConfig(24, 48, "jumprelu")
        sweep([base, dataclasses.replace(base, d_sae=64, bandwidth=0.2)], toy)
    with pytest.raises(ValueError, match="at least one configuration"):
        sweep([], toy)

"""Training: what it finds, what it keeps to, and that an interruption at any moment changes nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from interp_jax.sae import NonFiniteLossError, TrainConfig, evaluate, mean_max_cosine, train
from interp_jax.sae.superposition import random_directions, superposed

pytestmark = pytest.mark.caches  # a compiled step that is traced anew for every batch would take minutes

DIRECTIONS = random_directions(jax.random.key(1), 96, 40)


@jax.jit
def toy(step):
    return superposed(jax.random.key(step), DIRECTIONS, 256, 3) * 7.0 + 0.5


def config_of(**changes):
    defaults = {
        "d_in": 40,
        "d_sae": 64,
        "k": 4,
        "n_steps": 12,
        "log_every": 2,
        "checkpoint_every": 4,
        "dead_after": 512,
    }
    return TrainConfig(**{**defaults, **changes})


def arrays_of(sae):
    return {name: np.asarray(getattr(sae, name)[...]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def assert_same(ours, theirs):
    for name, array in arrays_of(theirs).items():
        np.testing.assert_array_equal(arrays_of(ours)[name], array, err_msg=name)


@pytest.mark.slow
def test_a_trained_sae_finds_the_directions_in_superposition():
    config = TrainConfig(40, 192, k=3, n_steps=1200, learning_rate=3e-3, dead_after=10_000, k_aux=32)
    sae, history = train(config, toy)
    assert mean_max_cosine(DIRECTIONS, sae.W_dec[...]) > 0.95
    found = evaluate(sae, [toy(10_000 + number) for number in range(4)])
    assert found.l0 <= 3
    assert found.fvu < 0.1
    np.testing.assert_allclose(jnp.linalg.norm(sae.W_dec[...], axis=1), 1, rtol=1e-5)
    # The scale of the inputs was folded away: what was logged in training holds for activations as they come.
    assert found.fvu == pytest.approx(history[-1]["fvu"], rel=0.25)


@pytest.mark.slow
def test_rows_of_huge_norm_do_not_take_over():
    def with_outliers(step):
        return toy(step).at[7].set(2000.0 * jnp.where(jnp.arange(40) == 3, 1.0, 0.02))

    held_out = [toy(10_000 + number) for number in range(4)]
    fvu = {}
    for cap in (3.0, float("inf")):
        config = TrainConfig(40, 96, k=4, n_steps=300, learning_rate=3e-3, norm_cap=cap)
        fvu[cap] = evaluate(train(config, with_outliers)[0], held_out).fvu
    clean = evaluate(train(TrainConfig(40, 96, k=4, n_steps=300, learning_rate=3e-3), toy)[0], held_out).fvu
    assert fvu[3.0] < 1.3 * clean
    assert fvu[float("inf")] > 1.4 * clean


def test_adam_without_its_first_moment_is_adam_with_beta1_zero():
    gradients = jax.random.normal(jax.random.key(0), (5, 7))
    lean = optax.scale_by_rms(0.999, eps=6.25e-10, initial_scale=0, eps_in_sqrt=False, bias_correction=True)
    full = optax.scale_by_adam(0.0, 0.999, eps=6.25e-10)
    lean_state, full_state = lean.init(gradients[0]), full.init(gradients[0])
    for gradient in gradients:
        ours, lean_state = lean.update(gradient, lean_state)
        theirs, full_state = full.update(gradient, full_state)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_an_iterable_and_a_function_of_the_step_train_alike(tmp_path):
    config = config_of()
    by_function, history = train(config, toy, checkpoint_dir=tmp_path)
    by_iterable, _ = train(config, [np.asarray(toy(step)) for step in range(12)])
    assert_same(by_function, by_iterable)
    assert [line["step"] for line in history] == [2, 4, 6, 8, 10, 12]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history


def test_on_step_sees_every_step_with_its_metrics():
    seen = []
    train(config_of(n_steps=5), toy, on_step=lambda step, metrics: seen.append((step, metrics["fvu"])))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(fvu) for _, fvu in seen)


class Stop(Exception):
    pass


def stop_at(step):
    def on_step(done, metrics):
        if done == step:
            raise Stop

    return on_step


@pytest.mark.parametrize("beta1", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, beta1):
    config = config_of(beta1=beta1)
    whole, history = train(config, toy)
    with pytest.raises(Stop):
        train(config, toy, checkpoint_dir=tmp_path, on_step=stop_at(7))
    asked = []

    def batches(step):
        asked.append(step)
        return toy(step)

    resumed, resumed_history = train(config, batches, checkpoint_dir=tmp_path, resume=True)
    assert_same(resumed, whole)
    assert resumed_history == history
    assert asked == list(range(4, 12))
    again, _ = train(config, toy, checkpoint_dir=tmp_path, resume=True)
    assert_same(again, whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    config = config_of()
    whole, _ = train(config, toy, checkpoint_dir=tmp_path)
    newest = max(tmp_path.glob("step_*"))
    assert newest.name == "step_00000012"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=r"step_00000012 is not whole .* differs"):
        resumed, _ = train(config, toy, checkpoint_dir=tmp_path, resume=True)
    assert_same(resumed, whole)
    newest = max(tmp_path.glob("step_*"))
    (newest / "whole.json").unlink()  # as a killed writer leaves it
    with pytest.warns(UserWarning, match="writing it was interrupted"):
        resumed, _ = train(config, toy, checkpoint_dir=tmp_path, resume=True)
    assert_same(resumed, whole)


def test_a_new_run_in_an_old_folder_is_not_taken_for_the_old_one(tmp_path):
    train(config_of(), toy, checkpoint_dir=tmp_path)
    again = config_of(seed=5)
    with pytest.raises(Stop):
        train(again, toy, checkpoint_dir=tmp_path, on_step=stop_at(7))
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000004"]
    resumed, _ = train(again, toy, checkpoint_dir=tmp_path, resume=True)
    assert_same(resumed, train(again, toy)[0])


def test_a_nan_stops_the_run_at_its_step(tmp_path):
    def batches(step):
        return toy(step).at[3, 5].set(jnp.nan) if step == 6 else toy(step)

    with pytest.raises(
        NonFiniteLossError, match=r"step 7 .*checkpoint, of step 4, is .*step_00000004. Likely causes: NaN"
    ):
        train(config_of(), batches, checkpoint_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000004"]
    resumed, _ = train(config_of(), toy, checkpoint_dir=tmp_path, resume=True)
    assert_same(resumed, train(config_of(), toy)[0])


def test_bad_inputs_are_refused_before_long_work(tmp_path):
    with pytest.raises(ValueError, match="k is 65; expected 1 to d_sae = 64"):
        config_of(k=65)
    with pytest.raises(ValueError, match="beta2 is"):
        config_of(beta2=1.5)
    with pytest.raises(ValueError, match=r"batch of step 0 has shape \(256, 40\); expected \[batch, 41\]"):
        train(config_of(d_in=41), toy)
    with pytest.raises(ValueError, match="batches ended after 0 steps"):
        train(config_of(), [])
    with pytest.raises(ValueError, match="resume needs the checkpoint_dir"):
        train(config_of(), toy, resume=True)
    train(config_of(), toy, checkpoint_dir=tmp_path)
    other = dataclasses.replace(config_of(), learning_rate=0.5, seed=3, keep=1)
    with pytest.raises(ValueError, match=r"learning_rate was .*, is 0.5; seed was 0, is 3\)"):
        train(other, toy, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"holds arrays"):
        train(config_of(d_sae=128), toy, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.slow
def test_several_steps_a_dispatch_are_the_same_steps(tmp_path):
    config = config_of(n_steps=13, log_every=3, checkpoint_every=5)
    whole, history = train(config, toy)
    seen = []
    together = dataclasses.replace(config, steps_per_dispatch=4)  # 4 and 1, 4 and 1, 3
    with pytest.raises(Stop):
        train(together, toy, checkpoint_dir=tmp_path, on_step=stop_at(8))
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000005"]
    sae, same_history = train(
        together, toy, checkpoint_dir=tmp_path, resume=True, on_step=lambda step, metrics: seen.append(step)
    )
    assert_same(sae, whole)
    assert same_history == history
    assert seen == list(range(6, 14))
    with pytest.raises(NonFiniteLossError, match="step 3 "):
        train(together, lambda step: toy(step) * (jnp.nan if step == 2 else 1))

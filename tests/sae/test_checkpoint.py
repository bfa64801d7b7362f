"""Checkpoints: written beside the training, whole or not at all, and what goes wrong in writing is told."""

import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import TrainConfig, train
from interp_jax.sae.checkpoint import CheckpointWriter, restore_latest
from interp_jax.sae.nested_state import NestedState
from interp_jax.sae.run_lock import only_one_training

pytestmark = pytest.mark.caches

LIKE = {"a": jax.ShapeDtypeStruct((300, 200), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.int32)}


def state_of(value):
    return {"a": jnp.full((300, 200), value, jnp.float32), "b": jnp.int32(value)}


def steps_in(directory):
    return sorted(int(path.name.removeprefix("step_")) for path in directory.glob("step_*"))


@pytest.mark.filterwarnings("error")
def test_memory_may_be_written_over_once_a_save_returns(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = state_of(0)
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for step in range(1, 6):
            state = update(state)
            writer.save(step, state, {"at": step}, data=NestedState.of({"at": [step]}))
            state = update(state)
    for step in range(5, 0, -1):
        restored = restore_latest(tmp_path, LIKE)
        assert restored is not None
        assert (restored.step, restored.facts, restored.data()) == (step, {"at": step}, {"at": [step]})
        np.testing.assert_array_equal(restored.state["a"], 2 * step - 1)
        shutil.rmtree(tmp_path / f"step_{step:08d}")
    assert restore_latest(tmp_path, LIKE) is None


def test_what_was_not_finished_is_not_kept_in_the_place_of_a_whole_one(tmp_path):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (3, 6, 9):
            writer.save(step, state_of(step), {})
    assert steps_in(tmp_path) == [6, 9]
    (tmp_path / "step_00000009" / "whole.json").unlink()
    with pytest.warns(UserWarning, match=r"step_00000009 is not whole .*interrupted"):
        restored = restore_latest(tmp_path, LIKE)
    assert restored is not None
    assert restored.step == 6
    with CheckpointWriter(tmp_path, keep=1) as writer:  # with checkpoints at other steps than before
        writer.save(7, state_of(7), {})
    assert steps_in(tmp_path) == [7]


@pytest.mark.parametrize("file", ["data_0.safetensors", "whole.json", None])
def test_a_checkpoint_that_is_altered_or_cut_short_is_passed_over(tmp_path, file):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(1, state_of(1), {}, data=NestedState.of({"one": 1}))
        writer.save(2, state_of(2), {}, data=NestedState.of({"two": 2}))
    folder = tmp_path / "step_00000002"
    of_state = [path for path in (folder / "state").rglob("*") if path.is_file()]
    path = max(of_state, key=lambda path: path.stat().st_size) if file is None else folder / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step_00000002 is not whole"):
        restored = restore_latest(tmp_path, LIKE)
    assert restored is not None
    assert (restored.step, restored.data()) == (1, {"one": 1})


def test_what_fails_in_writing_is_raised_and_the_one_before_it_named(tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(1, state_of(1), {})
        writer.wait()

        def fail(*_):
            raise RuntimeError("the disk took fire\nand more")

        monkeypatch.setattr(sys.modules["interp_jax.sae.checkpoint"], "write_whole", fail)
        writer.save(2, state_of(2), {})
        message = (
            r"step_00000002 could not be written: it takes up to 240\.0 kB, and .* free. The newest whole .*0001\. "
        )
        with pytest.raises(OSError, match=message + r".*RuntimeError: the disk took fire\)$"):
            writer.wait()
        writer.wait()  # told once
    assert steps_in(tmp_path) == [1]


def test_a_disk_without_room_is_told_before_any_long_work(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10_000, 10_000))
    with pytest.raises(OSError, match=r"a checkpoint of this run takes up to [0-9.]+ kB, and 10\.0 kB are free"):
        train(TrainConfig(40, 64, k=4), lambda step: pytest.fail("a batch was asked for"), checkpoint_dir=tmp_path)


def test_a_second_run_into_one_folder_is_refused(tmp_path):
    config = TrainConfig(8, 16, k=4, n_steps=2)
    message = rf"process {os.getpid()} is training into .*another folder"
    with only_one_training(tmp_path), pytest.raises(RuntimeError, match=message):
        train(config, lambda step: pytest.fail("a batch was asked for"), checkpoint_dir=tmp_path)
    with only_one_training(tmp_path):
        pass  # the first one's end lets it go


# The system itself refuses to write more than so many bytes to a file, from a step on.
CHILD = """
    import pathlib, resource, sys, time
    from tests.sae.test_checkpoint import FULL, batches_of
    from interp_jax.sae import train

    def on_step(step, metrics):
        if step == 6:
            while not (pathlib.Path(sys.argv[1]) / "step_00000004" / "whole.json").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))

    train(FULL, batches_of, checkpoint_dir=sys.argv[1], on_step=on_step)
"""
FULL = TrainConfig(40, 64, k=4, n_steps=20, log_every=1, checkpoint_every=4, dead_after=512)


def batches_of(step):
    return np.random.default_rng(step).normal(size=(64, 40)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "last_line", "message"),
    [
        # Arrays are larger than this, the metrics are not.
        (8192, 8, "step_00000008 could not be written: it takes up to "),
        # Neither fits: the metrics of the seventh step come first.
        (10, 6, "metrics.jsonl (File too large"),
    ],
)
def test_a_full_disk_stops_the_run_cleanly_and_what_was_written_stays(tmp_path, limit, last_line, message):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "run"), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("OSError")]
    assert message in error
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] >= last_line
    assert steps_in(tmp_path / "run") == [4]

    resumed, history = train(FULL, batches_of, checkpoint_dir=tmp_path / "run", resume=True)
    undisturbed, whole_history = train(FULL, batches_of)
    np.testing.assert_array_equal(resumed.W_dec[...], undisturbed.W_dec[...])
    assert history == whole_history

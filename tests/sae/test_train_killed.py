"""A training process that is killed, at any moments, and started again ends with the weights of one that was not."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from interp_jax.sae import TrainConfig, load_saelens, train

pytestmark = [pytest.mark.caches, pytest.mark.slow]

N_KILLS = 20
LARGEST_LEAP = 12
"""Steps that a process is let do before it is killed, at most."""
CONFIG = TrainConfig(40, 64, k=4, n_steps=N_KILLS * LARGEST_LEAP + 20, log_every=5, checkpoint_every=3, dead_after=512)

# A checkpoint is written every third step, which takes far longer than the steps: most kills interrupt one. Compiled
# programs are kept on the disk, so that a start takes three seconds.
CHILD = """
    import sys
    import jax
    jax.config.update("jax_compilation_cache_dir", sys.argv[3])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from tests.sae.test_train_killed import CONFIG, batches
    from interp_jax.sae import save_saelens, train

    def on_step(step, metrics):
        print(step, flush=True)

    sae, _ = train(CONFIG, batches, checkpoint_dir=sys.argv[1], resume=True, on_step=on_step)
    save_saelens(sae, sys.argv[2], model_name="toy", hook_name="x")
"""


def batches(step):
    return np.random.default_rng(step).normal(size=(64, 40)).astype(np.float32)


def unfinished(directory):
    """Checkpoints whose writing was interrupted."""
    return [path for path in directory.glob("step_*") if not (path / "whole.json").exists()]


def test_killed_at_twenty_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path):
    run, result, cache = (tmp_path / name for name in ("run", "result", "cache"))
    (tmp_path / "child.py").write_text(textwrap.dedent(CHILD))
    command = [sys.executable, *map(str, (tmp_path / "child.py", run, result, cache))]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    draw = random.Random(0)
    firsts, n_interrupted = [], 0
    for _ in range(N_KILLS):
        child = start()
        assert child.stdout is not None
        firsts.append(int(child.stdout.readline()))
        for _ in range(draw.randrange(LARGEST_LEAP)):
            child.stdout.readline()
        time.sleep(draw.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        n_interrupted += bool(unfinished(run))
    assert n_interrupted >= 3, "some were killed while they wrote a checkpoint"
    last = start()
    firsts.append(int(last.communicate()[0].split()[0]))
    assert last.returncode == 0
    assert firsts == sorted(firsts), "none started before the one that was killed"
    assert firsts[-1] > N_KILLS, "they went on from checkpoints"

    undisturbed, _ = train(CONFIG, batches)
    resumed = load_saelens(result)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_array_equal(resumed.parameter(name), undisturbed.parameter(name), err_msg=name)

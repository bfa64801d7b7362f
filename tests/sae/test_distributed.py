"""Several processes that train one autoencoder: the losses of one process, one history, checkpoints that all share."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

N_PROCESSES = 2
DEVICES_EACH = 2


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def environment():
    flags = f"--xla_force_host_platform_device_count={DEVICES_EACH}"
    root = str(pathlib.Path(__file__).parents[2])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}


def run_all(commands):
    """Runs several commands beside one another to their end."""
    running = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    found = [one.communicate(timeout=400) for one in running]
    assert [one.returncode for one in running] == [0] * len(running), "\n\n".join(errors for _, errors in found)


TRAINED = """
import functools, json, sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[1]}", int(sys.argv[2]), int(sys.argv[3]))
from interp_jax.sae import TrainConfig, sweep, train
from interp_jax.sae.mesh import mesh_over_devices, on_host, own_rows

class Rows:
    # An iterable that knows where it stands, over the rows of one process.
    def __init__(self, rows):
        self.rows, self.step = rows, 0
    def __iter__(self):
        while True:
            self.step += 1
            yield np.random.default_rng(self.step).normal(size=(64, 16)).astype(np.float32)[self.rows]
    def state_dict(self):
        return {"step": self.step, "rows": self.rows}
    def load_state_dict(self, state):
        assert (state["rows"] == self.rows).all()
        self.step = state["step"]

class Stop(Exception):
    pass

def stop(done, metrics):
    if done == 6:
        raise Stop

config = TrainConfig(16, 64, k=3, n_steps=10, warmup_steps=2, learning_rate=1e-2, dead_after=100, log_every=1,
                     checkpoint_every=4)
folder = sys.argv[4]
histories = []
shapes = [(4, 1), (2, 2), (1, 4)] if jax.process_count() > 1 else [None]
for number, shape in enumerate(shapes):
    mesh = None if shape is None else mesh_over_devices(*shape)
    rows = np.arange(64) if mesh is None else own_rows(mesh, 64)
    if mesh is not None:
        assert len(rows) == {4: 32, 2: 32, 1: 64}[shape[0]], rows
    more = {"mesh": mesh, "checkpoint_dir": f"{folder}/{number}"}
    try:
        train(config, Rows(rows), on_step=stop, **more)
    except Stop:
        pass
    batches = Rows(rows)
    sae, history = train(config, batches, resume=True, **more)
    assert batches.step == 10
    assert on_host(sae).W_dec[...].shape == (64, 16)
    histories.append(history)
with open(f"{folder}/{jax.process_index()}.json", "w") as file:
    json.dump(histories, file)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_go_on_from_their_checkpoint(tmp_path):
    def commands(n_processes, folder):
        port = str(free_port())
        return [
            [sys.executable, "-c", TRAINED, port, str(n_processes), str(process), str(tmp_path / folder)]
            for process in range(n_processes)
        ]

    run_all(commands(1, "alone"))
    run_all(commands(N_PROCESSES, "together"))
    (expected,) = json.loads((tmp_path / "alone" / "0.json").read_text())
    first, second = (json.loads((tmp_path / "together" / f"{process}.json").read_text()) for process in range(2))
    assert first == second
    for shape, history in enumerate(first):
        lines = (tmp_path / "together" / str(shape) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == history
        for ours, theirs in zip(history, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)

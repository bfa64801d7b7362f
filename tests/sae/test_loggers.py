"""Metrics in TensorBoard and Weights & Biases: every line once, also after an interruption."""

import importlib.util
import json
import os
import pathlib
import struct
import subprocess
import sys
import textwrap

import pytest

from interp_jax.sae.loggers import TensorBoardLogger, WandbLogger
from interp_jax.sae.metrics_log import MetricsLog


def lines(*steps, **more):
    return [{"step": step, **more, "loss": 1 / step, "l0": 2.0 * step} for step in steps]


def events(folder):
    """The scalars in a folder as TensorBoard reads them: files in order; a start voids what has its step or a later."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def test_tensorboard_shows_each_step_once_after_an_interruption(tmp_path):
    with TensorBoardLogger(tmp_path) as interrupted:
        for line in lines(2, 4, 6):
            interrupted(line)
    with TensorBoardLogger(tmp_path) as resumed:
        for line in lines(4, 6, 8):
            resumed(line)
    expected = {
        (step, name): line[name] for line in lines(2, 4, 6, 8) for step in [line["step"]] for name in ("loss", "l0")
    }
    assert events(tmp_path) == pytest.approx(expected, rel=1e-6)


def test_a_sweep_has_a_folder_a_run(tmp_path):
    with TensorBoardLogger(tmp_path) as logger:
        for line in (*lines(1, 2, run=0), *lines(1, run=1)):
            logger(line)
    assert set(events(tmp_path / "run_000")) == {(1, "loss"), (1, "l0"), (2, "loss"), (2, "l0")}
    assert set(events(tmp_path / "run_001")) == {(1, "loss"), (1, "l0")}


def test_loggers_are_told_the_lines_that_are_written(tmp_path):
    told = []
    log = MetricsLog(tmp_path, lines(2), [told.append, told.append])
    for line in lines(4, 6):
        log.add(line)
    assert told == [line for line in lines(4, 6) for _ in range(2)]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == log.history == lines(2, 4, 6)


@pytest.mark.parametrize(("module", "extra"), [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_what_is_not_installed_is_told_with_its_extra(tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module} is not installed .*interp-jax\[{extra}\]"):
        TensorBoardLogger(tmp_path) if extra == "tensorboard" else WandbLogger(tmp_path, {})


WANDB = """
    import sys
    from interp_jax.sae.loggers import WandbLogger
    with WandbLogger(sys.argv[1], {"k": 5}) as logger:
        for step in map(int, sys.argv[2:]):
            logger({"step": step, "run": 0, "loss": 1 / step})
            logger({"step": step, "run": 1, "loss": 2 / step})
"""


@pytest.mark.slow
# Not among the packages that tests install: it brings twenty more, and is asked for by an extra of its own.
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="Weights & Biases is not installed")
def test_weights_and_biases_offline_where_it_is_installed(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    for steps in (("1", "2", "3"), ("3", "4")):
        command = [sys.executable, "-c", textwrap.dedent(WANDB), str(tmp_path / "run"), *steps]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "run" / "wandb_id").read_text()
    contents = [(folder / f"run-{identity}.wandb").read_bytes() for folder in (first, second)]
    assert all(b"run_001/loss" in content and b"interp-jax" in content for content in contents)

"""A run's metrics in TensorBoard and in Weights & Biases, where they are installed; `metrics.jsonl` is written always.

    with TensorBoardLogger("run/tensorboard") as logger:
        train(config, batches, loggers=[logger])

A logger is anything that can be called with a line of metrics (`interp_jax.sae.metrics_log.Line`). A resumed run tells
the lines since its checkpoint again; both of these then show each step once.
"""

import importlib
import os
import pathlib
import uuid
from typing import Any

from interp_jax.sae.metrics_log import Line
from interp_jax.whole_file import write_whole

__all__ = ["TensorBoardLogger", "WandbLogger", "check_installed"]

_MODULE_OF = {"tensorboard": "tensorboardX", "wandb": "wandb"}

_FLUSHED_AFTER = 1
"""Seconds after which TensorBoard's events are on the disk: what a killed process may lose there."""


class TensorBoardLogger:
    """Scalars for TensorBoard: a curve a metric; in a sweep a folder a run, which TensorBoard shows side by side."""

    def __init__(self, directory: str | os.PathLike[str]):
        """A logger.

        Args:
            directory: for its event files, `tensorboard --logdir` of which shows them.

        Raises:
            ModuleNotFoundError: if tensorboardX is not installed.
        """
        self._tensorboard = check_installed("tensorboard")
        self._directory = pathlib.Path(directory)
        self._writers: dict[int | float | None, Any] = {}

    def __call__(self, line: Line) -> None:
        """Writes one line of metrics.

        Args:
            line: the metrics of a step.
        """
        run, step = line.get("run"), int(line["step"])
        if run not in self._writers:
            folder = self._directory / ("" if run is None else f"run_{run:03d}")
            # What an interrupted run wrote of this step and those after it is not shown any more.
            # A file is named after the second: the suffix keeps that of a run that ended within the same one.
            self._writers[run] = self._tensorboard.SummaryWriter(
                str(folder), purge_step=step, filename_suffix=f".{step:012d}", flush_secs=_FLUSHED_AFTER
            )
        for name, value in line.items():
            if name not in ("step", "run"):
                self._writers[run].add_scalar(name, value, step)

    def __enter__(self) -> "TensorBoardLogger":
        return self

    def __exit__(self, *_: Any) -> None:
        for writer in self._writers.values():
            writer.close()


class WandbLogger:
    """A run of Weights & Biases; in a sweep each metric is named after its run.

    Weights & Biases' own settings hold: `WANDB_PROJECT`, and `WANDB_MODE=offline` for a run that is not sent.
    """

    def __init__(self, directory: str | os.PathLike[str], config: dict[str, Any]):
        """A logger.

        Args:
            directory: the run's folder. Its name is the run's name; the run's id is kept in it, so that a run that is
                resumed goes on there too.
            config: what the run was configured with.

        Raises:
            ModuleNotFoundError: if wandb is not installed.
        """
        wandb = check_installed("wandb")
        directory = pathlib.Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        identity = directory / "wandb_id"
        if not identity.exists():
            write_whole(identity, uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            name=directory.name,
            project=os.environ.get("WANDB_PROJECT", "interp-jax"),
            dir=str(directory),
            config=config,
        )

    def __call__(self, line: Line) -> None:
        """Sends one line of metrics.

        Args:
            line: the metrics of a step.
        """
        before = f"run_{line['run']:03d}/" if "run" in line else ""
        named = {before + name: value for name, value in line.items() if name not in ("step", "run")}
        self._run.log(named, step=int(line["step"]))

    def __enter__(self) -> "WandbLogger":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def check_installed(extra: str) -> Any:
    """The package that an extra installs.

    Args:
        extra: `tensorboard` or `wandb`.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    module = _MODULE_OF[extra]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed ({error}): pip install 'interp-jax[{extra}]', or log to metrics.jsonl alone."
        ) from None

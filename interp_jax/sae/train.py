"""The training loop: one compiled step over a stream of activations, resumable to the bit.

The step (`interp_jax.sae.step`) is jitted with its state donated, so parameters and moments are updated in place. A run
is a function of its configuration and its batches alone; where `batches` is a function of the step number, or an
iterable that gives the same batches each time, a run that was killed and resumed ends with the very weights of one that
was not.

Hazards:

- A step is dispatched before the one before it is done, so a batch must not be changed in place after it was handed
  over.
- The state that is checkpointed is in normalised units; only what `train` returns is in the units of the activations.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.checkpoint import remove_checkpoints, restore_latest, save_checkpoint
from interp_jax.sae.mesh import place_batch, shardings, training_mesh
from interp_jax.sae.step import METRICS, TrainState, finished, initial_state, step
from interp_jax.sae.train_config import TrainConfig

__all__ = ["Batches", "NonFiniteLossError", "run_loop", "train"]

Batches = Callable[[int], Any] | Iterable[Any]
"""`[batch, d_in]` arrays, or pairs of them for a transcoder: an iterable, or a function from the step (from 0)."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    mesh: Mesh | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> tuple[SparseAutoencoder, list[dict[str, int | float]]]:
    """Trains an SAE or a transcoder.

    Args:
        config: sizes and hyperparameters.
        batches: `[batch, d_in]` arrays, one a step; pairs `(input, target)` where `config.d_out` is set. With a
            function of the step a resumed run asks for nothing that it does not need; an iterable is run through from
            its start to where the run had stopped.
        mesh: devices to train on: a mesh of axes `data`, over which a batch's rows are split, and `latent`, over which
            the dictionary is (`interp_jax.sae.mesh`). The losses are those of one device but for rounding. None is one
            device. A run may go on from its checkpoint on another mesh, or on none.
        on_step: called after each step with the steps done so far and that step's metrics.
        checkpoint_dir: where checkpoints and `metrics.jsonl` are written; None writes nothing.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, if there is one. Else checkpoints that are
            there are removed, once the first batch has come.

    Returns:
        (the SAE, for activations as they come, its arrays on the mesh if there is one; the metrics, one dictionary
        every `log_every` steps).

    Raises:
        ValueError: before any long work, for batches of another width than `d_in`, empty or ending too soon, a
            checkpoint made with another configuration, or a mesh of other axes or of sizes that do not divide the batch
            and d_sae.
        NonFiniteLossError: at the first step whose loss is not finite. Checkpoints hold the state before it.
    """

    if mesh is not None:
        mesh = training_mesh(mesh, config.d_sae)
    initial, run_step = functools.partial(initial_state, config), functools.partial(step, config, mesh=mesh)
    tell = None if on_step is None else lambda number, metrics: on_step(number, metrics[0])
    state, history = run_loop([config], initial, run_step, batches, tell, checkpoint_dir, resume, mesh)
    return finished(state), history


def run_loop(
    configs: Sequence[TrainConfig],
    initial: Callable[[Any], TrainState],
    run_step: Callable[[TrainState, Any, Any], tuple[TrainState, Array]],
    batches: Batches,
    on_step: Callable[[int, list[dict[str, float]]], None] | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    resume: bool,
    mesh: Mesh | None = None,
) -> tuple[TrainState, list[dict[str, int | float]]]:
    """The loop that `train` and `sweep` share.

    Args:
        configs: of each run that one step trains; they agree in all that concerns the loop.
        initial: makes the state from the first batch.
        run_step: from state, batch and number of the step to the state and `[metrics]`, or `[runs, metrics]`.
        batches: as `train` takes them.
        on_step: called after each step with the steps done so far and each run's metrics.
        checkpoint_dir: where checkpoints and `metrics.jsonl` are written; None writes nothing.
        resume: go on from the newest whole checkpoint, if there is one.
        mesh: what the state and the batches lie on; None where that is one device.

    Returns:
        The last state, and the history: one dictionary every `log_every` steps, with the run's number if there are
        several.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume needs the checkpoint_dir of the run that is to go on.")
    config = configs[0]
    directory = None if checkpoint_dir is None else pathlib.Path(checkpoint_dir)
    first_step, state, history = 0, None, []
    example = functools.partial(jax.eval_shape, initial, _example(config))
    # Where a state lies before a step it lies after it, which is also what lets the step take over its memory.
    where = None if mesh is None else shardings(mesh, example())
    if directory is not None and resume:
        restored = restore_latest(directory, example() if where is None else _lying(example(), where))
        if restored is not None:
            state, facts, first_step = restored
            _check_same_configs(configs, facts["configs"], directory)
            history = facts["history"]

    place = jnp.asarray if mesh is None else functools.partial(place_batch, mesh)
    stream = _Stream(batches, config, first_step, place)
    if state is None:
        state = jax.jit(initial, out_shardings=where)(stream.peek())
        if directory is not None:
            remove_checkpoints(directory)
    log = _MetricsLog(directory, history)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    step_fn = jax.jit(run_step, donate_argnums=0, out_shardings=(where, everywhere))

    pending: tuple[int, Array] | None = None

    def finish(number_and_metrics: tuple[int, Array]) -> None:
        """Takes a step's metrics off the device, which waits for it."""
        number, array = number_and_metrics
        table = np.asarray(array).reshape(len(configs), len(METRICS))
        metrics = [dict(zip(METRICS, map(float, row), strict=True)) for row in table]
        if not any(math.isfinite(one["loss"]) for one in metrics):
            raise NonFiniteLossError(_explain(number, config, directory))
        if number % config.log_every == 0 or number == config.n_steps:
            for run, one in enumerate(metrics):
                log.add({"step": number, **({"run": run} if len(configs) > 1 else {}), **one})
        if on_step is not None:
            on_step(number, metrics)

    for number in range(first_step, config.n_steps):
        batch = stream.next(number)
        state, metrics = step_fn(state, batch, number)
        # One step behind, so that the host reads the next batch while the device works on this one.
        if pending is not None:
            finish(pending)
        pending = (number + 1, metrics)
        done = number + 1
        if directory is not None and (done % config.checkpoint_every == 0 or done == config.n_steps):
            finish(pending)
            pending = None
            facts = {"configs": [dataclasses.asdict(one) for one in configs], "history": log.history}
            save_checkpoint(directory, done, state, facts, keep=config.keep)
    if pending is not None:
        finish(pending)
    return state, log.history


def _lying(shapes: Any, where: Any) -> Any:
    """Shapes that tell where their arrays are to lie."""

    def of_leaf(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of_leaf, shapes, where)


def _example(config: TrainConfig) -> Any:
    """The shape of a batch of one row."""
    x = jax.ShapeDtypeStruct((1, config.d_in), jnp.float32)
    return x if config.d_out is None else (x, jax.ShapeDtypeStruct((1, config.d_out), jnp.float32))


class _Stream:
    """Batches by step, checked as they come."""

    def __init__(self, batches: Batches, config: TrainConfig, first_step: int, place: Callable[[Any], Array]):
        self._place = place
        self._widths = (config.d_in,) if config.d_out is None else (config.d_in, config.d_out)
        self._first_step = first_step
        self._at: Callable[[int], Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        if isinstance(batches, Iterable):
            self._iterator = itertools.islice(iter(batches), first_step, None)
        else:
            self._at = batches
        self._peeked: Any = None

    def peek(self) -> Any:
        """The first batch, which is still to come."""
        if self._peeked is None:
            self._peeked = self._read(self._first_step)
        return self._peeked

    def next(self, step: int) -> Any:
        """The batch of a step."""
        if self._peeked is not None:
            batch, self._peeked = self._peeked, None
            return batch
        return self._read(step)

    def _read(self, step: int) -> Any:
        if self._at is not None:
            batch = self._at(step)
        else:
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"batches ended after {step} steps: pass more of them, start over at their end (a function of "
                    "the step can), or lower n_steps."
                ) from None
        if (len(self._widths) == 2) != (isinstance(batch, tuple) and len(batch) == 2):
            expected = "a pair (input, target), since d_out is set" if len(self._widths) == 2 else "one array"
            raise ValueError(f"the batch of step {step} is a {type(batch).__name__}; expected {expected}.")
        parts = batch if isinstance(batch, tuple) else (batch,)
        shapes = [np.shape(part) for part in parts]
        for shape, width in zip(shapes, self._widths, strict=True):
            if len(shape) != 2 or shape[1] != width or shape[0] == 0:
                raise ValueError(f"the batch of step {step} has shape {shape}; expected [batch, {width}], not empty.")
        if shapes[0][0] != shapes[-1][0]:
            raise ValueError(f"the batch of step {step} has {shapes[0][0]} inputs and {shapes[-1][0]} targets.")
        arrays = tuple(map(self._place, parts))
        return arrays if len(arrays) == 2 else arrays[0]


class _MetricsLog:
    """The history in memory, and line by line in `metrics.jsonl`."""

    def __init__(self, directory: pathlib.Path | None, history: list[dict[str, int | float]]):
        self.history = list(history)
        self._path = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._path = directory / "metrics.jsonl"
            # Lines after the checkpoint that is resumed from belong to steps that are done again.
            temporary = self._path.with_suffix(".part")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.history), encoding="utf-8")
            os.replace(temporary, self._path)

    def add(self, line: dict[str, int | float]) -> None:
        self.history.append(line)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _check_same_configs(configs: Sequence[TrainConfig], saved: list[dict[str, Any]], directory: pathlib.Path) -> None:
    """Only what changes no weight may differ."""
    free = {"log_every", "checkpoint_every", "keep"}
    now = json.loads(json.dumps([dataclasses.asdict(config) for config in configs]))  # as it was saved
    if len(now) != len(saved):
        raise ValueError(f"{directory} holds {len(saved)} runs, not {len(now)}. Use another checkpoint_dir.")
    differing = [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}" + (f" in run {run}" if len(now) > 1 else "")
        for run, (before, after) in enumerate(zip(saved, now, strict=True))
        for name in sorted(after.keys() | before.keys())
        if name not in free and after.get(name) != before.get(name)
    ]
    if differing:
        raise ValueError(
            f"the run in {directory} has another configuration ({'; '.join(differing)}). Use its "
            "configuration, or another checkpoint_dir."
        )


def _explain(step: int, config: TrainConfig, directory: pathlib.Path | None) -> str:
    kept = "no checkpoints were written" if directory is None else f"checkpoints before it are in {directory}"
    return (
        f"the loss of step {step} is not finite; {kept}. Likely causes: NaN or infinity in that batch; rows of huge "
        f"norm (the first positions of a context); a learning rate that is too high (it is {config.learning_rate:g})."
    )

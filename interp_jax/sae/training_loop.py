"""The loop that `train` and `sweep` share: batches in, a compiled step, metrics out, checkpoints beside it.

The host is one dispatch ahead of the device: it reads the next batches while the device works, and takes the metrics
of a dispatch off once the next one is on its way. Before a checkpoint it waits, so that a state whose loss is not
finite is never kept.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from interp_jax.disk_room import check_room
from interp_jax.sae.batch_stream import Batches, BatchStream
from interp_jax.sae.checkpoint import (
    CheckpointWriter,
    bytes_of,
    newest_checkpoint,
    remove_checkpoints,
    restore_latest,
)
from interp_jax.sae.mesh import place_batch, shardings
from interp_jax.sae.metrics_log import Logger, MetricsLog
from interp_jax.sae.run_lock import only_one_training
from interp_jax.sae.step import METRICS, TrainState
from interp_jax.sae.train_config import TrainConfig

__all__ = ["NonFiniteLossError", "run_loop"]

_FREE = {"log_every", "checkpoint_every", "keep", "steps_per_dispatch"}
"""Fields of the configuration that change no weight: a resumed run may have others."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def run_loop(
    configs: Sequence[TrainConfig],
    initial: Callable[[Any], TrainState],
    run_step: Callable[[TrainState, Any, Any], tuple[TrainState, Array]],
    batches: Batches,
    on_step: Callable[[int, list[dict[str, float]]], None] | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    resume: bool,
    mesh: Mesh | None = None,
    loggers: Sequence[Logger] = (),
) -> tuple[TrainState, list[dict[str, int | float]]]:
    """Trains from the first step, or from a checkpoint, to the last.

    Args:
        configs: of each run that one step trains; they agree in all that concerns the loop.
        initial: makes the state from the first batch.
        run_step: from state, batch and number of the step to the state and `[metrics]`, or `[runs, metrics]`.
        batches: as `train` takes them.
        on_step: called after each step with the steps done so far and each run's metrics.
        checkpoint_dir: where checkpoints and `metrics.jsonl` are written; None writes nothing.
        resume: go on from the newest whole checkpoint, if there is one.
        mesh: what the state and the batches lie on; None where that is one device.
        loggers: told each line of metrics as it is logged.

    Returns:
        The last state, and the history: one dictionary every `log_every` steps, with the run's number if there are
        several.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume needs the checkpoint_dir of the run that is to go on.")
    if jax.process_count() > 1 and mesh is None and checkpoint_dir is not None:
        raise ValueError(
            f"{jax.process_count()} processes would each write the same checkpoints: give a mesh over jax.devices()."
        )
    config = configs[0]
    is_first = jax.process_index() == 0
    directory = None if checkpoint_dir is None else pathlib.Path(checkpoint_dir)
    first_step, state, history, position = 0, None, [], None
    with contextlib.ExitStack() as stack:
        example = jax.eval_shape(initial, _example(config))
        # Where a state lies before a step it lies after it, which is also what lets the step take over its memory.
        where = None if mesh is None else shardings(mesh, example)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            if is_first:
                stack.enter_context(only_one_training(directory))
            check_room(directory, bytes_of(example), "a checkpoint of this run")
        if directory is not None and resume:
            restored = restore_latest(directory, example if where is None else _lying(example, where))
            if restored is not None:
                state, first_step, history = restored.state, restored.step, restored.facts["history"]
                _check_same_configs(configs, restored.facts["configs"], directory)
                position = restored.data()

        place = jnp.asarray if mesh is None else functools.partial(place_batch, mesh)
        stream = BatchStream(batches, config, first_step, place, position)
        if state is None:
            state = jax.jit(initial, out_shardings=where)(stream.peek())
            if directory is not None:
                remove_checkpoints(directory)
        log = MetricsLog(directory if is_first else None, history, loggers if is_first else ())
        writer = None if directory is None else stack.enter_context(CheckpointWriter(directory, keep=config.keep))
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        step_fn, steps_fn = (
            jax.jit(function, donate_argnums=0, out_shardings=(where, everywhere))
            for function in (run_step, _several(run_step))
        )

        def finish(first: int, array: Array) -> None:
            """Takes the metrics of a dispatch off the device, which waits for it."""
            for done, table in enumerate(np.asarray(array).reshape(-1, len(configs), len(METRICS)), first + 1):
                metrics = [dict(zip(METRICS, map(float, row), strict=True)) for row in table]
                if not any(math.isfinite(one["loss"]) for one in metrics):
                    raise NonFiniteLossError(_explain(done, config, writer, directory))
                if done % config.log_every == 0 or done == config.n_steps:
                    for run, one in enumerate(metrics):
                        log.add({"step": done, **({"run": run} if len(configs) > 1 else {}), **one})
                if on_step is not None:
                    on_step(done, metrics)

        pending: tuple[int, Array] | None = None
        done = first_step
        while done < config.n_steps:
            end = config.n_steps if writer is None else _next_checkpoint(config, done)
            n = config.steps_per_dispatch if done + config.steps_per_dispatch <= end else 1
            read = [stream.next(number) for number in range(done, done + n)]
            state, metrics = step_fn(state, read[0], done) if n == 1 else steps_fn(state, read, done)
            if pending is not None:
                finish(*pending)
            pending = (done, metrics)
            done += n
            if writer is None:
                continue
            writer.check()
            if done == end:
                finish(*pending)
                pending = None
                facts = {"configs": [dataclasses.asdict(one) for one in configs], "history": list(log.history)}
                writer.save(done, state, facts, stream.position())
        if pending is not None:
            finish(*pending)
    return state, log.history


def _several(
    run_step: Callable[[TrainState, Any, Any], tuple[TrainState, Array]],
) -> Callable[[TrainState, list[Any], Any], tuple[TrainState, Array]]:
    """Steps over several batches in one program: what they return, their metrics along a new first axis."""

    def run_steps(state: TrainState, batches: list[Any], first: Any) -> tuple[TrainState, Array]:
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *batches)
        numbers = first + jnp.arange(len(batches))
        return jax.lax.scan(lambda state, one: run_step(state, *one), state, (stacked, numbers))

    return run_steps


def _next_checkpoint(config: TrainConfig, done: int) -> int:
    """The steps that are done when the next checkpoint is due."""
    return min(config.n_steps, (done // config.checkpoint_every + 1) * config.checkpoint_every)


def _lying(shapes: Any, where: Any) -> Any:
    """Shapes that tell where their arrays are to lie."""

    def of_leaf(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of_leaf, shapes, where)


def _example(config: TrainConfig) -> Any:
    """The shape of a batch of one row."""
    x = jax.ShapeDtypeStruct((1, config.d_in), jnp.float32)
    return x if config.d_out is None else (x, jax.ShapeDtypeStruct((1, config.d_out), jnp.float32))


def _check_same_configs(configs: Sequence[TrainConfig], saved: list[dict[str, Any]], directory: pathlib.Path) -> None:
    """Only what changes no weight may differ."""
    now = json.loads(json.dumps([dataclasses.asdict(config) for config in configs]))  # as it was saved
    if len(now) != len(saved):
        raise ValueError(f"{directory} holds {len(saved)} runs, not {len(now)}. Use another checkpoint_dir.")
    differing = [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}" + (f" in run {run}" if len(now) > 1 else "")
        for run, (before, after) in enumerate(zip(saved, now, strict=True))
        for name in sorted(after.keys() | before.keys())
        if name not in _FREE and after.get(name) != before.get(name)
    ]
    if differing:
        raise ValueError(
            f"the run in {directory} has another configuration ({'; '.join(differing)}). Use its "
            "configuration, or another checkpoint_dir."
        )


def _explain(step: int, config: TrainConfig, writer: CheckpointWriter | None, directory: pathlib.Path | None) -> str:
    """What a user needs to know of a loss that is not finite."""
    kept = "no checkpoints were written"
    if writer is not None and directory is not None:
        with contextlib.suppress(OSError):  # that the last one failed is not what stopped the run
            writer.wait()
        newest = newest_checkpoint(directory)
        if newest is None:
            kept = f"there is no checkpoint in {directory} yet"
        else:
            kept = f"the last good checkpoint, of step {int(newest.name.removeprefix('step_'))}, is {newest}"
    return (
        f"the loss of step {step} is not finite; {kept}. Likely causes: NaN or infinity in that batch; rows of huge "
        f"norm (the first positions of a context); a learning rate that is too high (it is {config.learning_rate:g})."
    )

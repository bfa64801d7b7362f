"""Many autoencoders trained on one stream of activations, in one compiled program.

What may differ between them is what a step takes as data: the learning rate, the weight of the penalty, the seed. The
activations are made, moved and normalised once for all, and the step is compiled once.

Within a step the autoencoders are trained one after another (`how="map"`): each takes the time and the memory that it
takes alone, and one that has no dead latents skips what revives them. Small autoencoders leave an accelerator idle;
there all can be trained side by side (`how="vmap"`), in memory that grows with their number.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.batch_stream import Batches
from interp_jax.sae.mesh import training_mesh
from interp_jax.sae.metrics_log import Logger
from interp_jax.sae.step import Knobs, TrainState, finished, initial_state, knobs_of, step
from interp_jax.sae.train_config import TrainConfig
from interp_jax.sae.training_loop import run_loop

__all__ = ["SweepRun", "sweep"]

_FREE = ("learning_rate", "l1_coefficient", "l0_coefficient", "seed")
"""What may differ between the runs of a sweep."""


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One autoencoder of a sweep."""

    config: TrainConfig
    """Its configuration."""
    sae: SparseAutoencoder
    """The autoencoder, for activations as they come."""
    history: list[dict[str, int | float]]
    """Its metrics, one dictionary every `log_every` steps."""


def sweep(
    configs: Sequence[TrainConfig],
    batches: Batches,
    *,
    how: Literal["map", "vmap"] = "map",
    mesh: Mesh | None = None,
    on_step: Callable[[int, list[dict[str, float]]], None] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
) -> list[SweepRun]:
    """Trains several autoencoders at once.

    Args:
        configs: one a run. They differ in `learning_rate`, `l1_coefficient`, `l0_coefficient` and `seed` alone.
        batches: as `train` takes them; every run is given the same.
        how: one after another within a step, or side by side.
        mesh: devices that each run is trained on, as `train` takes them; the runs themselves are not spread over them.
        on_step: called after each step with the steps done so far and each run's metrics.
        checkpoint_dir: where checkpoints and `metrics.jsonl` are written; None writes nothing.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, if there is one.
        loggers: as `train` takes them; `run` is in each line.

    Returns:
        The runs, in the order of the configurations. One whose loss became NaN or infinite is among them; its history
        says so.

    Raises:
        ValueError: for no configurations, or some that differ in anything else; and for what `train` refuses.
        NonFiniteLossError: when no run's loss is finite any more.
    """
    config = _shared(configs)
    knobs = stacked_knobs(configs)
    if mesh is not None:
        mesh = training_mesh(mesh, config.d_sae)
    initial = functools.partial(initial_states, config, knobs)
    run_steps = functools.partial(step_all, config, how=how, mesh=mesh)
    states, history = run_loop(configs, initial, run_steps, batches, on_step, checkpoint_dir, resume, mesh, loggers)
    runs = []
    for number, one in enumerate(configs):
        sae = finished(jax.tree.map(lambda leaf, number=number: leaf[number], states))
        lines = [
            {name: value for name, value in line.items() if name != "run"}
            for line in history
            if line.get("run", 0) == number
        ]
        runs.append(SweepRun(one, sae, lines))
    return runs


def stacked_knobs(configs: Sequence[TrainConfig]) -> Knobs:
    """What differs between runs, along a new first axis.

    Args:
        configs: one a run.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(knobs_of, configs))


def initial_states(config: TrainConfig, knobs: Knobs, batch: Any) -> TrainState:
    """The states of all runs before the first step.

    Args:
        config: what they share.
        knobs: what differs, of `stacked_knobs`.
        batch: the first batch.
    """
    return jax.lax.map(lambda one: initial_state(config, batch, one), knobs)


def step_all(
    config: TrainConfig,
    states: TrainState,
    batch: Any,
    number: Any,
    *,
    how: Literal["map", "vmap"] = "map",
    mesh: Mesh | None = None,
) -> tuple[TrainState, Float[Array, "runs metrics"]]:
    """One step of every run.

    Args:
        config: what they share.
        states: of `initial_states`, or of the step before.
        batch: the batch of all.
        number: of the step, from 0.
        how: one after another, or side by side.
        mesh: what states and batch lie on; None where that is one device.
    """
    run_step = functools.partial(step, config, mesh=mesh)
    if how == "vmap":
        return jax.vmap(run_step, in_axes=(0, None, None))(states, batch, number)
    return jax.lax.map(lambda state: run_step(state, batch, number), states)


def _shared(configs: Sequence[TrainConfig]) -> TrainConfig:
    """What all configurations agree in, as the first one."""
    if not configs:
        raise ValueError("a sweep needs at least one configuration.")
    first = configs[0]
    differing = sorted(
        field.name
        for field in dataclasses.fields(first)
        if field.name not in _FREE and len({getattr(one, field.name) for one in configs}) > 1
    )
    if differing:
        raise ValueError(
            f"the configurations of a sweep differ in {', '.join(differing)}; they may differ in {', '.join(_FREE)} "
            "alone. Train those that differ otherwise in sweeps of their own."
        )
    return first

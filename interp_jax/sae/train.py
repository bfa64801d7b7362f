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

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.batch_stream import Batches
from interp_jax.sae.mesh import training_mesh
from interp_jax.sae.metrics_log import Logger
from interp_jax.sae.step import finished, initial_state, step
from interp_jax.sae.train_config import TrainConfig
from interp_jax.sae.training_loop import NonFiniteLossError, run_loop

__all__ = ["Batches", "NonFiniteLossError", "train"]


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    mesh: Mesh | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
) -> tuple[SparseAutoencoder, list[dict[str, int | float]]]:
    """Trains an SAE or a transcoder.

    Args:
        config: sizes and hyperparameters.
        batches: `[batch, d_in]` arrays, one a step; pairs `(input, target)` where `config.d_out` is set. With a
            function of the step a resumed run asks for nothing that it does not need; an iterable is run through from
            its start to where the run had stopped, unless it has `state_dict()` and `load_state_dict(state)`, as
            Hugging Face's iterable datasets have: then its state is kept in the checkpoint, and given back to it
            (`interp_jax.sae.batch_stream.Restorable`).
        mesh: devices to train on: a mesh of axes `data`, over which a batch's rows are split, and `latent`, over which
            the dictionary is (`interp_jax.sae.mesh`). The losses are those of one device but for rounding. None is one
            device. A run may go on from its checkpoint on another mesh, or on none. Its devices may be those of several
            processes (`jax.distributed`): all call this alike, each with its own rows of every batch
            (`interp_jax.sae.mesh.own_rows`) and the same `checkpoint_dir`, which all see. The first writes the metrics.
        on_step: called after each step with the steps done so far and that step's metrics.
        checkpoint_dir: where checkpoints and `metrics.jsonl` are written; None writes nothing. A checkpoint is written
            while training goes on.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, if there is one. Else checkpoints that are
            there are removed, once the first batch has come.
        loggers: called with each line of metrics as it is logged, `step` in it: for instance
            `interp_jax.sae.loggers.TensorBoardLogger`. Those of the first process, where there are several.

    Returns:
        (the SAE, for activations as they come, its arrays on the mesh if there is one; the metrics, one dictionary
        every `log_every` steps).

    Raises:
        ValueError: before any long work, for batches of another width than `d_in`, empty or ending too soon, a
            checkpoint made with another configuration, or a mesh of other axes or of sizes that do not divide the batch
            and d_sae.
        NonFiniteLossError: at the first step whose loss is not finite. Checkpoints hold the state before it.
        OSError: if a checkpoint or a line of metrics cannot be written: how much is needed and how much is free, and
            what was written before, which stays.
        RuntimeError: if another process is training into `checkpoint_dir`.
    """

    if mesh is not None:
        mesh = training_mesh(mesh, config.d_sae)
    initial, run_step = _functions(config, mesh)
    tell = None if on_step is None else lambda number, metrics: on_step(number, metrics[0])
    state, history = run_loop([config], initial, run_step, batches, tell, checkpoint_dir, resume, mesh, loggers)
    return finished(state), history


@functools.lru_cache(maxsize=4)
def _functions(config: TrainConfig, mesh: Mesh | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes the state, and one step: the same objects for the same run, so that JAX compiles them once."""
    return functools.partial(initial_state, config), functools.partial(step, config, mesh=mesh)

"""Training: one compiled step over a stream of activations, resumable to the bit.

The step is jitted with its state donated, so parameters and moments are updated in place. A run is a function of its
configuration and its batches alone; where `batches` is a function of the step number, or an iterable that gives the
same batches each time, a run that was killed and resumed ends with the very weights of one that was not.

Inputs are divided by one scalar, the median of the rows' root mean squares in the first batch, so that learning rate
and coefficients mean the same on every model; the scalar is folded into the weights of the SAE that is returned. The
decoder bias starts at the first batch's mean.

Hazards:

- A step is dispatched before the one before it is done, so a batch must not be changed in place after it was handed
  over.
- A language model gives a few tokens activations of a hundred times the usual norm: the first of a row, but also some
  inside it. In SmolLM2's middle layer 3 rows in 10,000 hold three quarters of all energy; a plain squared error would
  be about them alone. Their error is weighted so that a row counts for no more than if it were shrunk to `norm_cap`
  times the median. The first positions are best left out altogether, where the activations are made.
- The state that is checkpointed is in normalised units; only what `train` returns is in the units of the activations.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from interp_jax.sae.auxiliary_k import add_auxiliary_gradient
from interp_jax.sae.checkpoint import restore_latest, save_checkpoint
from interp_jax.sae.topk import TopKSAE, check_sizes, reconstruct
from interp_jax.sae.unit_norm import tangent, to_unit_norm

__all__ = ["Batches", "NonFiniteLossError", "TrainConfig", "train"]

Batches = Callable[[int], Any] | Iterable[Any]
"""`[batch, d_in]` arrays: an iterable of them, or a function from the step (from 0) to its batch."""

METRICS: tuple[str, ...] = ("loss", "fvu", "l0", "dead_share", "learning_rate")


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    k: int = 32
    """Latents a row may use."""
    n_steps: int = 10_000
    """Training steps, one batch each."""
    learning_rate: float = 1e-3
    """Adam's learning rate after warm-up, for inputs of unit mean square."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    beta1: float = 0.0
    """Adam's decay of the gradient's mean; at zero that moment is not kept."""
    beta2: float = 0.999
    """Adam's decay of the gradient's mean square."""
    norm_cap: float = 3.0
    """Rows larger than this many times the median row count in the loss as if they were shrunk to it."""
    dead_after: int = 100_000
    """A latent that was not active for this many rows is dead, and auxiliary-k works on it."""
    k_aux: int = 64
    """Dead latents that a row may use in the auxiliary loss."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss; zero switches it off."""
    seed: int = 0
    """Seed of the initial directions."""
    log_every: int = 50
    """Steps from one line of metrics to the next."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next, where a checkpoint directory is given."""
    keep: int = 2
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        check_sizes(self.d_in, self.d_sae, self.k)
        for name in ("n_steps", "log_every", "checkpoint_every", "keep", "dead_after", "k_aux"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("learning_rate", "aux_coefficient", "warmup_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; expected a finite number, zero or more.")
        if not self.norm_cap > 0:
            raise ValueError(f"norm_cap is {self.norm_cap}; expected a positive number, or inf for none.")
        for name in ("beta1", "beta2", "decay_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and less than 1.")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sae", "moments", "idle", "scale"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """All that a run changes as it goes on. A pytree: its leaves may also be the shapes of arrays."""

    sae: Any
    """TopKSAE: the autoencoder, for inputs multiplied by `scale`."""
    moments: Any
    """Adam's state."""
    idle: Any
    """int32 [d_sae]: rows since each latent was last active."""
    scale: Any
    """float32 scalar: what inputs are multiplied by."""


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> tuple[TopKSAE, list[dict[str, int | float]]]:
    """Trains a TopK SAE.

    Args:
        config: sizes and hyperparameters.
        batches: `[batch, d_in]` arrays, one a step. With a function of the step a resumed run asks for nothing that it
            does not need; an iterable is run through from its start to where the run had stopped.
        on_step: called after each step with the steps done so far and that step's metrics.
        checkpoint_dir: where checkpoints and `metrics.jsonl` are written; None writes nothing.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, if there is one. Else what is there is
            replaced.

    Returns:
        (the SAE, for activations as they come; the metrics, one dictionary every `log_every` steps).

    Raises:
        ValueError: before any long work, for batches of another width than `d_in`, empty or ending too soon, or a
            checkpoint made with another configuration.
        NonFiniteLossError: at the first step whose loss is not finite. Checkpoints hold the state before it.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume needs the checkpoint_dir of the run that is to go on.")
    directory = None if checkpoint_dir is None else pathlib.Path(checkpoint_dir)
    first_step, state, history = 0, None, []
    if directory is not None and resume:
        restored = restore_latest(
            directory, jax.eval_shape(functools.partial(_initial_state, config), _example(config))
        )
        if restored is not None:
            state, facts, first_step = restored
            _check_same_config(config, facts["config"], directory)
            history = facts["history"]

    stream = _Stream(batches, config.d_in, first_step)
    if state is None:
        state = jax.jit(functools.partial(_initial_state, config))(stream.peek())
    log = _MetricsLog(directory, history)
    step_fn = jax.jit(functools.partial(_step, config), donate_argnums=0)

    pending: tuple[int, Array] | None = None

    def finish(number_and_metrics: tuple[int, Array]) -> None:
        """Takes a step's metrics off the device, which waits for it."""
        number, array = number_and_metrics
        metrics = dict(zip(METRICS, map(float, np.asarray(array)), strict=True))
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError(_explain(number, config, directory))
        if number % config.log_every == 0 or number == config.n_steps:
            log.add({"step": number, **metrics})
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
            facts = {"config": dataclasses.asdict(config), "history": log.history}
            save_checkpoint(directory, done, state, facts, keep=config.keep)
    if pending is not None:
        finish(pending)
    return fold(state), log.history


def fold(state: TrainState) -> TopKSAE:
    """The SAE for activations as they come: the input scale goes into the biases, and rows keep their norm one.

    With s the scale, `relu(s x W + b) = s relu(x W + b / s)`: codes are s times smaller, and so is the reconstruction.
    """
    sae, scale = state.sae, state.scale
    return TopKSAE(
        W_enc=sae.W_enc[...],
        b_enc=sae.b_enc[...] / scale,
        W_dec=sae.W_dec[...],
        b_dec=sae.b_dec[...] / scale,
        k=sae.k,
    )


def _initial_state(config: TrainConfig, batch: Float[Array, "batch d_in"]) -> TrainState:
    batch = batch.astype(jnp.float32)
    square = jnp.median(jnp.mean(jnp.square(batch), axis=1))
    scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 1)
    sae = TopKSAE.random(config.d_in, config.d_sae, config.k, key=jax.random.key(config.seed))
    sae = TopKSAE(
        W_enc=sae.W_enc[...],
        b_enc=sae.b_enc[...],
        W_dec=sae.W_dec[...],
        b_dec=jnp.average(batch, axis=0, weights=_row_weights(config, batch * scale)) * scale,
        k=config.k,
    )
    return TrainState(sae, _optimiser(config).init(cast(Any, sae)), jnp.zeros(config.d_sae, jnp.int32), scale)


def _row_weights(config: TrainConfig, x: Float[Array, "batch d_in"]) -> Float[Array, "batch"]:
    """One, but for outliers of the normalised inputs: what makes their square no larger than the cap's."""
    return jnp.minimum(1, config.norm_cap**2 / jnp.maximum(jnp.mean(jnp.square(x), axis=1), 1e-30))


def _example(config: TrainConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.d_in), jnp.float32)


def _optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Adam without its learning rate. The small epsilon is Gao et al.'s: gradients of rare latents are small."""
    if config.beta1 == 0:
        return optax.scale_by_rms(config.beta2, eps=6.25e-10, initial_scale=0, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_adam(config.beta1, config.beta2, eps=6.25e-10)


def _learning_rate(config: TrainConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """Linear warm-up, then constant, then linear to zero at the end."""
    warm = (step + 1) / max(1, config.warmup_steps)
    decay_steps = max(1.0, config.decay_share * config.n_steps)
    cool = (config.n_steps - step) / decay_steps if config.decay_share > 0 else jnp.asarray(1.0)
    return config.learning_rate * jnp.minimum(1.0, jnp.minimum(warm, cool))


def _step(
    config: TrainConfig, state: TrainState, batch: Float[Array, "batch d_in"], step: Int[Array, ""]
) -> tuple[TrainState, Float[Array, "metrics"]]:
    x = batch.astype(jnp.float32) * state.scale
    row_weights = _row_weights(config, x)

    def loss_of(sae: TopKSAE):
        reconstruction = reconstruct(sae, x)
        error = x - reconstruction.output
        return jnp.mean(row_weights * jnp.sum(jnp.square(error), axis=1)), (reconstruction, error)

    (loss, (reconstruction, error)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.sae)
    idle = jnp.where(reconstruction.firings > 0, 0, jnp.minimum(state.idle, 2**30) + len(x)).astype(jnp.int32)
    if config.aux_coefficient > 0:
        gradient = add_auxiliary_gradient(
            gradient,
            state.sae,
            x,
            error,
            row_weights,
            idle,
            dead_after=config.dead_after,
            k_aux=config.k_aux,
            coefficient=config.aux_coefficient,
        )
    gradient = _with_dictionary(gradient, tangent(gradient.W_dec[...], state.sae.W_dec[...]))
    updates, moments = _optimiser(config).update(cast(Any, gradient), state.moments)
    rate = _learning_rate(config, step)
    sae = jax.tree.map(lambda weight, update: weight - rate * update, state.sae, updates)
    sae = _with_dictionary(sae, to_unit_norm(sae.W_dec[...]))

    centred = x - jnp.average(x, axis=0, weights=row_weights)
    variance = jnp.mean(row_weights * jnp.sum(jnp.square(centred), axis=1))
    metrics = {
        "loss": loss,
        "fvu": loss / jnp.where(variance > 0, variance, 1),
        "l0": jnp.sum(reconstruction.firings) / len(x),
        "dead_share": jnp.mean(idle > config.dead_after),
        "learning_rate": rate,
    }
    return TrainState(sae, moments, idle, state.scale), jnp.stack([metrics[name] for name in METRICS])


def _with_dictionary(sae: TopKSAE, W_dec: Float[Array, "d_sae d_in"]) -> TopKSAE:
    return TopKSAE(W_enc=sae.W_enc[...], b_enc=sae.b_enc[...], W_dec=W_dec, b_dec=sae.b_dec[...], k=sae.k)


class _Stream:
    """Batches by step, checked as they come."""

    def __init__(self, batches: Batches, d_in: int, first_step: int):
        self._d_in = d_in
        self._first_step = first_step
        self._at: Callable[[int], Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        if isinstance(batches, Iterable):
            self._iterator = itertools.islice(iter(batches), first_step, None)
        else:
            self._at = batches
        self._peeked: Array | None = None

    def peek(self) -> Float[Array, "batch d_in"]:
        """The first batch, which is still to come."""
        if self._peeked is None:
            self._peeked = self._read(self._first_step)
        return self._peeked

    def next(self, step: int) -> Float[Array, "batch d_in"]:
        """The batch of a step."""
        if self._peeked is not None:
            batch, self._peeked = self._peeked, None
            return batch
        return self._read(step)

    def _read(self, step: int) -> Array:
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
        shape = np.shape(batch)
        if len(shape) != 2 or shape[1] != self._d_in or shape[0] == 0:
            raise ValueError(f"the batch of step {step} has shape {shape}; expected [batch, {self._d_in}], not empty.")
        return jnp.asarray(batch)


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


def _check_same_config(config: TrainConfig, saved: dict[str, Any], directory: pathlib.Path) -> None:
    """Only what changes no weight may differ."""
    free = {"log_every", "checkpoint_every", "keep"}
    now = dataclasses.asdict(config)
    differing = [
        f"{name} was {saved.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(now.keys() | saved.keys())
        if name not in free and now.get(name) != saved.get(name)
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

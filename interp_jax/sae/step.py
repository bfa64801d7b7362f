"""One step of training, as a pure function of a state and a batch.

What differs between runs of one program, the learning rate and the weight of the penalty, is data in the state
(`Knobs`), and so is the random key, so that one compiled step serves a sweep over them.

Inputs are divided by one scalar, the median of the rows' root mean squares in the first batch, so that learning rate
and coefficients mean the same on every model; `finished` folds the scalar into the weights. The decoder bias starts at
the first batch's mean.

Hazard: a language model gives a few tokens activations of a hundred times the usual norm: the first of a row, but also
some inside it. In SmolLM2's middle layer 3 rows in 10,000 hold three quarters of all energy; a plain squared error
would be about them alone. Their error is weighted so that a row counts for no more than if it were shrunk to `norm_cap`
times the median.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from interp_jax.sae.autoencoder import Batch, Outcome, SparseAutoencoder, Sparsity
from interp_jax.sae.auxiliary_k import N_REVIVED, auxiliary_loss
from interp_jax.sae.batch_topk import BatchTopKSAE
from interp_jax.sae.dead_latents import add_gradient_of_dead
from interp_jax.sae.gated import GatedSAE
from interp_jax.sae.ghost import ghost_loss
from interp_jax.sae.jumprelu import JumpReLUSAE
from interp_jax.sae.matryoshka import MatryoshkaSAE
from interp_jax.sae.relu import ReLUSAE
from interp_jax.sae.resample import N_LAZY, as_if_new, longest_dead, resample
from interp_jax.sae.topk import TopKSAE
from interp_jax.sae.train_config import TrainConfig
from interp_jax.sae.unit_norm import inside, tangent, to_norm_at_most_one, to_unit_norm

__all__ = ["METRICS", "Knobs", "TrainState", "finished", "initial_state", "knobs_of", "step"]

METRICS: tuple[str, ...] = ("loss", "fvu", "l0", "dead_share", "rare_share", "penalty", "revival", "learning_rate")
"""What a step tells, in this order: `loss`, what is minimised; `fvu` of the batch; `l0`; `dead_share`, latents dead by
`dead_after`; `rare_share`, those active in less than 1e-5 of the rows of the last whole window; `penalty`, what the
loss holds beside the squared error; `revival`, the loss that only revives dead latents, not part of `loss`."""

_THRESHOLD_RATE = 0.01
"""How fast BatchTopK's running mean of the least code follows the batches."""


def _pytree(*data: str):
    return functools.partial(jax.tree_util.register_dataclass, data_fields=list(data), meta_fields=[])


@_pytree("learning_rate", "sparsity", "key")
@dataclasses.dataclass(frozen=True)
class Knobs:
    """What may differ between runs that share a compiled step; scalars, or one a run of a sweep."""

    learning_rate: Any
    sparsity: Any
    """The coefficient of the penalty, after warm-up."""
    key: Any
    """Data of a random key: it makes the first directions, and each step folds its number in."""


@_pytree("sae", "moments", "idle", "began", "window", "scales", "knobs")
@dataclasses.dataclass
class TrainState:
    """All that a run changes as it goes on. A pytree: its leaves may also be the shapes of arrays."""

    sae: Any
    """The autoencoder, for inputs and targets multiplied by `scales`."""
    moments: Any
    """Adam's state."""
    idle: Any
    """int32 [d_sae]: rows since each latent was last active."""
    began: Any
    """int32 [d_sae]: steps that were done when each latent last started again; 0 where it never did."""
    window: Any
    """The `FiringWindow`."""
    scales: Any
    """Two float32 scalars: what inputs and targets are multiplied by."""
    knobs: Any
    """The run's `Knobs`."""


@_pytree("n_rows", "firings", "frequency")
@dataclasses.dataclass
class FiringWindow:
    """How often each latent is active, over a window of rows."""

    n_rows: Any
    """int32: rows since the window began."""
    firings: Any
    """int32 [d_sae]: in how many of them each latent was active."""
    frequency: Any
    """float32 [d_sae]: the share of the last whole window's rows; 1 before there is one."""


def knobs_of(config: TrainConfig) -> Knobs:
    """The knobs of a configuration.

    Args:
        config: the configuration.
    """
    return Knobs(
        learning_rate=jnp.float32(config.learning_rate),
        sparsity=jnp.float32(config.sparsity_coefficient),
        key=jax.random.key_data(jax.random.key(config.seed)),
    )


def random_sae(config: TrainConfig, key: Array) -> SparseAutoencoder:
    """A random autoencoder of the configured kind.

    Args:
        config: the configuration.
        key: random key.
    """
    shape: dict[str, Any] = {"d_out": config.d_out, "has_skip": config.has_skip}
    sizes = (config.d_in, config.d_sae)
    if config.architecture == "topk":
        sae = TopKSAE.random(*sizes, config.k, key=key, **shape)
    elif config.architecture == "batch_topk":
        sae = BatchTopKSAE.random(*sizes, config.k, key=key, **shape)
    elif config.architecture == "matryoshka":
        sae = MatryoshkaSAE.random(*sizes, config.k, widths=config.prefixes, key=key, **shape)
    elif config.architecture == "relu":
        sae = ReLUSAE.random(*sizes, key=key, **shape)
    elif config.architecture == "gated":
        sae = GatedSAE.random(*sizes, key=key, **shape)
    else:
        sae = JumpReLUSAE.random(
            *sizes,
            key=key,
            threshold=config.initial_threshold,
            bandwidth=config.bandwidth,
            parameter=config.threshold_parameter,
            **shape,
        )
    sae.apply_b_dec_to_input = config.apply_b_dec_to_input and config.d_out is None
    return sae


def initial_state(config: TrainConfig, batch: Any, knobs: Knobs | None = None) -> TrainState:
    """The state before the first step.

    Args:
        config: the configuration.
        batch: the first batch; a pair for a transcoder.
        knobs: what may differ between runs; the configuration's when None.
    """
    knobs = knobs_of(config) if knobs is None else knobs
    x, target = _split(batch)
    input_scale = _scale(x)
    output_scale = input_scale if target is x else _scale(target)
    sae = random_sae(config, jax.random.wrap_key_data(knobs.key))
    weights = _row_weights(config, target * output_scale)
    sae = sae.replace(b_dec=jnp.average(target, axis=0, weights=weights) * output_scale)
    n = config.d_sae
    return TrainState(
        sae=sae,
        moments=_optimiser(config).init(cast(Any, sae)),
        idle=jnp.zeros(n, jnp.int32),
        began=jnp.zeros(n, jnp.int32),
        window=FiringWindow(jnp.int32(0), jnp.zeros(n, jnp.int32), jnp.ones(n)),
        scales=(input_scale, output_scale),
        knobs=knobs,
    )


def finished(state: TrainState) -> SparseAutoencoder:
    """The autoencoder for activations as they come: the scales are folded into its weights.

    Args:
        state: of a run.
    """
    return state.sae.in_units(*state.scales)


def step(
    config: TrainConfig, state: TrainState, batch: Any, number: Int[Array, ""] | int, *, mesh: Mesh | None = None
) -> tuple[TrainState, Float[Array, "metrics"]]:
    """One step of training.

    Args:
        config: the configuration; static.
        state: before the step.
        batch: `[batch, d_in]` activations; a pair for a transcoder.
        number: of the step, from 0.
        mesh: what the state and the batch lie on (`interp_jax.sae.mesh`); None where that is one device.

    Returns:
        The state after it, and the numbers that `METRICS` names.
    """
    sae: SparseAutoencoder = state.sae
    raw_x, raw_target = _split(batch)
    x = raw_x * state.scales[0]
    target = x if raw_target is raw_x else raw_target * state.scales[1]
    row_weights = _row_weights(config, target)
    warm = jnp.minimum(1, (number + 1) / max(1.0, config.sparsity_warmup_share * config.n_steps))
    sparsity = Sparsity(state.knobs.sparsity * warm, config.is_l1_norm_weighted, config.l0_target)
    outcome, gradient = sae.objective_and_gradient(Batch(x, target, row_weights), sparsity, mesh)
    # What is not a number is not above a threshold either: a transcoder's sparse codes may leave it out.
    loss = jnp.where(jnp.all(jnp.isfinite(x)), outcome.loss, jnp.nan)
    idle = jnp.where(outcome.firings > 0, 0, jnp.minimum(state.idle, 2**30) + len(x)).astype(jnp.int32)
    is_dead = idle > config.dead_after
    gradient, revival = _revived(config, gradient, sae, x, outcome, row_weights, idle, is_dead, number, mesh)

    if config.decoder_norm == "unit":
        gradient = gradient.replace(W_dec=tangent(gradient.W_dec[...], sae.W_dec[...]))
    elif config.decoder_norm == "at_most_one":
        gradient = gradient.replace(W_dec=inside(gradient.W_dec[...], sae.W_dec[...]))
    updates, moments = _optimiser(config).update(cast(Any, gradient), state.moments)
    if config.restarts:
        updates = as_if_new(cast(Any, updates), state.began, number + 1, beta1=config.beta1, beta2=config.beta2)
    rate = _learning_rate(config, state.knobs.learning_rate, number)
    sae = jax.tree.map(lambda weight, update: weight - rate * update, sae, updates)
    if isinstance(sae, BatchTopKSAE):
        kept = sae.threshold[...]
        followed = jnp.where(number > 0, kept + _THRESHOLD_RATE * (outcome.threshold - kept), outcome.threshold)
        sae = sae.replace(threshold=followed)
    began = state.began
    if config.restarts:
        chosen = _to_restart(config, idle, is_dead, len(x), number)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.knobs.key), number + 1)
        errors = row_weights * jnp.sum(jnp.square(outcome.error), axis=1)

        def again(sae: SparseAutoencoder, moments: Any) -> tuple[SparseAutoencoder, Any]:
            return resample(sae, moments, chosen, is_dead, x, target, errors, key=key)

        sae, moments = jax.lax.cond(jnp.any(chosen), again, lambda sae, moments: (sae, moments), sae, moments)
        idle = jnp.where(chosen, 0, idle)
        began = jnp.where(chosen, jnp.asarray(number, jnp.int32) + 1, began)
    if config.decoder_norm == "unit":
        sae = sae.replace(W_dec=to_unit_norm(sae.W_dec[...]))
    elif config.decoder_norm == "at_most_one":
        sae = sae.replace(W_dec=to_norm_at_most_one(sae.W_dec[...]))

    window = _counted(config, state.window, outcome.firings, len(x))
    centred = target - jnp.average(target, axis=0, weights=row_weights)
    variance = jnp.mean(row_weights * jnp.sum(jnp.square(centred), axis=1))
    metrics = {
        "loss": loss,
        "fvu": outcome.squared_error / jnp.where(variance > 0, variance, 1),
        "l0": jnp.sum(outcome.firings) / len(x),
        "dead_share": jnp.mean(is_dead),
        "rare_share": jnp.mean(window.frequency < 1e-5),
        "penalty": loss - outcome.squared_error,
        "revival": revival,
        "learning_rate": rate,
    }
    after = TrainState(sae, moments, idle, began, window, state.scales, state.knobs)
    return after, jnp.stack([metrics[name] for name in METRICS])


def _split(batch: Any) -> tuple[Array, Array]:
    """Inputs and targets; the very same array where a batch is one."""
    if isinstance(batch, tuple):
        x, target = batch
        return x.astype(jnp.float32), target.astype(jnp.float32)
    x = batch.astype(jnp.float32)
    return x, x


def _scale(x: Float[Array, "batch d"]) -> Float[Array, ""]:
    """What makes the median row's mean square one."""
    square = jnp.median(jnp.mean(jnp.square(x), axis=1))
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 1)


def _row_weights(config: TrainConfig, x: Float[Array, "batch d"]) -> Float[Array, "batch"]:
    """One, but for outliers of the normalised targets: what makes their square no larger than the cap's."""
    return jnp.minimum(1, config.norm_cap**2 / jnp.maximum(jnp.mean(jnp.square(x), axis=1), 1e-30))


def _optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Adam without its learning rate. The small epsilon is Gao et al.'s: gradients of rare latents are small."""
    if config.beta1 == 0:
        return optax.scale_by_rms(config.beta2, eps=6.25e-10, initial_scale=0, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_adam(config.beta1, config.beta2, eps=6.25e-10)


def _learning_rate(config: TrainConfig, peak: Array, number: Array | int) -> Float[Array, ""]:
    """Linear warm-up, then constant, then linear to zero at the end."""
    warm = (number + 1) / max(1, config.warmup_steps)
    decay_steps = max(1.0, config.decay_share * config.n_steps)
    cool = (config.n_steps - number) / decay_steps if config.decay_share > 0 else jnp.asarray(1.0)
    return peak * jnp.minimum(1.0, jnp.minimum(warm, cool))


def _revived(
    config: TrainConfig,
    gradient: SparseAutoencoder,
    sae: SparseAutoencoder,
    x: Array,
    outcome: Outcome,
    row_weights: Array,
    idle: Int[Array, "d_sae"],
    is_dead: Bool[Array, "d_sae"],
    number: Array | int,
    mesh: Mesh | None,
) -> tuple[SparseAutoencoder, Array]:
    """The gradient with what revives dead latents, and the loss that it is of."""
    error = jax.lax.stop_gradient(outcome.error)
    if config.revival == "auxiliary_k" and config.aux_coefficient > 0:
        loss = functools.partial(
            auxiliary_loss,
            x=x,
            error=error,
            row_weights=row_weights,
            k_aux=config.k_aux,
            coefficient=config.aux_coefficient,
            mesh=mesh,
        )
        return add_gradient_of_dead(loss, gradient, sae, idle, is_dead, [min(N_REVIVED, sae.d_sae)])
    if config.revival == "ghost":
        is_dead = is_dead | (number < config.ghost_all_steps)
        if config.ghost_until is not None:
            is_dead = is_dead & (number < config.ghost_until)
        share = 1.0 if config.ghost_variant == "original" else jnp.mean(is_dead)
        loss = functools.partial(
            ghost_loss,
            x=x,
            error=error,
            row_weights=row_weights,
            weight=share,
            activation=config.ghost_activation,
            norm=config.ghost_norm,
        )
        sizes = sorted({max(1, sae.d_sae // part) for part in (16, 4, 1)})
        if mesh is not None:
            # Gathered latents go to every device; all of them, where more are dead, stay where they are.
            sizes = sorted({min(N_REVIVED, sae.d_sae), sae.d_sae})
        reaches = config.ghost_variant != "dead_only_rescaled"
        return add_gradient_of_dead(loss, gradient, sae, idle, is_dead, sizes, reaches_b_dec=reaches)
    return gradient, jnp.zeros(())


def _to_restart(
    config: TrainConfig,
    idle: Int[Array, "d_sae"],
    is_dead: Bool[Array, "d_sae"],
    n_rows: int,
    number: Array | int,
) -> Bool[Array, "d_sae"]:
    """Which latents start again after this step: no more than there are rows to draw from."""
    if config.revival == "resample":
        chosen = is_dead & ((jnp.asarray(number) + 1) % config.resample_every == 0)
    else:
        chosen = longest_dead(idle, is_dead, N_LAZY)
    is_early = jnp.asarray(number) + 1 < config.n_steps - config.decay_share * config.n_steps
    return chosen & is_early & (jnp.cumsum(chosen) <= n_rows)


def _counted(config: TrainConfig, window: FiringWindow, firings: Array, n_rows: int) -> FiringWindow:
    n_rows = window.n_rows + n_rows
    firings = window.firings + firings
    is_whole = n_rows >= config.frequency_window
    return FiringWindow(
        n_rows=jnp.where(is_whole, 0, n_rows),
        firings=jnp.where(is_whole, 0, firings),
        frequency=jnp.where(is_whole, firings / n_rows, window.frequency),
    )

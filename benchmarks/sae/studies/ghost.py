"""Are ghost gradients better when they are rescaled by the share of dead latents, and as good as resampling?

In runs as short as these next to nothing dies by itself. So half of the latents start dead: their encoder biases are so
low that no activation reaches them, as an L1 that was too strong at first would leave them. What a method must do is
bring them to life without harm to the others. More than there are rows in a batch would be no fair trial of resampling,
which gives each an input of its own.

All methods have the same strengths of L1, and are compared on their curves over L0.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.drawing import COLOURS, panels, points_over_l0, save
from benchmarks.sae.studies.comparison import by_seed, difference, estimate, table
from benchmarks.sae.studies.groups import Group
from benchmarks.sae.studies.setting import Judge
from interp_jax.sae import SweepRun, TrainConfig
from interp_jax.sae.step import METRICS, TrainState, finished, initial_state, knobs_of, step

D_SAE = 512
DEAD_AT_START = 1 / 2
"""Share of the latents; 256 are left, two for each of the coordinates of an activation."""
LOW = -10.0
"""Their encoder bias. Normalised activations have a norm of 11, and at most half of it along a first direction."""
METHODS: dict[str, dict[str, Any]] = {
    "nothing done": {"dead_latents": "none"},
    "ghost, original": {"dead_latents": "ghost", "ghost_variant": "original"},
    "ghost, rescaled": {"dead_latents": "ghost", "ghost_variant": "rescaled"},
    "ghost, dead only rescaled": {"dead_latents": "ghost", "ghost_variant": "dead_only_rescaled"},
    # Five times before the learning rate decays. What dies of one time is known to be dead by the next: after 98 steps.
    "resampling": {"dead_latents": "resample", "resample_every": 160},
    "lazy re-initialisation": {"dead_latents": "lazy"},
}
L1S = (2.0, 4.0)
DRAWN_L1 = 2.0
"""Of the runs whose training is drawn."""
HIGHEST_DRAWN = 2.0
"""FVU; where a run breaks down it may be over a hundred for some steps."""
SEEDS = (0, 1, 2)
L0S = (8.0,)
"""Where the methods are compared."""
PAIRS = (
    ("ghost, rescaled", "ghost, original"),
    ("ghost, rescaled", "resampling"),
    ("ghost, dead only rescaled", "resampling"),
    ("ghost, dead only rescaled", "nothing done"),
    ("resampling", "nothing done"),
    ("lazy re-initialisation", "resampling"),
)
"""What is compared seed by seed."""
MEASURES = ("fvu", "loss_recovered", "dead_share")


def groups() -> list[Group]:
    """What is trained."""
    common: dict[str, Any] = {"learning_rate": 1e-2, "sparsity_warmup_share": 0.0, "dead_after": 50_000}
    found = []
    for (method, changes), seed, l1 in itertools.product(METHODS.items(), SEEDS, L1S):
        config = TrainConfig(128, D_SAE, "relu", n_steps=1200, seed=seed, l1_coefficient=l1, **common, **changes)
        found.append(Group(method, (config,), (DEAD_AT_START, LOW)))
    return found


def train(group: Group, batches: Callable[[int], Any], directory: pathlib.Path) -> list[SweepRun]:
    """Trains a group of one from the start that its method has.

    Args:
        group: the group.
        batches: by step.
        directory: not used; a run takes seconds.
    """
    (config,) = group.configs
    # One compiled step for all seeds and all strengths of L1, which are data to it.
    run_step = _compiled(dataclasses.replace(config, seed=0, l1_coefficient=1.0))
    state = jax.jit(functools.partial(initial_state, config))(jnp.asarray(batches(0)), knobs_of(config))
    state = partly_dead(state, config, *group.start)
    history = []
    for number in range(config.n_steps):
        state, metrics = run_step(state, jnp.asarray(batches(number)), number)
        if (number + 1) % config.log_every == 0:
            history.append({"step": number + 1, **dict(zip(METRICS, map(float, metrics), strict=True))})
    return [SweepRun(config, finished(state), history)]


def partly_dead(state: TrainState, config: TrainConfig, share: float, bias: float) -> TrainState:
    """The state with a part of its latents dead, and known to be.

    Args:
        state: before the first step.
        config: of the run.
        share: how many of the latents are to be dead.
        bias: their encoder bias.
    """
    is_dead = jnp.arange(config.d_sae) < round(share * config.d_sae)
    b_enc = jnp.where(is_dead, bias, state.sae.b_enc[...])
    return dataclasses.replace(
        state,
        sae=state.sae.replace(b_enc=b_enc),
        idle=jnp.where(is_dead, 2 * config.dead_after, state.idle).astype(jnp.int32),
    )


@functools.lru_cache
def _compiled(config: TrainConfig) -> Callable[..., Any]:
    return jax.jit(functools.partial(step, config), donate_argnums=0)


def judged(judge: Judge, run: SweepRun) -> dict[str, Any]:
    """What is to be known of a run, and its dead latents as training went on."""
    dying = [[line["step"], line["dead_share"], line["fvu"]] for line in run.history]
    return {**judge.judge(run.sae), "dead_share": judge.dead_share(run.sae), "step_dead_share_fvu": dying}


def report(runs: list[dict[str, Any]]) -> str:
    """Draws the figure, and gives the tables.

    Args:
        runs: all runs.
    """
    draw(runs)
    names = ("FVU", "loss recovered", "dead share")
    rows = [
        (method, f"{l1:g}", *(estimate(run[name] for run in _of(runs, method, l1)) for name in ("l0", *MEASURES)))
        for method, l1 in itertools.product(METHODS, L1S)
    ]
    parts = [
        f"Mean ± standard error over {len(SEEDS)} seeds",
        table(("method", "L1", "L0", *names), rows),
    ]
    for l0 in L0S:
        found = {name: by_seed(runs, lambda run: run["method"], name, l0) for name in MEASURES}
        means = [(method, *(estimate(found[name][method]) for name in MEASURES)) for method in METHODS]
        differences = [
            (f"{one} less {other}", *(difference(found[name][one], found[name][other]).with_interval for name in found))
            for one, other in PAIRS
        ]
        parts += [
            f"At L0 {l0:g}: mean ± standard error over {len(SEEDS)} seeds",
            table(("method", *names), means),
            f"At L0 {l0:g}: differences seed by seed, and 95 % intervals",
            table(("", *names), differences),
        ]
    return "\n\n".join(parts)


def draw(runs: list[dict[str, Any]]) -> None:
    """The figure: what comes out over L0, and how it came about over the steps of training.

    Args:
        runs: all runs.
    """
    figure, axes = panels(3)
    for series, method in enumerate(METHODS):
        points = [_of(runs, method, l1) for l1 in L1S]
        l0s, values = ([[run[name] for run in same] for same in points] for name in ("l0", "fvu"))
        points_over_l0(axes[0], l0s, values, series, label=method)
        # Each seed by itself: some break down, each at a step of its own.
        curves = [np.asarray(run["step_dead_share_fvu"]) for run in _of(runs, method, DRAWN_L1)]
        for curve, (place, column) in itertools.product(curves, ((1, 2), (2, 1))):
            axes[place].plot(curve[:, 0], curve[:, column], color=COLOURS[series], linewidth=0.9)
    labels = ("fraction of variance unexplained", "fraction of variance unexplained", "share of latents that are dead")
    in_training = f"in training (L1 {DRAWN_L1:g})"
    titles = ("held-out, after training", f"of batches, {in_training}", in_training)
    for one, label, title in zip(axes, labels, titles, strict=True):
        one.set_xlabel("L0 (active latents a token)" if one is axes[0] else "training step")
        one.set_ylabel(label)
        one.set_title(title, fontsize=10)
    axes[1].set_yscale("log")
    axes[1].set_ylim(0.2, HIGHEST_DRAWN)
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(figure, "ghost")


def _of(runs: list[dict[str, Any]], method: str, l1: float) -> list[dict[str, Any]]:
    return [run for run in runs if run["method"] == method and run["l1_coefficient"] == l1]

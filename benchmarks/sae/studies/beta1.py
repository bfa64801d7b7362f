"""Is Adam with beta1 = 0 no worse than with 0.9? Without that moment an optimiser takes half the memory.

ReLU autoencoders at three strengths of L1 and TopK autoencoders at one k, each at three learning rates, so that each
beta1 is judged at its own best one. Nothing is done about dead latents: whether the optimiser makes them is part of
the question.
"""

import itertools
import math
from typing import Any

from benchmarks.drawing import panels, points_over_l0, save
from benchmarks.sae.studies.comparison import by_seed, difference, estimate, table
from benchmarks.sae.studies.groups import Group
from benchmarks.sae.studies.setting import Judge
from interp_jax.sae import SweepRun, TrainConfig

BETAS = (0.0, 0.9)
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
L1S = (1.0, 2.0, 4.0)
D_SAE = 512
K = 16
SEEDS = (0, 1, 2)
L0 = 8.0
"""Where ReLU autoencoders are compared."""
MEASURES = ("fvu", "loss_recovered", "dead_share")


def groups() -> list[Group]:
    """What is trained."""
    relu, topk = [], []
    for seed, beta1 in itertools.product(SEEDS, BETAS):
        common: dict[str, Any] = {"beta1": beta1, "seed": seed, "dead_latents": "none", "n_steps": 2000}
        grid = (
            TrainConfig(128, D_SAE, "relu", learning_rate=rate, l1_coefficient=l1, **common)
            for rate, l1 in itertools.product(LEARNING_RATES, L1S)
        )
        relu.append(Group(f"beta1={beta1} relu", tuple(grid)))
        rates = (TrainConfig(128, D_SAE, "topk", k=K, learning_rate=rate, **common) for rate in LEARNING_RATES)
        topk.append(Group(f"beta1={beta1} topk", tuple(rates)))
    return [*relu, *topk]


def judged(judge: Judge, run: SweepRun) -> dict[str, Any]:
    """What is to be known of a run."""
    return {"beta1": run.config.beta1, **judge.judge(run.sae), "dead_share": judge.dead_share(run.sae)}


def report(runs: list[dict[str, Any]]) -> str:
    """Draws the figure, and gives the tables.

    Args:
        runs: all runs.
    """
    draw(runs)
    parts = []
    for kind, l0 in (("relu", L0), ("topk", None)):
        of_kind = [run for run in runs if run["architecture"] == kind]
        where = f"ReLU, at L0 {L0:g}" if kind == "relu" else f"TopK, k {K}"
        found = {name: by_seed(of_kind, _method, name, l0) for name in MEASURES}
        rows = [
            (f"{beta1:g}", f"{rate:g}", *(estimate(found[name][beta1, rate]) for name in MEASURES))
            for beta1, rate in itertools.product(BETAS, LEARNING_RATES)
        ]
        # Each beta1 at the learning rate where its FVU is least.
        best = {
            beta1: min(
                (rate for rate in LEARNING_RATES if not math.isnan(estimate(found["fvu"][beta1, rate]).mean)),
                key=lambda rate, beta1=beta1: estimate(found["fvu"][beta1, rate]).mean,
            )
            for beta1 in BETAS
        }
        pairs = [(f"both at {rate:g}", rate, rate) for rate in LEARNING_RATES]
        pairs.append((f"each at its best, {best[0.0]:g} and {best[0.9]:g}", best[0.0], best[0.9]))
        differences = [
            (what, *(difference(found[name][0.0, one], found[name][0.9, other]).with_interval for name in MEASURES))
            for what, one, other in pairs
        ]
        names = ("FVU", "loss recovered", "dead share")
        parts += [
            f"{where}: mean ± standard error over {len(SEEDS)} seeds",
            table(("beta1", "learning rate", *names), rows),
            f"{where}: beta1 = 0 less beta1 = 0.9, seed by seed, and 95 % intervals",
            table(("learning rate", *names), differences),
        ]
    return "\n\n".join(parts)


def draw(runs: list[dict[str, Any]]) -> None:
    """The figure: curves over L0, and TopK over the learning rate.

    Args:
        runs: all runs.
    """
    figure, axes = panels(3)
    styles = dict(zip(LEARNING_RATES, (":", "--", "-"), strict=True))
    for place, measure in ((0, "fvu"), (1, "loss_recovered")):
        for (series, beta1), rate in itertools.product(enumerate(BETAS), LEARNING_RATES):
            points = [
                [run for run in runs if _method(run) == (beta1, rate) and run["l1_coefficient"] == l1 and
                 run["architecture"] == "relu"]
                for l1 in L1S
            ]  # fmt: skip
            l0s, values = ([[run[name] for run in one] for one in points] for name in ("l0", measure))
            label = f"beta1 {beta1:g}, learning rate {rate:g}"
            points_over_l0(axes[place], l0s, values, series, linestyle=styles[rate], label=label)
        axes[place].set_xlabel("L0 (active latents a token)")
    axes[0].set_ylabel("fraction of variance unexplained")
    axes[0].set_title("ReLU with L1: reconstruction", fontsize=10)
    axes[1].set_ylabel("loss recovered, of the zero ablation's")
    axes[1].set_title("ReLU with L1: the model's loss", fontsize=10)
    axes[0].legend(fontsize=7)
    topk = by_seed([run for run in runs if run["architecture"] == "topk"], _method, "fvu")
    for series, beta1 in enumerate(BETAS):
        values = [topk[beta1, rate] for rate in LEARNING_RATES]
        rates = [[rate] * len(SEEDS) for rate in LEARNING_RATES]
        points_over_l0(axes[2], rates, values, series, label=f"beta1 {beta1:g}")
    axes[2].set_xlabel("learning rate")
    axes[2].set_ylabel("fraction of variance unexplained")
    axes[2].set_title(f"TopK, k = {K}: reconstruction", fontsize=10)
    axes[2].legend(fontsize=8)
    save(figure, "beta1")


def _method(run: dict[str, Any]) -> tuple[float, float]:
    return run["beta1"], run["learning_rate"]

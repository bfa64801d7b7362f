"""Is a dictionary that was trained at a higher L0 the better one at a low L0 at test time?

The encoder is thrown away: gradient pursuit picks the codes, at L0s of its own. Beside it stand the encoder's largest
codes at the same L0s, and the encoder's own codes.
"""

import functools
import itertools
from typing import Any

from benchmarks.drawing import panels, points_over_l0, save
from benchmarks.sae.studies.comparison import difference, estimate, table
from benchmarks.sae.studies.groups import Group
from benchmarks.sae.studies.setting import Judge, largest, pursued
from interp_jax.sae import SweepRun, TrainConfig

L1S = (0.5, 1.0, 2.0, 4.0)
TEST_L0S = (4, 8, 16)
SEEDS = (0, 1, 2)
MEASURES = {"fvu": "FVU", "loss_recovered": "loss recovered"}


def groups() -> list[Group]:
    """What is trained."""
    common: dict[str, Any] = {"learning_rate": 1e-2, "n_steps": 1200, "dead_latents": "lazy"}
    found = []
    for seed in SEEDS:
        configs = (TrainConfig(128, 1024, "relu", l1_coefficient=l1, seed=seed, **common) for l1 in L1S)
        found.append(Group("relu", tuple(configs)))
    return found


def judged(judge: Judge, run: SweepRun) -> dict[str, Any]:
    """What is to be known of a run."""
    found: dict[str, Any] = {**judge.judge(run.sae), "dead_share": judge.dead_share(run.sae)}
    for way, code in (("pursuit", pursued), ("largest", largest)):
        found[way] = {f"{l0}": judge.judge(run.sae, functools.partial(code, l0=l0)) for l0 in TEST_L0S}
    return found


def report(runs: list[dict[str, Any]]) -> str:
    """Draws the figure, and gives the tables.

    Args:
        runs: all runs.
    """
    draw(runs)
    parts = []
    for way, name in (("pursuit", "gradient pursuit"), ("largest", "the encoder's largest codes")):
        for measure, label in MEASURES.items():
            rows = []
            for l1, same in _by_l1(runs).items():
                cells = [estimate(run[way][f"{l0}"][measure] for run in same) for l0 in TEST_L0S]
                rows.append((f"{l1:g}", f"{estimate(run['l0'] for run in same).mean:.1f}", *cells))
            title = f"{name}: {label}, mean ± standard error over {len(SEEDS)} seeds"
            parts += [title, table(("L1", "own L0", *(f"at {l0}" for l0 in TEST_L0S)), rows)]
    for measure, label in MEASURES.items():
        title = f"gradient pursuit: {label} less that of the dictionary trained at L1 {L1S[-1]:g}"
        parts += [f"{title}, seed by seed, and 95 % intervals", differences(runs, measure)]
    return "\n\n".join(parts)


def differences(runs: list[dict[str, Any]], measure: str) -> str:
    """Every dictionary beside the one that was trained at the lowest L0, by gradient pursuit.

    Args:
        runs: all runs.
        measure: which.
    """
    values = {
        (l1, l0): [run["pursuit"][f"{l0}"][measure] for run in same]
        for (l1, same), l0 in itertools.product(_by_l1(runs).items(), TEST_L0S)
    }
    rows = [
        (f"{l1:g}", *(difference(values[l1, l0], values[L1S[-1], l0]).with_interval for l0 in TEST_L0S))
        for l1 in L1S[:-1]
    ]
    return table(("L1", *(f"at {l0}" for l0 in TEST_L0S)), rows)


def draw(runs: list[dict[str, Any]]) -> None:
    """The figure: over the L0 in training, a line an L0 at test time.

    Args:
        runs: all runs.
    """
    figure, axes = panels(2)
    points = list(_by_l1(runs).values())
    l0s = [[run["l0"] for run in same] for same in points]
    for one, measure in zip(axes, MEASURES, strict=True):
        for series, l0 in enumerate(TEST_L0S):
            for way, line in (("pursuit", "-"), ("largest", ":")):
                values = [[run[way][f"{l0}"][measure] for run in same] for same in points]
                name = f"{l0} codes a token" if way == "pursuit" else None
                points_over_l0(one, l0s, values, series, linestyle=line, label=name)
        one.set_xlabel("L0 in training (active latents a token)")
    axes[0].set_ylabel("fraction of variance unexplained")
    axes[1].set_ylabel("loss recovered, of the zero ablation's")
    axes[0].plot([], [], color="#555555", label="found by gradient pursuit")
    axes[0].plot([], [], color="#555555", linestyle=":", label="the encoder's largest")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save(figure, "test_time_l0")


def _by_l1(runs: list[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Runs by the strength of L1, those of one strength in the order of their seeds."""
    return {l1: sorted((run for run in runs if run["l1_coefficient"] == l1), key=lambda run: run["seed"]) for l1 in L1S}

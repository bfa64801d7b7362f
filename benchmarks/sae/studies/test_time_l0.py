"""Is a dictionary that was trained at a higher L0 the better one at a low L0 at test time?

The encoder is thrown away: gradient pursuit picks the codes, at L0s of its own. Beside it stand the encoder's largest
codes at the same L0s, and the encoder's own codes.
"""

import functools
from typing import Any

from benchmarks.sae.studies.comparison import difference, estimate, table
from benchmarks.sae.studies.drawing import panels, points_over_l0, save
from benchmarks.sae.studies.groups import Group
from benchmarks.sae.studies.setting import Judge, largest, pursued
from interp_jax.sae import SweepRun, TrainConfig

KS = (4, 8, 16, 32)
L1S = (0.5, 1.0, 2.0, 4.0)
TEST_L0S = (2, 4, 8, 16, 32)
DRAWN_L0S = (4, 8, 16, 32)
SEEDS = (0, 1, 2)
MEASURES = {"fvu": "FVU", "loss_recovered": "loss recovered"}


def groups() -> list[Group]:
    """What is trained."""
    # Lazy re-initialisation for both kinds, so that they differ in nothing else.
    common: dict[str, Any] = {"learning_rate": 1e-2, "n_steps": 1200, "dead_latents": "lazy"}
    found = []
    for seed in SEEDS:
        relu = tuple(TrainConfig(128, 1024, "relu", l1_coefficient=l1, seed=seed, **common) for l1 in L1S)
        topk = [TrainConfig(128, 1024, "topk", k=k, seed=seed, **common) for k in KS]
        found += [Group("relu", relu), *(Group(f"topk {config.k}", (config,)) for config in topk)]
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
    for kind, strength in (("topk", "k"), ("relu", "l1_coefficient")):
        for way, name in (("pursuit", "gradient pursuit"), ("largest", "the encoder's largest codes")):
            for measure, label in MEASURES.items():
                rows = []
                for trained, same in _of_kind(runs, kind, strength).items():
                    cells = [estimate(run[way][f"{l0}"][measure] for run in same) for l0 in TEST_L0S]
                    rows.append((f"{trained:g}", f"{estimate(run['l0'] for run in same).mean:.1f}", *cells))
                header = (strength, "own L0", *(f"at {l0}" for l0 in TEST_L0S))
                parts += [
                    f"{kind}, {name}: {label}, mean ± standard error over {len(SEEDS)} seeds",
                    table(header, rows),
                ]
    for measure, label in MEASURES.items():
        what = f"TopK, gradient pursuit: {label} less that of the dictionary trained at the L0 of the test"
        parts += [f"{what}, seed by seed, and 95 % intervals", differences(runs, measure)]
    return "\n\n".join(parts)


def differences(runs: list[dict[str, Any]], measure: str) -> str:
    """At each L0 at test time, every dictionary beside the one that was trained at that L0, by gradient pursuit.

    Args:
        runs: all runs.
        measure: which.
    """
    of_k = _of_kind(runs, "topk", "k")
    rows = []
    for l0 in (l0 for l0 in TEST_L0S if l0 in of_k):
        values = {k: [run["pursuit"][f"{l0}"][measure] for run in same] for k, same in of_k.items()}
        cells = ["" if k == l0 else difference(values[k], values[l0]).with_interval for k in KS]
        rows.append((l0, *cells))
    return table(("at test time", *(f"trained at {k}" for k in KS)), rows)


def draw(runs: list[dict[str, Any]]) -> None:
    """The figure: over the L0 in training, a line an L0 at test time.

    Args:
        runs: all runs.
    """
    figure, axes = panels(3)
    places = (("topk", "k", "fvu"), ("topk", "k", "loss_recovered"), ("relu", "l1_coefficient", "loss_recovered"))
    for one, (kind, strength, measure) in zip(axes, places, strict=True):
        points = list(_of_kind(runs, kind, strength).values())
        l0s = [[run["l0"] for run in same] for same in points]
        for series, l0 in enumerate(DRAWN_L0S):
            for way, line in (("pursuit", "-"), ("largest", ":")):
                values = [[run[way][f"{l0}"][measure] for run in same] for same in points]
                name = f"{l0} codes a token" if way == "pursuit" else None
                points_over_l0(one, l0s, values, series, linestyle=line, label=name)
        one.set_xlabel("L0 in training (active latents a token)")
        one.set_ylabel(
            "fraction of variance unexplained" if measure == "fvu" else "loss recovered, of the zero ablation's"
        )
        kind_name = "TopK" if kind == "topk" else "ReLU with L1"
        one.set_title(f"{kind_name}: {'reconstruction' if measure == 'fvu' else 'the model’s loss'}", fontsize=10)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].plot([], [], color="#555555", label="found by gradient pursuit")
    axes[0].plot([], [], color="#555555", linestyle=":", label="the encoder's largest")
    axes[0].legend(fontsize=7, title="at test time", title_fontsize=7)
    save(figure, "test_time_l0")


def _of_kind(runs: list[dict[str, Any]], kind: str, strength: str) -> dict[float, list[dict[str, Any]]]:
    """Runs of a kind by what makes them sparse, those of one value in the order of their seeds."""
    found: dict[float, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run[strength], run["seed"])):
        if run["architecture"] == kind:
            found.setdefault(run[strength], []).append(run)
    return found

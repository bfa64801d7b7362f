"""Whether the bound on what was missed holds on SmolLM2, and which search finds the largest effects for how much.

    python -m benchmarks.attribution.verification_study, where the extra `demo` is installed

The ten prompt pairs of `benchmarks.attribution.study`; nodes: whole attention heads, 270 of them. Every node is
patched, so the truth is known. The bound: the first 64 nodes of AtP*'s list are taken as verified and the rest is
bounded from 128 random subsets, p = 0.1, with three seeds; it holds if the largest true effect of the rest is not above
it. The searches: the share of the 20 largest effects that each has verified, by the passes that it has cost; AtP* is
charged with all its passes.
"""

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import interp_jax as ij
from benchmarks.attribution.study import pairs
from benchmarks.drawing import panels, save
from benchmarks.instrument.rows import RESULTS
from interp_jax.attribution import (
    Nodes,
    Patching,
    atp,
    atp_star,
    by_score,
    hierarchical,
    in_blocks,
    iterative,
    recall_curve,
    subsampling,
    subset_bound,
)

NODES = [Nodes("attn_heads", by="head")]
TOP = 20
VERIFIED, N_SUBSETS, PROBABILITY, CONFIDENCE, SEEDS = 64, 128, 0.1, 0.95, range(3)
COSTS = np.unique(np.geomspace(5, 700, 120).round().astype(int))
"""Passes at which the curves are read."""


def of_pair(model: Any, pair: Any) -> dict[str, Any]:
    """The searches' curves and the bounds of one pair."""
    patching = Patching(model, pair, NODES)
    exact = patching.of_nodes(np.arange(patching.n_nodes))
    scores = atp_star(model, pair, NODES)
    searches = [
        by_score("AtP*", scores, cost=3 + model.n_layers),
        by_score("AtP", atp(model, pair, NODES), cost=3),
        iterative(patching),
        subsampling(patching),
        in_blocks(patching),
        hierarchical(patching),
    ]
    curves = {search.name: _at_costs(list(recall_curve(search, exact, TOP))) for search in searches}
    rest = np.argsort(-np.abs(scores.flat), kind="stable")[VERIFIED:]
    largest = float(np.abs(exact[rest]).max())
    bounds = [
        subset_bound(
            patching, rest, n_subsets=N_SUBSETS, probability=PROBABILITY, confidence=CONFIDENCE, seed=seed
        ).bound
        for seed in SEEDS
    ]
    sizes = {"n_nodes": patching.n_nodes, "largest": float(np.abs(exact).max()), "largest_left": largest}
    return {**sizes, "bounds": bounds, "curves": curves}


def _at_costs(steps: list[tuple[int, float]]) -> list[float]:
    """The share that is verified at each of the costs."""
    costs, shares = map(np.asarray, zip(*steps, strict=True))
    place = np.searchsorted(costs, COSTS, side="right")
    return np.concatenate([[0.0], shares])[place].tolist()


def draw(rows: list[dict[str, Any]]) -> None:
    """The mean curves."""
    figure: Figure
    figure, (axes,) = panels(1)
    for name in rows[0]["curves"]:
        axes.plot(COSTS, np.mean([row["curves"][name] for row in rows], axis=0), label=name)
    axes.set_xscale("log")
    axes.set_xlabel("passes")
    axes.set_ylabel(f"share of the {TOP} largest effects verified")
    axes.legend(frameon=False, fontsize=8)
    save(figure, "attribution_searches")


def main() -> None:
    """Prints what came out, writes it as JSON and draws the figure."""
    model = ij.load("smollm2")
    rows: list[dict[str, Any]] = []
    for pair in pairs(model):
        rows.append({"pair": "".join(pair.labels), **of_pair(model, pair)})
        bounds = ", ".join(f"{bound:.2f}" for bound in rows[-1]["bounds"])
        print(f"{rows[-1]['pair']}: {rows[-1]['largest_left']:.3f} left at most, bounds {bounds}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        content = {"top": TOP, "costs": COSTS.tolist(), "rows": rows}
        (RESULTS / "attribution_verification.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shares = [bound / row["largest_left"] for row in rows for bound in row["bounds"]]
    held = sum(share >= 1 for share in shares)
    print(f"the bound held in {held} of {len(shares)}; bound / largest left, median {np.median(shares):.2f}")
    for name in rows[0]["curves"]:
        mean = np.mean([row["curves"][name] for row in rows], axis=0)
        reached = [int(COSTS[np.argmax(mean >= share)]) if mean[-1] >= share else None for share in (0.5, 0.9, 1.0)]
        print(f"{name}: half, nine tenths and all of the {TOP} by {reached} passes")
    draw(rows)


if __name__ == "__main__":
    main()

"""How well AtP and AtP* rank nodes on SmolLM2, beside exhaustive patching, on ten prompt pairs.

    python -m benchmarks.attribution.study, where the extra `demo` is installed

Nodes: whole heads of q, k and attn_heads, and mlp_out by position. Pairs: five of indirect objects, five of capitals.
For each method: the correlation of its sizes with the exact ones, and of the ranks; how many of the exact top 20 are
not among its own top 40 (false negatives); and the least share of its list that holds the whole exact top 20.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

import interp_jax as ij
from benchmarks.instrument.rows import RESULTS
from interp_jax.attribution import Effects, Nodes, PromptPair, activation_patching, atp, atp_star, prompt_pair
from interp_jax.models.language_model import LanguageModel

NODES = [Nodes("q", by="head"), Nodes("k", by="head"), Nodes("attn_heads", by="head"), Nodes("mlp_out")]
TOP, WITHIN = 20, 40
_NAMES = (("Mary", "John"), ("Tom", "Anna"), ("Peter", "Kate"), ("James", "Sarah"), ("Paul", "Alice"))
_CAPITALS = (("France", "Italy", "Paris", "Rome"), ("Japan", "China", "Tokyo", "Beijing"),
             ("Germany", "Spain", "Berlin", "Madrid"), ("Russia", "England", "Moscow", "London"),
             ("Greece", "Egypt", "Athens", "Cairo"))  # fmt: skip


def pairs(model: LanguageModel) -> list[PromptPair]:
    """The ten pairs."""
    found = []
    for one, other in _NAMES:
        text = f"When {one} and {other} went to the store, {{}} gave a drink to"
        found.append(prompt_pair(model, text.format(other), text.format(one), answer=f" {one}", wrong=f" {other}"))
    for country, another, capital, wrong in _CAPITALS:
        text = "The capital city of {} is called"
        found.append(
            prompt_pair(model, text.format(country), text.format(another), answer=f" {capital}", wrong=f" {wrong}")
        )
    return found


def judged(exact: Effects, estimate: Effects) -> dict[str, float]:
    """What the module's docstring lists."""
    true, guessed = np.abs(exact.flat), np.abs(estimate.flat)
    true_ranks, guessed_ranks = (np.argsort(np.argsort(each, kind="stable")) for each in (true, guessed))
    top = np.argsort(-true, kind="stable")[:TOP]
    place = np.argsort(np.argsort(-guessed, kind="stable"))[top]
    return {
        "rank_correlation": float(np.corrcoef(true_ranks, guessed_ranks)[0, 1]),
        "correlation": float(np.corrcoef(true, guessed)[0, 1]),
        "false_negatives": int((place >= WITHIN).sum()),
        "share_for_all": float((place.max() + 1) / len(true)),
    }


def main() -> None:
    """Prints the table and writes it as JSON."""
    model = ij.load("smollm2")
    rows: list[dict[str, Any]] = []
    for pair in pairs(model):
        exact = activation_patching(model, pair, NODES)
        estimates = {
            "AtP": atp(model, pair, NODES),
            "AtP, QK fix": atp_star(model, pair, NODES, grad_drop=False),
            "AtP, GradDrop": atp_star(model, pair, NODES, qk_fix=False),
            "AtP*": atp_star(model, pair, NODES),
        }
        what = f"{''.join(pair.labels)} -> {model.tokenizer.decode([pair.answer or 0])}"
        rows += [{"pair": what, "method": name, **judged(exact, each)} for name, each in estimates.items()]
        of_pair = [f"{row['method']}: {row['false_negatives']}, {row['correlation']:.3f}" for row in rows[-4:]]
        print(what, *of_pair, sep="; ", flush=True)
    means = _means(rows)
    for name, each in means.items():
        print(f"{name:<14}", *(f"{key} {value:.3f}" for key, value in each.items()))
    RESULTS.mkdir(exist_ok=True)
    content = {"top": TOP, "within": WITHIN, "means": means, "rows": rows}
    (RESULTS / "attribution_study.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    keys = ("rank_correlation", "correlation", "false_negatives", "share_for_all")
    names = dict.fromkeys(row["method"] for row in rows)
    return {
        name: {key: float(np.mean([row[key] for row in rows if row["method"] == name])) for key in keys}
        for name in names
    }


if __name__ == "__main__":
    main()

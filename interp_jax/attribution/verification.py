"""What a ranking may have missed: a bound from random subsets, exact verification down the list, and other searches.

Estimates say where to look; only patching says what is there. `verify` patches nodes one by one in the order of their
estimates and bounds what is left, so that the list can be called complete down to an effect size.

The bound (Kramár, Lieberum, Shah, Nanda 2024, arXiv 2403.00745). Random subsets of the nodes that are not verified,
each node in with probability p, are patched jointly. A node's effect is estimated by the mean over the subsets with it
less the mean over those without; the spread within both gives its standard error. The bound is the largest over the
nodes of |estimate| + t * standard error, t being the one-sided quantile at the confidence. No correction for the number
of nodes is due: if some node's effect is above the bound, then *that node's own* interval failed, whose chance is at
most 1 - confidence (an intersection-union test).

**Assumption**, printed with every bound: averaged over the subsets, a node changes the metric as much as it does alone.
Where nodes cancel or saturate each other, or one lies on the other's path (a later layer's node that is patched too no
longer passes on what an earlier one did), joint effects are biased, and the bound is of the biased quantity. A small p
patches few nodes beside a node and biases less; it needs more subsets.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit

from interp_jax.attribution.nodes import Effects, NodeEffect

__all__ = [
    "ASSUMPTION", "Patches", "Search", "SubsetBound", "Verification", "by_score", "hierarchical", "in_blocks",
    "iterative", "recall_curve", "subsampling", "subset_bound", "verify",
]  # fmt: skip

ASSUMPTION = (
    "assuming that, averaged over the random subsets, a node changes the metric as much as it does alone (joint "
    "effects unbiased for the node's own)"
)


@runtime_checkable
class Patches(Protocol):
    """What is asked of a `Patching`."""

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        ...

    def of_nodes(self, numbers: Any, advance: Any = None) -> Float[np.ndarray, "n"]:
        """The effect of each node by itself."""
        ...

    def of_sets(self, sets: Any, advance: Any = None) -> Float[np.ndarray, "n_sets"]:
        """The effect of each set of nodes, patched jointly."""
        ...


@dataclasses.dataclass(frozen=True)
class SubsetBound:
    """An upper bound on the largest |effect| among some nodes, with what it is from."""

    bound: float
    """The bound, in the metric's units; infinite where some node was in too few subsets to tell."""
    confidence: float
    """The chance, at least, that it holds under the assumption."""
    nodes: Int[np.ndarray, "n"]
    """The nodes that it is about, by number."""
    estimates: Float[np.ndarray, "n"]
    """Of each node's effect."""
    standard_errors: Float[np.ndarray, "n"]
    """Of the estimates."""
    n_subsets: int
    """How many subsets were patched."""
    probability: float
    """With which a node is in a subset."""

    def __str__(self) -> str:
        return (
            f"None of {len(self.nodes):,} unverified nodes has an effect of more than {self.bound:.4g} in size, at "
            f"{self.confidence:.1%} confidence, {ASSUMPTION}. From {self.n_subsets:,} subsets with p = "
            f"{self.probability:g}."
        )


def subset_bound(
    patching: Patches,
    nodes: Int[np.ndarray, "n"] | None = None,
    *,
    n_subsets: int = 256,
    probability: float = 0.1,
    confidence: float = 0.95,
    seed: int = 0,
    advance: Callable[[int], Any] | None = None,
) -> SubsetBound:
    """Bounds the largest effect among nodes by patching random subsets of them.

    Args:
        patching: what patches sets of nodes, a `Patching`.
        nodes: the nodes, by number; None for all.
        n_subsets: how many subsets.
        probability: with which a node is in a subset.
        confidence: the chance that the bound holds.
        seed: of the draw.
        advance: called with the number of subsets as they are done.

    Returns:
        The bound.

    Raises:
        ValueError: for a probability or confidence outside (0, 1), fewer than four subsets, or no nodes.
    """
    _check_draws(n_subsets, probability, confidence)
    chosen = np.arange(patching.n_nodes) if nodes is None else np.asarray(nodes)
    if not len(chosen):
        raise ValueError("A bound is on one node at least; nodes= is empty.")
    members = np.random.default_rng(seed).random((n_subsets, len(chosen))) < probability
    sets = np.zeros((n_subsets, patching.n_nodes), bool)
    sets[:, chosen] = members
    effects = np.asarray(patching.of_sets(sets, advance), np.float64)
    estimates, errors, freedom = _contrasts(members, effects)
    with np.errstate(invalid="ignore"):
        upper = np.abs(estimates) + np.maximum(stdtrit(freedom, confidence), 0.0) * errors
    bound = float(np.where(np.isfinite(upper), upper, np.inf).max())
    return SubsetBound(bound, confidence, chosen, estimates, errors, n_subsets, probability)


def _check_draws(n_subsets: int, probability: float, confidence: float) -> None:
    if not (0 < probability < 1 and 0 < confidence < 1):
        raise ValueError(f"probability and confidence lie between 0 and 1, got {probability} and {confidence}.")
    if n_subsets < 4:
        raise ValueError(f"A bound needs at least 4 subsets, got n_subsets={n_subsets}.")


def _contrasts(members: Bool[np.ndarray, "sets n"], effects: Float[np.ndarray, "sets"]) -> tuple[Any, Any, Any]:
    """Mean with less mean without, its standard error, and its degrees of freedom (Welch), for each node."""
    means, of_means, freedoms = [], [], []
    for inside in (members.astype(np.float64), (~members).astype(np.float64)):
        n = inside.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = effects @ inside / n
            squares = (effects**2) @ inside - n * mean**2
            variance = np.maximum(squares, 0.0) / (n - 1)
            means.append(mean)
            of_means.append(np.where(n > 1, variance / n, np.inf))
            freedoms.append(n - 1)
    total = of_means[0] + of_means[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / sum(part**2 / n for part, n in zip(of_means, freedoms, strict=True))
    freedom = np.where(np.isfinite(freedom), freedom, np.minimum(*freedoms))
    return means[0] - means[1], np.sqrt(total), np.maximum(freedom, 1.0)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Exact effects down a list, and what is known of the rest."""

    scores: Effects
    """The estimates that gave the order."""
    verified: dict[int, float]
    """The exact effect of each node that was patched, by its number, in the order of verification."""
    bound: SubsetBound | None
    """On the rest; None where nothing is left."""
    tolerance: float
    """The effect size down to which the list was to be complete."""
    cost: int
    """Patched passes, of nodes and of subsets."""

    @property
    def is_met(self) -> bool:
        """Whether nothing above the tolerance is left, by the bound."""
        return self.bound is None or self.bound.bound <= self.tolerance

    def ranked(self, k: int | None = None) -> list[NodeEffect]:
        """The verified nodes, the largest exact effect first.

        Args:
            k: how many; None for all.
        """
        order = sorted(self.verified, key=lambda number: -abs(self.verified[number]))[:k]
        nodes = [(self.scores.node(number), self.verified[number]) for number in order]
        return [NodeEffect(node, effect, node.in_words(self.scores.labels)) for node, effect in nodes]

    def __str__(self) -> str:
        lines = [f"{row.effect:>+10.4f}  {row.label}" for row in self.ranked(20)]
        end = "Every node was verified." if self.bound is None else str(self.bound)
        return "\n".join([f"{'effect':>10}  node", *lines, f"{self.cost:,} patched passes. {end}"])


def verify(
    patching: Patches,
    scores: Effects,
    *,
    tolerance: float,
    budget: int,
    first: int = 64,
    n_subsets: int = 128,
    probability: float = 0.1,
    confidence: float = 0.95,
    seed: int = 0,
    advance: Callable[[int], Any] | None = None,
) -> Verification:
    """Patches nodes one by one, the largest estimate first, until nothing larger than `tolerance` can be left.

    After `first` nodes, and again whenever twice as many are verified, the rest is bounded by new subsets. The allowed
    error is shared out among these looks (half of it to the first, half of what is left to the next), so that stopping
    at the first one that succeeds is within the confidence.

    Args:
        patching: what patches nodes, a `Patching`.
        scores: the estimates, `atp_star`'s say, of the same nodes.
        tolerance: the effect size that matters.
        budget: patched passes at most, of nodes and subsets.
        first: nodes before the first look.
        n_subsets: subsets of a look.
        probability: with which a node is in a subset.
        confidence: of the bound, over all looks.
        seed: of the draws.
        advance: called with the number of patched passes as they are done.

    Returns:
        What was verified, and the bound on the rest.

    Raises:
        ValueError: if the scores are of other nodes, the budget does not suffice for one look, `first` is less than 1,
            or as for `subset_bound`.
    """
    if len(scores.flat) != patching.n_nodes:
        raise ValueError(f"There are {len(scores.flat)} scores for {patching.n_nodes} nodes; resolve both alike.")
    families = getattr(patching, "families", scores.families)
    if scores.families != families:
        kinds = [", ".join(f"{one.site} by {one.by} in layers {one.layers}" for one in of) for of in
                 (scores.families, families)]  # fmt: skip
        raise ValueError(f"The scores are of {kinds[0]}; what is patched is {kinds[1]}. Resolve both alike.")
    if first < 1:
        raise ValueError(f"first={first}; at least one node must be patched before the first look.")
    _check_draws(n_subsets, probability, confidence)
    if budget < min(first, patching.n_nodes) + n_subsets:
        raise ValueError(f"A budget of {budget} does not suffice for {first} nodes and {n_subsets} subsets.")
    order = np.argsort(-np.abs(scores.flat), kind="stable")
    verified: dict[int, float] = {}
    bound, cost, error = None, 0, 1 - confidence
    goal, look = first, 0
    while True:
        # What is left of the budget must hold one more look, or all the rest.
        room = budget - cost
        rest = len(order) - len(verified)
        count = min(goal - len(verified), rest, room if room >= rest else room - n_subsets)
        if count <= 0:
            break
        batch = order[len(verified) : len(verified) + count]
        verified |= zip(batch.tolist(), map(float, patching.of_nodes(batch, advance)), strict=True)
        cost += count
        if len(verified) == len(order):
            return Verification(scores, verified, None, tolerance, cost)
        error, look = error / 2, look + 1
        bound = subset_bound(
            patching, order[len(verified) :], n_subsets=n_subsets, probability=probability, confidence=1 - error,
            seed=seed + look, advance=advance,
        )  # fmt: skip
        cost += n_subsets
        if bound.bound <= tolerance:
            break
        goal = 2 * len(verified)
    return Verification(scores, verified, bound, tolerance, cost)


@dataclasses.dataclass(frozen=True)
class Search:
    """An order in which nodes are verified, and what it has cost by then."""

    name: str
    """Of the way."""
    order: Int[np.ndarray, "n"]
    """The nodes by number."""
    costs: Int[np.ndarray, "n"]
    """Passes when the node of that place is verified, its own included."""


def by_score(name: str, scores: Effects, cost: int) -> Search:
    """Down a list of estimates.

    Args:
        name: what to call it.
        scores: the estimates.
        cost: passes that they took.
    """
    order = np.argsort(-np.abs(scores.flat), kind="stable")
    return Search(name, order, cost + 1 + np.arange(len(order)))


def iterative(patching: Patches, *, seed: int = 0) -> Search:
    """Every node in a random order.

    Args:
        patching: what patches nodes.
        seed: of the order.
    """
    order = np.random.default_rng(seed).permutation(patching.n_nodes)
    return Search("iterative", order, 1 + np.arange(len(order)))


def subsampling(patching: Patches, *, n_subsets: int = 256, probability: float = 0.1, seed: int = 0) -> Search:
    """Down a list of estimates from random subsets (those of `subset_bound`).

    Args:
        patching: what patches sets of nodes.
        n_subsets: how many subsets.
        probability: with which a node is in a subset.
        seed: of the draw.
    """
    found = subset_bound(patching, n_subsets=n_subsets, probability=probability, seed=seed)
    order = np.argsort(-np.nan_to_num(np.abs(found.estimates)), kind="stable")
    return Search("subsampling", order, n_subsets + 1 + np.arange(len(order)))


def in_blocks(patching: Patches, *, size: int | None = None) -> Search:
    """Blocks of neighbouring nodes are patched jointly; then nodes by the size of their block's effect.

    Args:
        patching: what patches sets of nodes.
        size: nodes of a block; None for the square root of how many there are.

    Raises:
        ValueError: if it is less than 1.
    """
    blocks = _blocks(patching.n_nodes, size)
    effects = np.abs(patching.of_sets(_as_sets(blocks, patching.n_nodes)))
    order = np.concatenate([blocks[number] for number in np.argsort(-effects, kind="stable")])
    return Search("blocks", order, len(blocks) + 1 + np.arange(len(order)))


def hierarchical(patching: Patches, *, size: int | None = None, at_once: int = 16) -> Search:
    """Blocks are patched jointly, those of the largest effect split in two and patched again, down to single nodes.

    Args:
        patching: what patches sets of nodes.
        size: nodes of a first block; None for the square root of how many there are.
        at_once: how many blocks are split before the next look at which are the largest.

    Raises:
        ValueError: if either is less than 1.
    """
    if at_once < 1:
        raise ValueError(f"at_once={at_once}; at least one block must be split at a time.")
    blocks = _blocks(patching.n_nodes, size)
    effects = np.abs(patching.of_sets(_as_sets(blocks, patching.n_nodes)))
    cost = len(blocks)
    queue = [(-float(effect), int(block[0]), block) for effect, block in zip(effects, blocks, strict=True)]
    heapq.heapify(queue)
    order: list[int] = []
    costs: list[int] = []
    while queue:
        halves: list[np.ndarray] = []
        while queue and len(halves) < 2 * at_once:
            _, _, block = heapq.heappop(queue)
            if len(block) == 1:
                order.append(int(block[0]))
                costs.append(cost)
            else:
                halves += [block[: len(block) // 2], block[len(block) // 2 :]]
        if halves:
            effects = np.abs(patching.of_sets(_as_sets(halves, patching.n_nodes)))
            cost += len(halves)
            for effect, half in zip(effects, halves, strict=True):
                heapq.heappush(queue, (-float(effect), int(half[0]), half))
    return Search("hierarchical", np.asarray(order), np.asarray(costs))


def _blocks(n_nodes: int, size: int | None) -> list[np.ndarray]:
    size = max(1, round(math.sqrt(n_nodes))) if size is None else size
    if size < 1:
        raise ValueError(f"size={size}; a block has at least one node.")
    return [np.arange(start, min(start + size, n_nodes)) for start in range(0, n_nodes, size)]


def _as_sets(blocks: list[np.ndarray], n_nodes: int) -> Bool[np.ndarray, "sets n_nodes"]:
    sets = np.zeros((len(blocks), n_nodes), bool)
    for row, block in zip(sets, blocks, strict=True):
        row[block] = True
    return sets


def recall_curve(search: Search, exact: Float[np.ndarray, "n"], k: int) -> Iterator[tuple[int, float]]:
    """How much of the truth a search has verified, by its cost.

    Args:
        search: the search.
        exact: the exact effect of every node.
        k: how many of the largest are wanted.

    Yields:
        The cost and the share of the `k` largest that are verified by then, whenever that rises.
    """
    wanted = set(np.argsort(-np.abs(exact), kind="stable")[:k].tolist())
    found = 0
    for node, cost in zip(search.order.tolist(), search.costs.tolist(), strict=True):
        if node in wanted:
            found += 1
            yield cost, found / k

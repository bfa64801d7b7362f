"""The bound holds as often as it says, and verification does what it says with its budget."""

import numpy as np
import pytest
import scipy.stats
from hand_models import linear_model, pair_of

from interp_jax.attribution.activation_patching import Patching
from interp_jax.attribution.atp import atp
from interp_jax.attribution.nodes import Effects, Family, Nodes
from interp_jax.attribution.verification import (
    ASSUMPTION,
    by_score,
    hierarchical,
    in_blocks,
    iterative,
    recall_curve,
    subsampling,
    subset_bound,
    verify,
)


class Additive:
    """Nodes with known effects that add up."""

    def __init__(self, effects):
        self.effects = np.asarray(effects, float)
        self.n_nodes = len(self.effects)
        self.n_passes = 0

    def of_sets(self, sets, advance=None):
        self.n_passes += len(sets)
        return sets @ self.effects

    def of_nodes(self, numbers, advance=None):
        self.n_passes += len(numbers)
        return self.effects[np.asarray(numbers)]


def scores(values):
    family = Family("neurons", (0,), (len(values),), ("position",), ("position",))
    return Effects([family], [np.asarray(values)[None]])


RNG = np.random.default_rng(0)
HEAVY = RNG.standard_t(2, size=40)


def test_estimates_are_differences_of_means_with_welchs_error():
    patching = Additive(HEAVY)
    found = subset_bound(patching, n_subsets=200, probability=0.2, seed=3)
    members = np.random.default_rng(3).random((200, 40)) < 0.2
    for node in (0, 17):
        inside, outside = (
            patching.effects @ members[members[:, node]].T,
            patching.effects @ members[~members[:, node]].T,
        )
        welch = scipy.stats.ttest_ind(inside, outside, equal_var=False)
        assert found.estimates[node] == pytest.approx(inside.mean() - outside.mean())
        assert found.estimates[node] / found.standard_errors[node] == pytest.approx(welch.statistic, rel=1e-6)
    uppers = []
    for node in range(40):
        inside, outside = (
            patching.effects @ members[members[:, node]].T,
            patching.effects @ members[~members[:, node]].T,
        )
        freedom = scipy.stats.ttest_ind(inside, outside, equal_var=False).df
        error = found.standard_errors[node]
        uppers.append(abs(found.estimates[node]) + scipy.stats.t.ppf(0.95, freedom) * error)
    assert found.bound == pytest.approx(max(uppers), rel=1e-3)
    assert ASSUMPTION in str(found)
    assert "95.0% confidence" in str(found)


def test_the_bound_holds_as_often_as_it_says():
    """One node stands out, so that nothing but its own interval protects the bound: the hardest case."""
    patching = Additive([1.0, *[0.05] * 20])
    for confidence in (0.6, 0.9):
        bounds = [
            subset_bound(patching, n_subsets=30, probability=0.3, confidence=confidence, seed=seed).bound
            for seed in range(400)
        ]
        share = np.mean(np.asarray(bounds) >= 1.0)
        assert share >= confidence - 3 * np.sqrt(confidence * (1 - confidence) / 400)
    assert np.median(bounds) < 1.2


@pytest.mark.caches
def test_the_bound_holds_on_a_model():
    patching = Patching(
        linear_model(), pair_of((0, 3, 1, 2), (4, 4, 1, 5), 1, 4), Nodes("mlp_out", ("position", "unit"), 1)
    )
    truth = np.abs(patching.of_nodes(range(patching.n_nodes))).max()
    held = [
        subset_bound(patching, n_subsets=24, probability=0.3, confidence=0.8, seed=s).bound >= truth for s in range(60)
    ]
    assert np.mean(held) >= 0.8 - 3 * np.sqrt(0.16 / 60)


def test_only_the_named_nodes_are_patched_and_bounded():
    found = subset_bound(Additive([100.0, 0.1, -0.2, 0.0]), np.array([1, 2, 3]), n_subsets=400, probability=0.5)
    assert 0.2 <= found.bound < 0.25
    assert subset_bound(Additive(HEAVY), n_subsets=4, probability=0.01).bound == np.inf  # too few to tell


def test_verification_stops_when_the_bound_is_met():
    effects = np.zeros(300)
    effects[[7, 50, 299]] = 2.0, -1.0, 0.5
    patching = Additive(effects)
    found = verify(patching, scores(effects + RNG.normal(scale=0.01, size=300)), tolerance=0.1, budget=1000, first=20)
    assert found.is_met
    assert (found.cost, patching.n_passes) == (20 + 128, 20 + 128)
    assert [(row.node.position, row.effect) for row in found.ranked(3)] == [(7, 2.0), (50, -1.0), (299, 0.5)]
    assert found.bound.confidence == pytest.approx(0.975)  # half of the allowed error was this look's
    assert ASSUMPTION in str(found)


def test_verification_goes_on_past_what_was_missed_and_keeps_to_its_budget():
    effects = np.zeros(300)
    effects[11] = 3.0
    estimates = RNG.normal(scale=0.01, size=300)
    estimates[11] = np.sort(np.abs(estimates))[200]  # about the hundredth in the list
    found = verify(Additive(effects), scores(estimates), tolerance=1.0, budget=2000, first=20)
    assert found.is_met
    assert found.verified[11] == 3.0
    assert 80 < len(found.verified) < 300
    few = verify(Additive(effects), scores(estimates), tolerance=1.0, budget=200, first=20)
    assert not few.is_met
    assert few.bound.bound >= 3.0
    assert few.cost <= 200
    everything = verify(Additive(effects + 0.1), scores(estimates), tolerance=0.05, budget=5000, first=20)
    assert everything.is_met
    assert everything.bound is None
    assert len(everything.verified) == 300


def test_searches_find_what_is_there_at_their_cost():
    patching = Additive(np.where(np.arange(100) == 64, 5.0, 0.01 * HEAVY[np.arange(100) % 40]))
    exact = patching.effects
    searches = [
        by_score("exact order", scores(exact), 3),
        iterative(patching),
        subsampling(patching, n_subsets=60),
        in_blocks(patching),
        hierarchical(patching, at_once=1),
    ]
    cost_of = {}
    for search in searches:
        assert sorted(search.order.tolist()) == list(range(100))
        assert (np.diff(search.costs) >= 0).all()
        ((cost_of[search.name], share),) = recall_curve(search, exact, 1)
        assert share == 1.0
    assert cost_of["exact order"] == 4
    assert cost_of["subsampling"] == 61
    assert 10 < cost_of["blocks"] <= 20
    assert cost_of["hierarchical"] <= 10 + 2 * 4
    assert [share for _, share in recall_curve(searches[0], exact, 4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.caches
def test_scores_of_other_nodes_are_refused():
    model, pair = linear_model(), pair_of((0, 3, 1, 2), (0, 4, 1, 5), 1, 4)
    patching = Patching(model, pair, Nodes("attn_out"))
    for other in (Nodes("mlp_out"), Nodes("attn_out", layers=[2, 1, 0])):
        with pytest.raises(ValueError, match=r"The scores are of .* what is patched is attn_out by .* Resolve both"):
            verify(patching, atp(model, pair, other), tolerance=0.1, budget=400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0}, "first=0; at least one node"),
        ({"probability": 1.5}, "lie between 0 and 1, got 1.5 and 0.95"),
        ({"confidence": 95.0}, "got 0.1 and 95"),
        ({"n_subsets": 2}, "at least 4 subsets"),
    ],
)
def test_wrong_options_are_told_before_anything_is_patched(options, message):
    patching = Additive(HEAVY)
    with pytest.raises(ValueError, match=message):
        verify(patching, scores(HEAVY), tolerance=0.1, budget=400, **options)
    assert patching.n_passes == 0


def test_blocks_have_nodes():
    with pytest.raises(ValueError, match="size=0"):
        in_blocks(Additive(HEAVY), size=0)
    with pytest.raises(ValueError, match="at_once=0"):
        hierarchical(Additive(HEAVY), at_once=0)


def test_it_works_on_a_patching_as_it_is():
    model, pair = linear_model(), pair_of((0, 3, 1, 2), (0, 4, 1, 5), 1, 4)
    patching = Patching(model, pair, [Nodes("mlp_out"), Nodes("attn_out")])
    estimates = atp(model, pair, [Nodes("mlp_out"), Nodes("attn_out")])
    found = verify(patching, estimates, tolerance=10.0, budget=100, first=6, n_subsets=64)
    assert found.is_met
    for number, effect in found.verified.items():
        assert effect == pytest.approx(estimates.flat[number], abs=2e-5)


def test_bad_input_is_refused():
    patching = Additive(HEAVY)
    with pytest.raises(ValueError, match="lie between 0 and 1"):
        subset_bound(patching, probability=1.0)
    with pytest.raises(ValueError, match="at least 4 subsets"):
        subset_bound(patching, n_subsets=3)
    with pytest.raises(ValueError, match="39 scores for 40 nodes"):
        verify(patching, scores(HEAVY[:39]), tolerance=1.0, budget=1000)
    with pytest.raises(ValueError, match="does not suffice"):
        verify(patching, scores(HEAVY), tolerance=1.0, budget=100)

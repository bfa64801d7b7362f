"""What the studies of `benchmarks.sae.studies` compute from their runs."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.sae.studies.comparison import at_l0, by_seed, difference, estimate, table


def test_a_curve_is_straight_over_log_l0_and_ends_at_its_outermost_runs():
    l0s = [40.0, 5.0, 10.0]  # in no order
    values = [1 - 0.1 * math.log(l0) for l0 in l0s]
    for l0 in (5.0, 7.0, 10.0, 25.0, 40.0):
        assert at_l0(l0s, values, l0) == pytest.approx(1 - 0.1 * math.log(l0))
    assert math.isnan(at_l0(l0s, values, 4.9))
    assert math.isnan(at_l0(l0s, values, 41.0))


def test_an_estimate_is_a_mean_with_the_error_and_the_interval_of_students_t():
    values = [0.31, 0.35, 0.30, 0.36]
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(stats.sem(values))
    assert found.interval == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    assert found.n == 4


def test_a_difference_is_taken_seed_by_seed():
    ours, theirs = [1.0, 2.0, 4.0], [0.5, 1.75, 3.0]
    found = difference(ours, theirs)
    assert found.interval == pytest.approx(stats.ttest_rel(ours, theirs).confidence_interval(0.95))


def test_one_seed_has_no_error():
    found = estimate([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.error)
    assert all(map(math.isnan, found.interval))


def test_runs_are_compared_on_their_curves_seed_by_seed():
    runs = [
        {"seed": seed, "method": method, "l0": l0, "fvu": offset + seed - 0.1 * math.log(l0)}
        for method, offset in (("one", 0.0), ("other", 10.0))
        for seed in (1, 0)  # found again in the order of the seeds
        for l0 in (4.0, 30.0 + seed)
    ]
    found = by_seed(runs, lambda run: run["method"], "fvu", 16.0)
    curve = -0.1 * math.log(16)
    assert found["one"] == pytest.approx([curve, 1 + curve])
    assert found["other"] == pytest.approx([10 + curve, 11 + curve])
    with pytest.raises(ValueError, match="several runs of one seed"):
        by_seed(runs, lambda run: run["method"], "fvu")


def test_a_table_is_markdown_with_aligned_columns():
    text = table(("method", "FVU"), [("none", estimate([0.25, 0.35])), ("resampling", "-")])
    lines = text.splitlines()
    assert lines[0].split("|")[1:3] == [" method     ", " FVU             "]
    assert "0.3000 ± 0.0500" in lines[2]
    assert len({len(line) for line in lines}) == 1

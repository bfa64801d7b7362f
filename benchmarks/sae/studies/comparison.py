"""From single runs to what is compared: values at one L0, means over seeds with their errors, differences seed by seed.

No two methods end at the same L0, and everything else depends on it. So each method's runs of one seed, which differ in
the strength of the penalty, give a curve over L0, and methods are compared on their curves at one L0. Between two runs
the curve is taken to be straight over log L0; beyond the outermost runs there is none.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy import stats

__all__ = ["Estimate", "at_l0", "by_seed", "difference", "estimate", "table"]

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float
    """The mean's standard error; NaN for one seed."""
    n: int
    """Seeds."""

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean of many seeds lies with 95 % confidence, by Student's t."""
        reach = float(stats.t.ppf(0.975, self.n - 1)) * self.error if self.n > 1 else math.nan
        return self.mean - reach, self.mean + reach

    def __str__(self) -> str:
        return "not reached" if math.isnan(self.mean) else f"{self.mean:.4f} ± {self.error:.4f}"

    @property
    def with_interval(self) -> str:
        """As a difference is told: with its sign and its interval."""
        low, high = self.interval
        if math.isnan(self.mean):
            return "not reached"
        return f"{self.mean:+.4f} ({low:+.4f} to {high:+.4f})"


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of values, one a seed.

    Args:
        values: at least one; NaN where a seed has none, which makes the mean NaN.
    """
    values = np.asarray(list(values), float)
    if not values.size:
        raise ValueError("there are no seeds to take a mean over.")
    error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
    return Estimate(float(values.mean()), error, values.size)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of the differences ours - theirs, which are taken seed by seed.

    Args:
        ours: one value a seed.
        theirs: one value a seed, in the same order.
    """
    return estimate(one - other for one, other in zip(ours, theirs, strict=True))


def at_l0(l0s: Sequence[float], values: Sequence[float], l0: float) -> float:
    """A curve's value at one L0.

    Args:
        l0s: L0 of each run, in any order.
        values: what is on the curve, of each run.
        l0: where it is wanted.

    Returns:
        NaN outside the runs' range.
    """
    order = np.argsort(l0s)
    logs = np.log(np.asarray(l0s, float)[order])
    return float(np.interp(math.log(l0), logs, np.asarray(values, float)[order], left=math.nan, right=math.nan))


def by_seed(
    runs: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Key], measure: str, l0: float | None = None
) -> dict[Key, list[float]]:
    """A measure of every method, seed by seed.

    Args:
        runs: single runs, with their `seed` and `l0`.
        key: what method a run is of.
        measure: name of the measure.
        l0: where the runs of one method and seed are a curve, the L0 that they are compared at. None where they are
            but one run.

    Returns:
        One value a seed, in the order of the seeds; NaN where the curve does not reach that L0.
    """
    curves: dict[Key, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        curves[key(run)][run["seed"]].append((run["l0"], run[measure]))
    found: dict[Key, list[float]] = {}
    for method, seeds in curves.items():
        points = [list(zip(*curve, strict=True)) for _, curve in sorted(seeds.items())]
        if l0 is None and any(len(values) != 1 for _, values in points):
            raise ValueError(f"{method} has several runs of one seed: say at what L0 they are to be compared.")
        found[method] = [values[0] if l0 is None else at_l0(l0s, values, l0) for l0s, values in points]
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned.

    Args:
        header: of each column.
        rows: cells; estimates and text alike.
    """
    lines = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )

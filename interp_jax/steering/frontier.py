"""What is gained against what is broken: success of rollouts and loss on ordinary text, as a Pareto frontier.

A point is one method at one strength. It is on the frontier where no other point of the method has at least its share
of successful rollouts at no more loss, and one of the two better. Intervals are percentile bootstraps (Efron 1979):
of the share over rollouts, of the loss over rows of text. Of n rollouts without a single success the interval is 0 to
0, however few they are, though the share may be up to about 3 / n.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["FrontierPoint", "frontier", "is_pareto"]


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """One method at one strength, as it was measured; intervals are (low, high)."""

    method: str
    coefficient: float
    success: float
    """P(successful rollout): the share of rollouts that are."""
    success_interval: tuple[float, float]
    loss: float
    """Nats a token on ordinary text, after the prompt."""
    loss_interval: tuple[float, float]
    is_on_frontier: bool
    """Whether no other point of the method is at least as good in both and better in one."""


def is_pareto(success: Float[np.ndarray, "points"], loss: Float[np.ndarray, "points"]) -> Bool[np.ndarray, "points"]:
    """Which points no other one beats: with as much success at no more loss, and one of the two better.

    Args:
        success: more is better.
        loss: less is better.
    """
    as_good = (success[None] >= success[:, None]) & (loss[None] <= loss[:, None])
    better = (success[None] > success[:, None]) | (loss[None] < loss[:, None])
    return np.logical_not((as_good & better).any(axis=1))


def frontier(
    method: str,
    coefficients: Sequence[float],
    successes: Bool[np.ndarray, "coefficients rollouts"],
    losses: Float[np.ndarray, "coefficients rows"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[FrontierPoint, ...]:
    """The points of one method.

    Args:
        method: its name.
        coefficients: the strengths.
        successes: whether each rollout was successful.
        losses: the loss of each row of text.
        confidence: of the intervals.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One point a strength, in the given order.

    Raises:
        ValueError: if there are not as many strengths in all of them, one holds nothing, or a loss is no number.
    """
    shapes = successes.shape, losses.shape
    if any(len(shape) != 2 or shape[0] != len(coefficients) or not all(shape) for shape in shapes):
        raise ValueError(
            f"successes has shape {shapes[0]} and losses {shapes[1]} for {len(coefficients)} coefficients; expected "
            "for each coefficient a row of at least one rollout, and of at least one row of text."
        )
    wrong = [c for c, of in zip(coefficients, losses, strict=True) if not np.isfinite(of).all()]
    if wrong:
        raise ValueError(f"The losses of the coefficients {wrong} are not all finite: leave these out.")
    share, loss = successes.mean(axis=1), losses.mean(axis=1)
    on_frontier = is_pareto(share, loss)
    intervals = [
        [_interval(row, confidence, n_resamples, seed) for row in of] for of in (successes.astype(float), losses)
    ]
    return tuple(
        FrontierPoint(method, float(c), float(s), s_interval, float(x), x_interval, bool(is_on))
        for c, s, s_interval, x, x_interval, is_on in zip(
            coefficients, share, intervals[0], loss, intervals[1], on_frontier, strict=True
        )
    )


def _interval(values: Float[np.ndarray, "n"], confidence: float, n: int, seed: int) -> tuple[float, float]:
    drawn = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

"""Whether two features together do more than the sum of what each does alone.

Both tests are from the fact-finding posts (Nanda, Rajamanoharan, Kramar, Shah, December 2023, "Fact Finding: Attempting
to reverse-engineer factual recall"), where the question is whether early MLPs look up a pair of tokens (a first name
and a surname), or only add up what they know of each.

- `non_linear_excess`: rows with and without each of two features; `E(AB) - E(A not B) - E(B not A) + E(neither)` of any
  readout, a neuron, say, or a direction. It is 0 for any sum of a function of A and a function of B.
- `linear_structure`: the value for every pair of a first and a second part. The best additive picture is a mean plus an
  effect of each part; what is left is the interaction. Real pairs (names that belong together) among all pairs show
  whether it is these that have an excess over the sum.

Standard errors assume that rows are independent.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float

__all__ = ["Excess", "LinearStructure", "linear_structure", "non_linear_excess"]


class Excess(NamedTuple):
    """An excess over a sum of two effects; arrays in the shape of one readout."""

    excess: Float[np.ndarray, "*readouts"]
    """In the readout's units."""
    standard_error: Float[np.ndarray, "*readouts"]
    """Of the excess."""
    t: Float[np.ndarray, "*readouts"]
    """The excess over its standard error."""
    p: Float[np.ndarray, "*readouts"]
    """Two-sided; of one readout alone. Over many, correct for their number."""
    low: Float[np.ndarray, "*readouts"]
    """Lower end of the 95 % interval."""
    high: Float[np.ndarray, "*readouts"]
    """Its upper end."""


def non_linear_excess(
    readout: Float[np.ndarray | Array, "n *readouts"],
    has_a: Bool[np.ndarray | Array, "n"],
    has_b: Bool[np.ndarray | Array, "n"],
) -> Excess:
    """`E(AB) - E(A not B) - E(B not A) + E(neither)`, with its uncertainty.

    Args:
        readout: A number, or an array of them, for each row.
        has_a: Which rows have the one feature.
        has_b: Which have the other.

    Returns:
        The excess. The interval and p are by Student's t with Welch's degrees of freedom.

    Raises:
        ValueError: One of the four groups has fewer than two rows, or the lengths differ.
    """
    values, a, b = np.asarray(readout, np.float64), np.asarray(has_a, bool), np.asarray(has_b, bool)
    if a.shape != (len(values),) or b.shape != a.shape:
        raise ValueError(f"{len(values)} rows, but features of shapes {a.shape} and {b.shape}; give one entry a row.")
    groups = {"both": a & b, "A alone": a & ~b, "B alone": b & ~a, "neither": ~a & ~b}
    few = [f"{name} {int(rows.sum())}" for name, rows in groups.items() if rows.sum() < 2]
    if few:
        raise ValueError(f"Each of the four groups needs two rows; these have fewer: {', '.join(few)}.")
    signs = (1, -1, -1, 1)
    means = [values[rows].mean(axis=0) for rows in groups.values()]
    variances = [values[rows].var(axis=0, ddof=1) / rows.sum() for rows in groups.values()]
    excess = np.asarray(sum(sign * mean for sign, mean in zip(signs, means, strict=True)))
    variance = np.asarray(sum(variances))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [part**2 / (rows.sum() - 1) for part, rows in zip(variances, groups.values(), strict=True)]
        freedom = variance**2 / np.asarray(sum(parts))
    return _tested(excess, np.sqrt(variance), np.where(np.isfinite(freedom), freedom, len(values) - 4))


@dataclasses.dataclass(frozen=True)
class LinearStructure:
    """A table of values, one for each pair, as a mean, an effect of each part, and what is left."""

    mean: Float[np.ndarray, "*readouts"]
    """Over the pairs that the additive picture is fitted to."""
    first: Float[np.ndarray, "n_first *readouts"]
    """Effect of each first part; they sum to 0."""
    second: Float[np.ndarray, "n_second *readouts"]
    """Effect of each second part."""
    interaction: Float[np.ndarray, "n_first n_second *readouts"]
    """Value less mean and effects."""
    first_share: Float[np.ndarray, "*readouts"]
    """Share of the variance over pairs that the first parts' effects make; 0 of a readout that does not vary."""
    second_share: Float[np.ndarray, "*readouts"]
    """The second parts' share."""
    interaction_share: Float[np.ndarray, "*readouts"]
    """What no sum explains; with noise in the values, that too."""
    excess: Excess | None
    """Of the real pairs over the sum that the other pairs give; None if none were named."""


def linear_structure(
    values: Float[np.ndarray | Array, "n_first n_second *readouts"],
    is_real: Bool[np.ndarray | Array, "n_first n_second"] | None = None,
) -> LinearStructure:
    """How much of a readout over pairs is a sum of one effect of each part.

    Args:
        values: The readout for every first part with every second part.
        is_real: The pairs that belong together. The additive picture is then fitted to the others alone, and the real
            pairs' excess over it is tested; None to fit all.

    Returns:
        Effects, shares of the variance (over the pairs that were fitted), and the real pairs' excess.

    Raises:
        ValueError: Fewer than two parts, fewer than two real pairs, or a part that stands in no pair to fit.
    """
    table = np.asarray(values, np.float64)
    n_first, n_second = table.shape[:2]
    if min(n_first, n_second) < 2:
        raise ValueError(f"{n_first} first and {n_second} second parts; an interaction needs at least two of each.")
    real = np.zeros((n_first, n_second), bool) if is_real is None else np.asarray(is_real, bool)
    if real.shape != (n_first, n_second):
        raise ValueError(f"is_real has shape {real.shape}; the pairs have {(n_first, n_second)}.")
    fitted = ~real
    if not (fitted.any(axis=0).all() and fitted.any(axis=1).all()):
        raise ValueError("A part stands in no pair that is not real, so its effect cannot be told from the excess.")
    mean, first, second = _additive(table.reshape(n_first, n_second, -1), fitted)
    shape = table.shape[2:]
    mean, first, second = mean.reshape(shape), first.reshape(n_first, *shape), second.reshape(n_second, *shape)
    interaction = table - mean - first[:, None] - second
    total = table[fitted].var(axis=0)
    # What varies by rounding alone has no shares.
    is_constant = total <= np.square(8 * np.finfo(float).eps * np.abs(table[fitted]).max(axis=0))
    total = np.where(is_constant, np.inf, total)
    alone = np.broadcast_to(first[:, None], table.shape)[fitted], np.broadcast_to(second, table.shape)[fitted]
    excess = None
    if is_real is not None:
        n = int(real.sum())
        if n < 2:
            raise ValueError(f"{n} real pairs; their excess needs at least two.")
        # Two errors: that of the real pairs' mean, and that of the additive picture, whose residuals tell it.
        noise = np.square(interaction[fitted]).sum(axis=0) / max(fitted.sum() - n_first - n_second + 1, 1)
        leverage = _mean_leverage(fitted, real)
        error = np.sqrt(interaction[real].var(axis=0, ddof=1) / n + noise * leverage)
        excess = _tested(interaction[real].mean(axis=0), error, np.full(shape, n - 1.0))
    shares = [alone[0].var(axis=0), alone[1].var(axis=0), np.square(interaction[fitted]).mean(axis=0)]
    first_share, second_share, interaction_share = (np.asarray(share / total) for share in shares)
    return LinearStructure(
        mean, first, second, interaction, first_share, second_share, interaction_share, excess=excess
    )


def _design(places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """For each place (row of a pair table), 1 in the columns of the mean, of its first and of its second part."""
    n_first, n_second = shape
    design = np.zeros((len(places), 1 + n_first + n_second))
    design[:, 0] = 1
    rows = np.arange(len(places))
    design[rows, 1 + places[:, 0]] = 1
    design[rows, 1 + n_first + places[:, 1]] = 1
    return design


def _additive(table: np.ndarray, fitted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of a mean and two effects; effects are shifted so that each kind's mean is 0."""
    n_first = len(table)
    solution, _, rank, _ = np.linalg.lstsq(_design(np.argwhere(fitted), fitted.shape), table[fitted], rcond=None)
    if rank < sum(fitted.shape) - 1:
        raise ValueError(
            "The pairs to fit fall into groups that share no part, so effects cannot be compared; fit more."
        )
    mean, first, second = solution[0], solution[1 : 1 + n_first], solution[1 + n_first :]
    mean = mean + first.mean(axis=0) + second.mean(axis=0)
    return mean, first - first.mean(axis=0), second - second.mean(axis=0)


def _mean_leverage(fitted: np.ndarray, real: np.ndarray) -> float:
    """Variance of the additive picture's mean over the real pairs, in units of one value's noise."""
    design = _design(np.argwhere(fitted), fitted.shape)
    at = _design(np.argwhere(real), fitted.shape).mean(axis=0)
    return float(at @ np.linalg.pinv(design.T @ design) @ at)


def _tested(excess: Any, error: Any, freedom: Any) -> Excess:
    excess, error = np.asarray(excess), np.asarray(error)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, excess / error, np.where(excess == 0, 0.0, np.sign(excess) * np.inf))
    reach = scipy.stats.t.ppf(0.975, freedom) * error
    p = 2 * scipy.stats.t.sf(np.abs(t), freedom)
    return Excess(*map(np.asarray, (excess, error, t, p, excess - reach, excess + reach)))

"""Linear probes: whether a property of a prompt can be read off an activation by one direction.

Two kinds. `logistic` minimises the log-loss plus `l2 / 2` times the squared weights; `mean_difference` takes the
difference of the two classes' means as its direction and the midpoint as its threshold. Many probes at once, one for
each layer and position of `activations_at`, are solved in one compiled program by Newton's method; scikit-learn is the
other solver, and the two agree (it needs the extra `probes`).

What a number means here:

- Every accuracy is on rows that the probe has not seen. A split holds out the same share of both classes; each seed is
  another split.
- Activations are centred and divided by one number, their root mean square over the training rows, so that `l2` means
  the same in every layer. Weights come back in the activations' own units.
- Rows of one origin (the same name in several prompts) on both sides of a split make memory look like meaning. `groups`
  keeps them on one side.
- Errors are over rows, or over origins where there are `groups`: correctness is averaged over the splits that held a
  row out, and rows (origins) are what the standard error counts and the bootstrap draws. How much other training rows
  would change the probe is only in the spread of `accuracies`.

Hazard: the best of many probes is better than it will be on new rows; choose the layer on other rows than those that
report it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

__all__ = ["Probes", "held_out_split", "train_probes"]

_NEWTON_STEPS = 50
_AT_ONCE = 8  # probes solved side by side; each has a matrix [d, d] of its own


@dataclasses.dataclass(frozen=True)
class Probes:
    """Probes of a shape of places (layers, positions), for each of several splits."""

    weights: Float[np.ndarray, "seeds *places d"]
    """In the activations' units: `values @ weights + bias > 0` says that the label is 1."""
    bias: Float[np.ndarray, "seeds *places"]
    """What is added."""
    accuracies: Float[np.ndarray, "seeds *places"]
    """On each split's held-out rows."""
    train_accuracies: Float[np.ndarray, "seeds *places"]
    """On its training rows."""
    accuracy: Float[np.ndarray, "*places"]
    """On held-out rows, over all splits."""
    standard_error: Float[np.ndarray, "*places"]
    """Of `accuracy`, over rows or origins."""
    low: Float[np.ndarray, "*places"]
    """Lower end of the bootstrapped 95 % interval."""
    high: Float[np.ndarray, "*places"]
    """Its upper end."""
    majority: float
    """What guessing the commoner label would reach."""

    def table(self, layers: Sequence[int | None] | None = None) -> str:
        """Accuracies with their standard errors: a line a layer, a column a position, where places are those two.

        Args:
            layers: what the layers are called, where they are not all that there are.

        Raises:
            ValueError: if there are not as many as lines.
        """
        by_layer = [each.reshape(len(each), -1) for each in map(np.atleast_1d, (self.accuracy, self.standard_error))]
        names = range(len(by_layer[0])) if layers is None else layers
        if len(names) != len(by_layer[0]):
            raise ValueError(f"There are probes of {len(by_layer[0])} layers, and {len(names)} names of layers.")
        lines = [f"layer  accuracy (guessing: {self.majority:.3f})"]
        for layer, accuracies, errors in zip(names, *by_layer, strict=True):
            pairs = zip(accuracies, errors, strict=True)
            lines.append(f"{layer!s:>5}  " + "  ".join(f"{accuracy:.3f} ± {error:.3f}" for accuracy, error in pairs))
        return "\n".join(lines)


def train_probes(
    values: Float[np.ndarray | Array, "*places n d"],
    labels: Sequence[Any] | np.ndarray | Array,
    *,
    kind: Literal["logistic", "mean_difference"] = "logistic",
    solver: Literal["jax", "scikit-learn"] = "jax",
    l2: float = 1.0,
    held_out: float = 0.25,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    groups: Sequence[Any] | np.ndarray | None = None,
) -> Probes:
    """Trains a probe for each place and each split, and tests it on the rows held out.

    Args:
        values: Activations, as of `activations_at`.
        labels: 0 or 1 for each row.
        kind: Logistic regression, or the difference of means.
        solver: Of the logistic regression.
        l2: The logistic probe's penalty, `1 / C` of scikit-learn.
        held_out: The share of rows that is held out.
        seeds: One split each.
        groups: Each row's origin; rows of one origin stay together. None if every row is its own.

    Returns:
        The probes and their accuracies.

    Raises:
        ValueError: Labels are not 0 and 1, do not fit the rows, or leave a class without rows on one side of a split;
            an option is out of range; a value is not finite.
        ImportError: scikit-learn is asked for and not installed.
    """
    array = np.asarray(values, np.float32)
    label = _checked_labels(labels, array)
    if kind not in ("logistic", "mean_difference") or solver not in ("jax", "scikit-learn"):
        raise ValueError(
            f"kind={kind!r} and solver={solver!r}; kinds are 'logistic' and 'mean_difference', solvers 'jax' and "
            "'scikit-learn'."
        )
    if l2 <= 0 or not seeds:
        raise ValueError(
            f"l2={l2} and {len(seeds)} seeds; l2 must be above 0 (separable classes have no other optimum)."
        )
    is_held_out = np.stack([held_out_split(label, seed, held_out, groups=groups) for seed in seeds])
    places, (n, d) = array.shape[:-2], array.shape[-2:]
    flat = array.reshape(-1, n, d)
    if kind == "mean_difference":
        weights, bias = _mean_differences(flat, label, ~is_held_out)
    elif solver == "jax":
        weights, bias = map(np.asarray, _logistic(jnp.asarray(flat), jnp.asarray(label), jnp.asarray(~is_held_out), l2))
    else:
        weights, bias = _by_scikit_learn(flat, label, ~is_held_out, l2)
    scores = np.einsum("pnd,spd->spn", flat, weights) + bias[..., None]
    correct = ((scores > 0) == label).astype(np.float64)  # booleans would sum to one
    tests, trains = (
        np.einsum("spn,sn->sp", correct, side) / side.sum(axis=1, keepdims=True) for side in (is_held_out, ~is_held_out)
    )
    origins = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    of_origin = np.eye(origins.max() + 1)[origins]  # [n, origins]
    right = np.einsum("spn,sn->pn", correct, is_held_out) @ of_origin
    accuracy, error, low, high = _over_origins(right, is_held_out.sum(axis=0) @ of_origin)
    by_place = [each.reshape((*each.shape[:-1], *places)) for each in (bias, tests, trains, accuracy, error, low, high)]
    return Probes(
        weights.reshape(len(seeds), *places, d),
        *by_place,
        majority=float(max(label.mean(), 1 - label.mean())),
    )


def held_out_split(
    labels: Bool[np.ndarray, "n"],
    seed: int,
    held_out: float = 0.25,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> Bool[np.ndarray, "n"]:
    """Which rows are held out: the same share of both classes, drawn by the seed.

    Args:
        labels: Each row's label.
        seed: Of the draw.
        held_out: The share.
        groups: Each row's origin, as in `train_probes`; the share is then one of origins, drawn whole.

    Returns:
        True where a row is held out.

    Raises:
        ValueError: A class has no row on one side.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}; it must be between 0 and 1.")
    rng = np.random.default_rng(seed)
    of_row = np.arange(len(labels))
    if groups is not None:
        if len(groups) != len(labels):
            raise ValueError(f"There are {len(groups)} groups for {len(labels)} rows.")
        _, of_row = np.unique(np.asarray(groups), return_inverse=True)
    # An origin counts for the class that most of its rows are of.
    label_of = np.bincount(of_row, weights=labels) > np.bincount(of_row) / 2
    drawn = []
    for label in (False, True):
        origins = rng.permutation(np.flatnonzero(label_of == label))
        drawn.append(origins[: round(held_out * len(origins))])
    chosen = np.isin(of_row, np.concatenate(drawn))
    for side, name in ((chosen, "held out"), (~chosen, "left to train on")):
        if len(np.unique(labels[side])) < 2:
            raise ValueError(
                f"With held_out={held_out} and seed {seed}, rows of one class only are {name}: {len(labels)} rows, "
                f"{int(labels.sum())} of class 1. Give more rows, or another share."
            )
    return chosen


def _checked_labels(labels: Any, values: np.ndarray) -> np.ndarray:
    label = np.asarray(labels)
    if label.shape != values.shape[-2:-1]:
        raise ValueError(
            f"labels have shape {label.shape}; values of shape {values.shape} have {values.shape[-2]} rows."
        )
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels are {np.unique(label)[:5]}; a probe tells two classes apart, 0 and 1.")
    if not np.isfinite(values).all():
        raise ValueError("Some values are not finite; look at the site that they are from.")
    return label.astype(bool)


def _mean_differences(flat: np.ndarray, label: np.ndarray, is_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shares = np.stack([is_train & (label == each) for each in (False, True)]).astype(np.float32)
    shares /= shares.sum(axis=-1, keepdims=True)
    without, having = np.einsum("csn,pnd->cspd", shares, flat)
    weights = having - without
    return weights, -np.einsum("spd,spd->sp", weights, (having + without) / 2)


def _scaled(x: Any, rows: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Rows centred and in units of their root mean square, both over the training rows."""
    share = rows / rows.sum()
    mean = share @ x
    centred = x - mean
    size = xp.sqrt(xp.maximum((share @ (centred * centred)).mean(), 1e-30))
    return centred / size, mean, size


def _unscaled(weights: Any, bias: Any, mean: Any, size: Any) -> tuple[Any, Any]:
    return weights / size, bias - mean @ (weights / size)


@jax.jit
@jax.default_matmul_precision("highest")
def _logistic(
    flat: Float[Array, "probes n d"], label: Bool[Array, "n"], is_train: Bool[Array, "seeds n"], l2: Any
) -> tuple[Float[Array, "seeds probes d"], Float[Array, "seeds probes"]]:
    """Every probe of every split, a few side by side."""

    def solve(which: tuple[Array, Array]) -> tuple[Array, Array]:
        place, split = which
        rows = is_train[split].astype(jnp.float32)
        x, mean, size = _scaled(flat[place], rows, jnp)
        return _unscaled(*_newton(x, label, rows, l2), mean, size)

    n_seeds, n_probes = len(is_train), len(flat)
    each = jnp.tile(jnp.arange(n_probes), n_seeds), jnp.repeat(jnp.arange(n_seeds), n_probes)
    weights, bias = jax.lax.map(solve, each, batch_size=min(_AT_ONCE, n_seeds * n_probes))
    return weights.reshape(n_seeds, n_probes, -1), bias.reshape(n_seeds, n_probes)


def _newton(
    x: Float[Array, "n d"], label: Bool[Array, "n"], rows: Float[Array, "n"], l2: Any
) -> tuple[Float[Array, "d"], Float[Array, ""]]:
    """The minimum of `sum of rows * log-loss + l2 / 2 |weights|^2`, by Newton's method with a search along a step."""
    n, d = x.shape
    extended = jnp.concatenate([x, jnp.ones((n, 1))], axis=1)
    penalty = jnp.full(d + 1, l2).at[-1].set(0.0)
    signs = jnp.where(label, 1.0, -1.0)

    def objective(theta: Array) -> Array:
        return rows @ jax.nn.softplus(-signs * (extended @ theta)) + 0.5 * penalty @ jnp.square(theta)

    def gradient(theta: Array) -> Array:
        pulled = rows * -signs * jax.nn.sigmoid(-signs * (extended @ theta))
        return pulled @ extended + penalty * theta

    def improve(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        step, theta, value, _ = state
        probability = jax.nn.sigmoid(extended @ theta)
        curvature = rows * probability * (1 - probability)
        hessian = (extended * curvature[:, None]).T @ extended + jnp.diag(penalty + 1e-6)
        direction = jax.scipy.linalg.solve(hessian, gradient(theta), assume_a="pos")
        candidates = theta - jnp.exp2(-jnp.arange(8.0))[:, None] * direction
        values = jax.vmap(objective)(candidates)
        best = jnp.argmin(values)
        # On until rounding hides the progress; the last steps of Newton's come far nearer than the objective shows.
        is_better = values[best] < value
        theta = jnp.where(values[best] <= value, candidates[best], theta)
        return step + 1, theta, jnp.minimum(values[best], value), is_better

    start = jnp.zeros(d + 1)
    state = jnp.zeros((), int), start, objective(start), jnp.array(True)
    _, theta, _, _ = jax.lax.while_loop(lambda state: (state[0] < _NEWTON_STEPS) & state[3], improve, state)
    return theta[:-1], theta[-1]


def _by_scikit_learn(
    flat: np.ndarray, label: np.ndarray, is_train: np.ndarray, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "solver='scikit-learn' needs scikit-learn: pip install 'interp-jax[probes]', or take solver='jax'."
        ) from error
    weights = np.empty((len(is_train), len(flat), flat.shape[-1]))
    bias = np.empty(weights.shape[:-1])
    for seed, rows in enumerate(is_train):
        for place, values in enumerate(flat.astype(np.float64)):
            x, mean, size = _scaled(values, rows.astype(np.float64), np)
            fitted = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(x[rows], label[rows])
            weights[seed, place], bias[seed, place] = _unscaled(fitted.coef_[0], fitted.intercept_[0], mean, size)
    return weights, bias


def _over_origins(
    right: Float[np.ndarray, "probes origins"], times: Float[np.ndarray, "origins"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy, standard error and bootstrapped interval, with origins (rows, without groups) as what was drawn."""
    seen = times > 0
    right, times = right[:, seen], times[seen]
    accuracy = right.sum(axis=1) / times.sum()
    deviations = right - accuracy[:, None] * times
    n = len(times)
    error = np.sqrt(np.square(deviations).sum(axis=1) * n / max(n - 1, 1)) / times.sum()
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    low, high = np.quantile(draws @ right.T / (draws @ times)[:, None], [0.025, 0.975], axis=0)
    return accuracy, error, low, high

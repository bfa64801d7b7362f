"""How good an SAE is: on activations it has not seen, on a model's loss, against another dictionary.

Sums run in float64 on the host, so that a long evaluation is not rounded away, and batches may differ in size.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interp_jax.sae.topk import TopKSAE

__all__ = ["Evaluation", "evaluate", "loss_recovered", "mean_max_cosine"]

_OUTLIER = 3.0
"""Rows of more than this many times the median norm are outliers; `TrainConfig.norm_cap`'s default."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an SAE does on a set of activations."""

    n_rows: int
    """Activations looked at."""
    l0: float
    """Active latents a row, on average."""
    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the mean, each summed."""
    fvu_typical: float
    """The same without outliers, rows of over three times the first batch's median norm. The few that language models
    have decide the plain FVU alone."""
    outlier_share: float
    """Share of the rows that are outliers."""
    cosine: float
    """Mean cosine similarity of an activation and its reconstruction."""
    dead_share: float
    """Share of the latents that were never active."""
    density: Float[np.ndarray, "d_sae"]
    """Share of the rows in which each latent is active."""


def evaluate(sae: TopKSAE, batches: Iterable[Any]) -> Evaluation:
    """Measures an SAE on activations.

    Args:
        sae: the autoencoder.
        batches: `[batch, d_in]` arrays.

    Raises:
        ValueError: if there are no batches, or one has another width than the SAE.
    """
    n_rows, n_typical = 0, 0
    active, cosine = 0.0, 0.0
    all_rows, typical_rows = _Variance(sae.d_in), _Variance(sae.d_in)
    counts = np.zeros(sae.d_sae)
    cap: float | None = None
    for batch in batches:
        shape = np.shape(batch)
        if len(shape) != 2 or shape[1] != sae.d_in:
            raise ValueError(f"a batch has shape {shape}; expected [batch, {sae.d_in}], the SAE's d_in.")
        x = np.asarray(batch, np.float32)
        norms = np.linalg.norm(x, axis=1)
        cap = _OUTLIER * float(np.median(norms)) if cap is None else cap
        is_typical = norms <= cap
        batch_counts, errors, cosines = map(np.asarray, _measure(sae, jnp.asarray(x)))
        counts += batch_counts
        active += batch_counts.sum(dtype=np.float64)
        cosine += cosines.sum(dtype=np.float64)
        all_rows.add(x, errors)
        typical_rows.add(x[is_typical], errors[is_typical])
        n_rows += len(x)
        n_typical += int(is_typical.sum())
    if n_rows == 0:
        raise ValueError("there are no activations to evaluate on.")
    return Evaluation(
        n_rows=n_rows,
        l0=float(active / n_rows),
        fvu=all_rows.unexplained(),
        fvu_typical=typical_rows.unexplained(),
        outlier_share=1 - n_typical / n_rows,
        cosine=float(cosine / n_rows),
        dead_share=float(np.mean(counts == 0)),
        density=counts / n_rows,
    )


class _Variance:
    """Squared error and variance of rows that come batch by batch."""

    def __init__(self, d_in: int):
        self._n, self._error, self._squares, self._sum = 0, 0.0, 0.0, np.zeros(d_in)

    def add(self, x: Float[np.ndarray, "batch d_in"], errors: Float[np.ndarray, "batch"]) -> None:
        self._n += len(x)
        self._error += errors.sum(dtype=np.float64)
        self._squares += np.sum(np.square(x, dtype=np.float64))
        self._sum += x.sum(axis=0, dtype=np.float64)

    def unexplained(self) -> float:
        variance = self._squares - np.sum(self._sum**2) / self._n if self._n else 0.0
        # Relative to what it is a difference of: rounding leaves a little where there is none.
        return float(self._error / variance) if variance > 1e-12 * self._squares else float("nan")


@jax.jit
def _measure(sae: TopKSAE, batch: Float[Array, "batch d_in"]) -> tuple[Array, Array, Array]:
    """How often each latent is active; each row's squared error, and its cosine with its reconstruction."""
    codes = sae.encode(batch)
    output = sae.decode(codes)
    norms = jnp.linalg.norm(batch, axis=1) * jnp.linalg.norm(output, axis=1)
    cosines = jnp.where(norms > 0, jnp.sum(batch * output, axis=1) / jnp.where(norms > 0, norms, 1), 0)
    return jnp.sum(codes > 0, axis=0), jnp.sum(jnp.square(batch - output), axis=1), cosines


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """How much of what an ablation costs a dictionary's reconstruction wins back.

    Args:
        clean: the model's loss, in nats a token.
        spliced: its loss with the activation replaced by the reconstruction.
        ablated: its loss with the activation replaced by zero, or by its mean.

    Returns:
        1 where splicing costs nothing, 0 where it is as bad as the ablation; NaN where the ablation costs nothing.
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


def mean_max_cosine(truth: Float[Array, "n d_in"], dictionary: Float[Array, "d_sae d_in"]) -> float:
    """Mean over true directions of the greatest cosine similarity with a row of the dictionary (MMCS).

    Args:
        truth: the directions that should be found.
        dictionary: those that were.
    """
    return float(jnp.mean(jnp.max(_unit(truth) @ _unit(dictionary).T, axis=1)))


def _unit(rows: Float[Array, "n d_in"]) -> Float[Array, "n d_in"]:
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)

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


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an SAE does on a set of activations."""

    n_rows: int
    """Activations looked at."""
    l0: float
    """Active latents a row, on average."""
    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the mean, each summed."""
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
    n_rows = 0
    active, error, squares, cosine = 0.0, 0.0, 0.0, 0.0
    total = np.zeros(sae.d_in)
    counts = np.zeros(sae.d_sae)
    for batch in batches:
        shape = np.shape(batch)
        if len(shape) != 2 or shape[1] != sae.d_in:
            raise ValueError(f"a batch has shape {shape}; expected [batch, {sae.d_in}], the SAE's d_in.")
        batch_counts, batch_sum, sums = jax.device_get(_measure(sae, jnp.asarray(batch)))
        n_rows += shape[0]
        counts += batch_counts
        total += batch_sum
        active, error, squares, cosine = np.array([active, error, squares, cosine]) + sums
    if n_rows == 0:
        raise ValueError("there are no activations to evaluate on.")
    variance = squares - np.sum(total**2) / n_rows
    return Evaluation(
        n_rows=n_rows,
        l0=float(active / n_rows),
        fvu=float(error / variance) if variance > 0 else float("nan"),
        cosine=float(cosine / n_rows),
        dead_share=float(np.mean(counts == 0)),
        density=counts / n_rows,
    )


@jax.jit
def _measure(sae: TopKSAE, batch: Float[Array, "batch d_in"]) -> tuple[Array, Array, Array]:
    codes = sae.encode(batch)
    output = sae.decode(codes)
    is_active = codes > 0
    norms = jnp.linalg.norm(batch, axis=1) * jnp.linalg.norm(output, axis=1)
    cosine = jnp.where(norms > 0, jnp.sum(batch * output, axis=1) / jnp.where(norms > 0, norms, 1), 0)
    sums = [jnp.sum(is_active), jnp.sum(jnp.square(batch - output)), jnp.sum(jnp.square(batch)), jnp.sum(cosine)]
    return jnp.sum(is_active, axis=0), jnp.sum(batch, axis=0), jnp.stack([value.astype(jnp.float32) for value in sums])


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

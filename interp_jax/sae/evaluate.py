"""How good an SAE is on activations that it has not seen, and how much of a model's loss it recovers.

Sums run in float64 on the host, so that a long evaluation is not rounded away, and batches may differ in size.

In what follows x is what should come out (the activation itself; a transcoder's target), x_hat what does, and E the
mean over rows.

Hazard: measures made of squares (`fvu`, `explained_variance`, `relative_reconstruction_bias`) are decided by the few
rows of huge norm that language models have. `fvu_typical` is told without them; for the others leave those rows out.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.sae.frequency_histogram import FrequencyHistogram, frequency_histogram, share_below
from interp_jax.sae.protocol import Autoencoder
from interp_jax.sae.scalars import scalars

__all__ = ["Evaluation", "evaluate", "loss_recovered"]

_OUTLIER = 3.0
"""Rows of more than this many times the median norm are outliers; `TrainConfig.norm_cap`'s default."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an SAE does on a set of activations; the module's docstring tells what x, x_hat and E are."""

    n_rows: int
    """Activations looked at."""
    l0: float
    """Active latents a row, on average."""
    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the mean, each summed. NaN where
    there is no variance."""
    fvu_typical: float
    """The same without outliers, rows of over three times the first batch's median norm. The few that language models
    have decide the plain FVU alone."""
    outlier_share: float
    """Share of the rows that are outliers."""
    explained_variance: float
    """1 - Var(x - x_hat) / Var(x), each summed over coordinates: scikit-learn's `explained_variance_score`. It does
    not count an offset that is the same in every row, which `fvu` does: it is 1 - fvu + |E(x - x_hat)|^2 / Var(x).
    Other tools often mean 1 - fvu by this name."""
    cosine: float
    """Mean cosine similarity of x and x_hat."""
    l2_ratio: float
    """Shrinkage as a ratio of norms, E|x_hat| / E|x|. Below 1 even for the best possible x_hat of a given sparsity:
    what is not explained is missing from the norm."""
    relative_reconstruction_bias: float
    """Shrinkage proper (Rajamanoharan et al., "Improving dictionary learning with gated SAEs", 2024): the gamma for
    which E|x_hat / gamma - x|^2 is least, which is E|x_hat|^2 / E(x_hat . x). 1 where rescaling gains nothing, less
    where reconstructions are too small."""
    dead_share: float
    """Share of the latents that were never active."""
    share_below_1e_5: float
    """Share of the latents active in less than 1e-5 of the rows, the dead ones among them; those alone where there are
    no more than 100,000 rows."""
    share_below_1e_4: float
    """Share of the latents active in less than 1e-4 of the rows, the dead ones among them."""
    density: Float[np.ndarray, "d_sae"]
    """Share of the rows in which each latent is active."""

    @property
    def histogram(self) -> FrequencyHistogram:
        """Latents counted by the logarithm of their density."""
        return frequency_histogram(self.density)

    def as_dict(self) -> dict[str, int | float | None]:
        """The numbers without the density, for JSON; None for NaN."""
        return scalars(self)


def evaluate(sae: Autoencoder, batches: Iterable[Any]) -> Evaluation:
    """Measures an SAE or a transcoder on activations.

    Args:
        sae: the autoencoder, of any kind.
        batches: `[batch, d_in]` arrays, which should come out as they went in; for a transcoder pairs `(input,
            target)` of `[batch, d_in]` and `[batch, d_out]`.

    Raises:
        ValueError: if there are no rows, or a batch has another width than the SAE or holds what is not finite.
    """
    n_rows, n_typical = 0, 0
    cosine, norms, output_norms, output_squares, products = np.zeros(5)
    all_rows, typical_rows = _Variance(sae.d_out), _Variance(sae.d_out)
    error_sum, counts = np.zeros(sae.d_out), np.zeros(sae.d_sae)
    cap: float | None = None
    for number, batch in enumerate(batches):
        x, target = _checked(batch, number, sae)
        if len(x) == 0:
            continue
        row_norms = np.linalg.norm(target, axis=1)
        cap = _OUTLIER * float(np.median(row_norms)) if cap is None else cap
        is_typical = row_norms <= cap
        measured = jax.tree.map(np.asarray, _measure(sae, jnp.asarray(x), jnp.asarray(target)))
        row_output_norms = np.sqrt(measured.output_squares, dtype=np.float64)
        denominators = row_norms * row_output_norms
        cosine += np.sum(measured.products / np.where(denominators > 0, denominators, 1))
        norms += row_norms.sum(dtype=np.float64)
        output_norms += row_output_norms.sum()
        output_squares += measured.output_squares.sum(dtype=np.float64)
        products += measured.products.sum(dtype=np.float64)
        error_sum += measured.error_sum
        counts += measured.firings
        all_rows.add(target, measured.squared_errors)
        typical_rows.add(target[is_typical], measured.squared_errors[is_typical])
        n_rows += len(x)
        n_typical += int(is_typical.sum())
    if n_rows == 0:
        raise ValueError("there are no activations to evaluate on: batches is empty, or used up by an earlier loop.")
    density = counts / n_rows
    return Evaluation(
        n_rows=n_rows,
        l0=float(counts.sum() / n_rows),
        fvu=all_rows.share(all_rows.error),
        fvu_typical=typical_rows.share(typical_rows.error),
        outlier_share=1 - n_typical / n_rows,
        explained_variance=1 - all_rows.share(all_rows.error - float(np.sum(error_sum**2)) / n_rows),
        cosine=float(cosine / n_rows),
        l2_ratio=_ratio(output_norms, norms),
        relative_reconstruction_bias=_ratio(output_squares, products),
        dead_share=float(np.mean(counts == 0)),
        share_below_1e_5=share_below(density, 1e-5),
        share_below_1e_4=share_below(density, 1e-4),
        density=density,
    )


def _checked(batch: Any, number: int, sae: Autoencoder) -> tuple[np.ndarray, np.ndarray]:
    """Input and target of a batch, float32 on the host; one and the same array where the batch is no pair."""
    is_pair = isinstance(batch, tuple) and len(batch) == 2
    if not is_pair and sae.d_in != sae.d_out:
        raise ValueError(
            f"batch {number} is a {type(batch).__name__}; expected a pair (input, target): the SAE is a transcoder "
            f"from width {sae.d_in} to {sae.d_out}."
        )
    parts = batch if is_pair else (batch,)
    for part, width, name in zip(parts, (sae.d_in, sae.d_out), ("d_in", "d_out"), strict=False):
        shape = np.shape(part)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"batch {number} has shape {shape}; expected [batch, {width}], the SAE's {name}.")
    parts = [np.asarray(part, np.float32) for part in parts]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"batch {number} holds NaN or infinity; leave such rows out.")
    x, target = parts[0], parts[-1]
    if len(x) != len(target):
        raise ValueError(f"batch {number} has {len(x)} inputs and {len(target)} targets; expected one target an input.")
    return x, target


class _Variance:
    """Squared error and variance of rows that come batch by batch."""

    def __init__(self, d_out: int):
        self.error = 0.0
        self._n, self._squares, self._sum = 0, 0.0, np.zeros(d_out)

    def add(self, target: Float[np.ndarray, "batch d_out"], errors: Float[np.ndarray, "batch"]) -> None:
        self._n += len(target)
        self.error += float(errors.sum(dtype=np.float64))
        self._squares += float(np.sum(np.square(target, dtype=np.float64)))
        self._sum += target.sum(axis=0, dtype=np.float64)

    def share(self, part: float) -> float:
        """A sum of squares as a share of the variance."""
        variance = self._squares - float(np.sum(self._sum**2)) / self._n if self._n else 0.0
        # Relative to what it is a difference of: rounding leaves a little where there is none.
        return part / variance if variance > 1e-12 * self._squares else float("nan")


class _Measured(NamedTuple):
    """What the host sums up."""

    firings: Int[Array, "d_sae"]
    """In how many rows each latent is active."""
    error_sum: Float[Array, "d_out"]
    squared_errors: Float[Array, "batch"]
    output_squares: Float[Array, "batch"]
    products: Float[Array, "batch"]
    """Each row's target times its output."""


@jax.jit
def _measure(sae: Autoencoder, x: Float[Array, "batch d_in"], target: Float[Array, "batch d_out"]) -> _Measured:
    codes = sae.encode(x)
    output = sae.decode(codes) + sae.skipped(x)
    error = target - output
    return _Measured(
        firings=jnp.sum(codes != 0, axis=0),
        error_sum=jnp.sum(error, axis=0),
        squared_errors=jnp.sum(jnp.square(error), axis=1),
        output_squares=jnp.sum(jnp.square(output), axis=1),
        products=jnp.sum(target * output, axis=1),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator != 0 else float("nan")


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

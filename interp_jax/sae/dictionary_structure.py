"""What a dictionary looks like by itself, without any activation: a quick look for collapse and for privileged axes.

Let u_i be the rows of `W_dec` scaled to norm one, and s_1 >= s_2 >= ... the eigenvalues of their second moment, sum_i
u_i u_i^T.

- `fve_top_1` is s_1 / sum(s), the fraction of the rows' variance that one direction explains, and `fve_next_9` is
  (s_2 + ... + s_10) / sum(s), that of the nine after it. Rows spread evenly over d dimensions have 1 / d and 9 / d, a
  little more where they are few; latents that all learnt the same direction show up in the first.
- Kurtosis is that of a row's entries, in the basis of the activations: high where a latent writes to few coordinates.
- The cosine of a latent's encoder column and dictionary row is 1 where the encoder is the decoder's transpose.

The names are those of the DeepMind interpretability team's "Progress update 1", April 2024; the definitions are written
out here so that none is left to guess. The variance is about zero, not about the rows' mean: latents are directions
from the origin, and a direction that all of them share would otherwise go unseen. It counts every row alike, whatever
its norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.scalars import scalars

__all__ = ["DictionaryStructure", "dictionary_structure"]

_BLOCK = 4096
"""Latents looked at in one product."""


@dataclasses.dataclass(frozen=True)
class DictionaryStructure:
    """What a dictionary looks like by itself. A row of zero has no direction and counts in nothing."""

    fve_top_1: float
    """Fraction of the unit rows' variance about zero that their first principal direction explains."""
    fve_next_9: float
    """Fraction that the nine directions after the first explain."""
    kurtosis: float
    """Mean over latents of `kurtoses`."""
    encoder_decoder_cosine: float
    """Mean over latents of `encoder_decoder_cosines`."""
    kurtoses: Float[np.ndarray, "d_sae"]
    """Excess kurtosis of each dictionary row's entries: fourth moment about the row's mean over its squared variance,
    less 3. Zero for entries like a normal's, d_in - 3 or so for a row along one axis. NaN for a constant row."""
    encoder_decoder_cosines: Float[np.ndarray, "d_sae"]
    """Cosine similarity of each latent's encoder column and dictionary row. NaN where either is zero, and for a
    transcoder from one width to another. A transcoder's two ends are of different spaces even where the widths agree.
    """

    def as_dict(self) -> dict[str, int | float | None]:
        """The numbers without the arrays, for JSON; None for NaN."""
        return scalars(self)


def dictionary_structure(sae: SparseAutoencoder) -> DictionaryStructure:
    """Looks at an SAE's dictionary and encoder.

    Args:
        sae: the autoencoder.

    Returns:
        The structure; NaN where every row of the dictionary is zero.
    """
    W_enc, W_dec = sae.W_enc[...], sae.W_dec[...]
    second_moment = np.zeros((sae.d_out, sae.d_out))
    kurtoses, cosines = [], []
    for start in range(0, sae.d_sae, _BLOCK):
        rows = W_dec[start : start + _BLOCK]
        block_moment, kurtosis = map(np.asarray, _of_rows(rows))
        second_moment += block_moment
        kurtoses.append(kurtosis)
        if sae.d_in == sae.d_out:
            cosines.append(np.asarray(_cosines(W_enc[:, start : start + _BLOCK], rows)))
        else:
            cosines.append(np.full(len(rows), np.nan, np.float32))
    total = float(np.trace(second_moment))
    fve_top_1, fve_next_9 = float("nan"), float("nan")
    if total > 0:  # neither zero nor NaN
        spectrum = np.linalg.eigvalsh(second_moment)[::-1] / total
        fve_top_1, fve_next_9 = float(spectrum[0]), float(spectrum[1:10].sum())
    kurtoses, cosines = np.concatenate(kurtoses), np.concatenate(cosines)
    return DictionaryStructure(
        fve_top_1=fve_top_1,
        fve_next_9=fve_next_9,
        kurtosis=_mean(kurtoses),
        encoder_decoder_cosine=_mean(cosines),
        kurtoses=kurtoses,
        encoder_decoder_cosines=cosines,
    )


@jax.jit
def _of_rows(rows: Float[Array, "n d_out"]) -> tuple[Array, Array]:
    """The second moment of the rows at unit norm, summed; and each row's excess kurtosis."""
    rows = rows.astype(jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / jnp.where(norms > 0, norms, 1)
    second_moment = jnp.matmul(unit.T, unit, precision=jax.lax.Precision.HIGHEST)
    centred = unit - jnp.mean(unit, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=1)
    # Of a constant row rounding leaves a little: 1e-10 is far below what a row of norm one has otherwise.
    is_spread = variance * rows.shape[1] > 1e-10
    kurtosis = jnp.mean(centred**4, axis=1) / jnp.square(jnp.where(is_spread, variance, 1)) - 3
    return second_moment, jnp.where(is_spread, kurtosis, jnp.nan)


@jax.jit
def _cosines(columns: Float[Array, "d n"], rows: Float[Array, "n d"]) -> Float[Array, "n"]:
    columns, rows = columns.T.astype(jnp.float32), rows.astype(jnp.float32)
    norms = jnp.linalg.norm(columns, axis=1) * jnp.linalg.norm(rows, axis=1)
    return jnp.where(norms > 0, jnp.sum(columns * rows, axis=1) / jnp.where(norms > 0, norms, 1), jnp.nan)


def _mean(values: Float[np.ndarray, "n"]) -> float:
    """The mean of what is not NaN; NaN where all is."""
    values = values[~np.isnan(values)]
    return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")

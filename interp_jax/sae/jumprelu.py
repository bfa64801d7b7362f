"""The JumpReLU sparse autoencoder (Rajamanoharan et al., "Jumping ahead", 2024).

    codes = pre * 1[pre > threshold];   pre = (x - b_dec) @ W_enc + b_enc
    loss = |target - output|^2 + coefficient * L0,   or   coefficient * (L0 / l0_target - 1)^2

A threshold a latent takes the place of shrinking: what passes it is left as it is. Neither the jump nor the L0 has a
derivative by the threshold, so the derivative of the expected loss is estimated by a rectangle of width `bandwidth`
about it (the paper's equations 11 and 12): where |pre - threshold| < bandwidth / 2,

    d code / d threshold = -threshold / bandwidth;   d 1[pre > threshold] / d threshold = -1 / bandwidth

Both are exact zero elsewhere. The parameter is the threshold itself or its logarithm, which keeps it positive.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from interp_jax.sae.autoencoder import Batch, Outcome, Sparsity, random_arrays
from interp_jax.sae.column_sums import over_rows
from interp_jax.sae.penalised import PenalisedSAE
from interp_jax.sae.relu import dense_outcome, sparse_outcome
from interp_jax.sae.sparse_pairs import SparsePairs, per_latent_at

__all__ = ["JumpReLUSAE", "jump_relu"]


class JumpReLUSAE(PenalisedSAE):
    """A JumpReLU sparse autoencoder."""

    b_enc: nnx.Param
    threshold: nnx.Param
    log_threshold: nnx.Param

    def __init__(
        self,
        *,
        b_enc: Float[Array, "_d_sae"],
        threshold: Float[Array, "_d_sae"],
        bandwidth: float = 1e-3,
        parameter: Literal["threshold", "log_threshold"] = "threshold",
        **arrays,
    ):
        """An SAE of given weights.

        Args:
            b_enc: encoder bias.
            threshold: what a pre-activation must exceed to count; not negative.
            bandwidth: width of the rectangle by which derivatives are estimated, in units of the codes.
            parameter: what is stored and trained: the threshold, or its logarithm.
            **arrays: what every `SparseAutoencoder` has.

        Raises:
            ValueError: if the shapes do not fit one another, or the bandwidth is not positive.
        """
        super().__init__(**arrays)
        if not bandwidth > 0:
            raise ValueError(f"bandwidth is {bandwidth}; expected a positive number, in units of the codes.")
        self.bandwidth = bandwidth
        self.is_log = parameter == "log_threshold"
        self._set_per_latent(b_enc=b_enc, **{parameter: jnp.log(threshold) if self.is_log else threshold})

    @classmethod
    def random(
        cls,
        d_in: int,
        d_sae: int,
        *,
        key: PRNGKeyArray,
        threshold: float = 1e-3,
        bandwidth: float = 1e-3,
        parameter: Literal["threshold", "log_threshold"] = "threshold",
        **shape,
    ) -> "JumpReLUSAE":
        """Random unit directions, zero biases, and one threshold for all.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            key: random key.
            threshold: where every latent's threshold starts.
            bandwidth: width of the rectangle by which derivatives are estimated.
            parameter: what is stored and trained.
            **shape: `d_out` and `has_skip` of a transcoder.
        """
        return cls(
            b_enc=jnp.zeros(d_sae),
            threshold=jnp.full(d_sae, threshold),
            bandwidth=bandwidth,
            parameter=parameter,
            **random_arrays(d_in, d_sae, key=key, **shape),
        )

    def thresholds(self) -> Float[Array, "d_sae"]:
        """The threshold of each latent, whichever way it is stored."""
        return jnp.exp(self.log_threshold[...]) if self.is_log else self.threshold[...]

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations.

        Args:
            x: activations.
        """
        return jump_relu(self.pre_activations(x), self.thresholds(), self.bandwidth)[0]

    def floor(self) -> Float[Array, "d_sae"]:
        """The thresholds less half of the rectangle by which their derivatives are estimated."""
        return self.thresholds() - self.bandwidth / 2

    def dense_objective(
        self, pre: Float[Array, "batch d_sae"], batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None
    ) -> Outcome:
        """Squared error plus L0; see `PenalisedSAE.dense_objective`."""
        codes, is_above = jump_relu(pre, self.thresholds(), self.bandwidth)
        l0 = jnp.sum(jnp.mean(is_above, axis=0))
        return dense_outcome(self, codes, batch, _penalty(l0, sparsity), mesh)

    def sparse_objective(
        self, pre: Float[Array, "pairs"], pairs: SparsePairs, batch: Batch, sparsity: Sparsity
    ) -> Outcome:
        """Squared error plus L0; see `PenalisedSAE.sparse_objective`."""
        thresholds = per_latent_at(self.thresholds(), pairs)
        at_pairs = jump_relu(pre, thresholds, self.bandwidth)
        codes, is_above = (jnp.where(pairs.is_active, each, 0) for each in at_pairs)
        penalty = _penalty(jnp.sum(is_above) / len(batch.x), sparsity)
        return sparse_outcome(self, codes, pairs, batch, penalty)

    def in_units(self, input_scale: Float[Array, ""], output_scale: Float[Array, ""]) -> "JumpReLUSAE":
        """The autoencoder for unscaled activations; see `SparseAutoencoder.in_units`."""
        scaled = super().in_units(input_scale, output_scale)
        if self.is_log:
            return scaled.replace(log_threshold=self.log_threshold[...] - jnp.log(output_scale))
        return scaled.replace(threshold=self.threshold[...] / output_scale)


def _penalty(l0: Float[Array, ""], sparsity: Sparsity) -> Float[Array, ""]:
    return sparsity.coefficient * (l0 if sparsity.l0_target is None else jnp.square(l0 / sparsity.l0_target - 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def jump_relu(
    pre: Float[Array, "*batch d_sae"], threshold: Float[Array, "d_sae"], bandwidth: float
) -> tuple[Float[Array, "*batch d_sae"], Float[Array, "*batch d_sae"]]:
    """The codes: `pre` where it is above the threshold, else zero; and one where a latent is active, else zero.

    For derivatives see the module's docstring; by `pre`, only the codes have one. The two are one function so that one
    sum over rows serves both derivatives by the threshold.

    Args:
        pre: pre-activations.
        threshold: one a latent.
        bandwidth: width of the rectangle by which the derivatives by the threshold are estimated.
    """
    # And not `>`, so that NaN is kept and seen in the loss.
    is_active = ~(pre <= threshold) & ~(pre <= 0)
    return jnp.where(is_active, pre, 0), jnp.asarray(is_active, pre.dtype)


@jump_relu.defjvp
def _jump_relu_jvp(bandwidth: float, primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    (pre, threshold), (by_pre, by_threshold) = primals, tangents
    codes, is_active = jump_relu(pre, threshold, bandwidth)
    row = over_rows(by_threshold / bandwidth, pre.size // pre.shape[-1]).reshape(pre.shape)
    by_rectangle = jnp.where(jnp.abs(pre - threshold) < bandwidth / 2, row, 0)
    return (codes, is_active), (jnp.where(is_active > 0, by_pre, 0) - threshold * by_rectangle, -by_rectangle)

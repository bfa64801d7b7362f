"""The gated sparse autoencoder (Rajamanoharan et al., "Improving dictionary learning with gated SAEs", 2024).

Which latents are active and how strongly are told apart, so that the L1 penalty shrinks the one and not the other:

    gate = (x - b_dec) @ W_enc + b_gate
    codes = 1[gate > 0] * relu((x - b_dec) @ (W_enc * exp(r_mag)) + b_mag)
    loss = |target - output|^2 + coefficient * L1(relu(gate)) + |target - frozen decode(relu(gate))|^2

The indicator has no derivative. The gate learns from the penalty and from the last, auxiliary term, which decodes it by
the dictionary held constant.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from interp_jax.sae.autoencoder import Batch, Outcome, Sparsity, random_arrays
from interp_jax.sae.penalised import PenalisedSAE
from interp_jax.sae.relu import dense_outcome, l1, sparse_l1, sparse_outcome
from interp_jax.sae.sparse_pairs import SparsePairs, decode_at, per_latent_at

__all__ = ["GatedSAE"]


class GatedSAE(PenalisedSAE):
    """A gated sparse autoencoder."""

    code_offsets = ("b_gate", "b_mag")
    encoder_bias = "b_gate"
    b_gate: nnx.Param
    b_mag: nnx.Param
    r_mag: nnx.Param

    def __init__(
        self, *, b_gate: Float[Array, "_d_sae"], b_mag: Float[Array, "_d_sae"], r_mag: Float[Array, "_d_sae"], **arrays
    ):
        """An SAE of given weights.

        Args:
            b_gate: bias of the gate.
            b_mag: bias of the magnitude.
            r_mag: logarithm of the magnitude's scale to the gate's.
            **arrays: what every `SparseAutoencoder` has.

        Raises:
            ValueError: if the shapes do not fit one another.
        """
        super().__init__(**arrays)
        self._set_per_latent(b_gate=b_gate, b_mag=b_mag, r_mag=r_mag)

    @classmethod
    def random(cls, d_in: int, d_sae: int, *, key: PRNGKeyArray, **shape) -> "GatedSAE":
        """Random unit directions, zero biases, magnitudes of the gates' size.

        Args:
            d_in: width of the activations.
            d_sae: number of latents.
            key: random key.
            **shape: `d_out` and `has_skip` of a transcoder.
        """
        zeros = {name: jnp.zeros(d_sae) for name in ("b_gate", "b_mag", "r_mag")}
        return cls(**zeros, **random_arrays(d_in, d_sae, key=key, **shape))

    def gates_and_codes(
        self, x: Float[Array, "*batch d_in"]
    ) -> tuple[Float[Array, "*batch d_sae"], Float[Array, "*batch d_sae"]]:
        """The gate before its threshold at zero, and the codes.

        Args:
            x: activations.
        """
        gate = self.pre_activations(x)
        return gate, self._codes(gate)

    def _codes(self, gate: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return jnp.where(gate > 0, self._magnitudes(gate, *self._scale_and_offset()), 0)

    def _scale_and_offset(self) -> tuple[Float[Array, "d_sae"], Float[Array, "d_sae"]]:
        """How magnitudes come from gates: the product alone is the gate less its bias."""
        scale = jnp.exp(self.r_mag[...])
        return scale, self.b_mag[...] - self.b_gate[...] * scale

    @staticmethod
    def _magnitudes(gate: Array, scale: Array, offset: Array) -> Array:
        return jax.nn.relu(gate * scale + offset)

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations.

        Args:
            x: activations.
        """
        return self.gates_and_codes(x)[1]

    def floor(self) -> Float[Array, "d_sae"]:
        """Zero, for the gate."""
        return jnp.zeros(self.d_sae)

    def dense_objective(
        self, pre: Float[Array, "batch d_sae"], batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None
    ) -> Outcome:
        """Squared error, L1 of the gates and their own reconstruction; see `PenalisedSAE.dense_objective`."""
        codes, opened = self._codes(pre), jax.nn.relu(pre)
        frozen = jax.tree.map(jax.lax.stop_gradient, self)
        auxiliary = batch.squared_error(batch.target - (frozen.decode(opened) + frozen.skipped(batch.x)))
        return dense_outcome(self, codes, batch, l1(self, opened, sparsity) + auxiliary, mesh)

    def sparse_objective(
        self, pre: Float[Array, "pairs"], pairs: SparsePairs, batch: Batch, sparsity: Sparsity
    ) -> Outcome:
        """Squared error, L1 of the gates and their own reconstruction; see `PenalisedSAE.sparse_objective`."""
        scale, offset = (per_latent_at(parameter, pairs) for parameter in self._scale_and_offset())
        codes = jnp.where(pairs.is_active, self._magnitudes(pre, scale, offset), 0)
        frozen = jax.tree.map(jax.lax.stop_gradient, self)
        alone = decode_at(pre, frozen.W_dec[...], pairs) + frozen.b_dec[...] + frozen.skipped(batch.x)
        auxiliary = batch.squared_error(batch.target - alone)
        penalty = sparse_l1(self, pre, pairs, sparsity, len(batch.x)) + auxiliary
        return sparse_outcome(self, codes, pairs, batch, penalty)

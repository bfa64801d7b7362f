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

from interp_jax.sae.autoencoder import Outcome, SparseAutoencoder, Sparsity, random_arrays
from interp_jax.sae.relu import dense_outcome, l1

__all__ = ["GatedSAE"]


class GatedSAE(SparseAutoencoder):
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
        scale = jnp.exp(self.r_mag[...])
        # The product alone is the gate less its bias.
        magnitude = jax.nn.relu(gate * scale + (self.b_mag[...] - self.b_gate[...] * scale))
        return gate, jnp.where(gate > 0, magnitude, 0)

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations.

        Args:
            x: activations.
        """
        return self.gates_and_codes(x)[1]

    def objective(
        self,
        x: Float[Array, "batch d_in"],
        target: Float[Array, "batch d_out"],
        row_weights: Float[Array, "batch"],
        sparsity: Sparsity,
        mesh: Mesh | None = None,
    ) -> Outcome:
        """Squared error, L1 of the gates and their own reconstruction; see `SparseAutoencoder.objective`."""
        gate, codes = self.gates_and_codes(x)
        opened = jax.nn.relu(gate)
        frozen = jax.tree.map(jax.lax.stop_gradient, self)
        alone = target - (frozen.decode(opened) + frozen.skipped(x))
        auxiliary = jnp.mean(row_weights * jnp.sum(jnp.square(alone), axis=1))
        return dense_outcome(self, codes, x, target, row_weights, l1(self, opened, sparsity) + auxiliary, mesh)

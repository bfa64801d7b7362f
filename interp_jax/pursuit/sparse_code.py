"""A sparse code: which atoms of a dictionary a signal is made of, and how much of each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["SparseCode", "code_of"]

PRECISE = jax.lax.Precision.HIGHEST


class SparseCode(NamedTuple):
    """A batch of sparse codes. Slots that hold an atom come first; an unused slot has index -1 and weight 0."""

    indices: Int[Array, "*batch l0"]
    """The atoms' rows in the dictionary, in the order in which they were first picked."""
    weights: Float[Array, "*batch l0"]
    """What each atom is multiplied by."""
    l0_reached: Int[Array, "*batch"]
    """How many weights are not zero; less than `l0` where no atom was left that would help."""
    residual_norm: Float[Array, "*batch"]
    """Norm of `signal - decode`. NaN where the signal or its products were not finite."""

    def dense(self, d_sae: int) -> Float[Array, "*batch d_sae"]:
        """The codes as dense rows.

        Args:
            d_sae: number of atoms in the dictionary.
        """
        batch = self.weights.shape[:-1]
        indices = self.indices.reshape(-1, self.indices.shape[-1])
        weights = self.weights.reshape(-1, self.weights.shape[-1])
        rows = jnp.arange(indices.shape[0])[:, None]
        # An unused slot's index counts from the end, where it adds nothing.
        dense = jnp.zeros((indices.shape[0], d_sae), weights.dtype).at[rows, indices].add(weights)
        return dense.reshape(*batch, d_sae)

    def decode(self, dictionary: Float[Array, "d_sae d_in"]) -> Float[Array, "*batch d_in"]:
        """The signals that the codes stand for.

        Args:
            dictionary: the dictionary that the codes were found in, one atom a row.
        """
        atoms = dictionary[self.indices].astype(self.weights.dtype)
        return jnp.einsum("...k,...kd->...d", self.weights, atoms, precision=PRECISE)


def code_of(
    indices: Int[Array, "batch l0"], weights: Float[Array, "batch l0"], residual_norm: Float[Array, "batch"]
) -> SparseCode:
    """A code from slots in any order, some of them with weight zero.

    Args:
        indices: each slot's atom.
        weights: each slot's weight; zero leaves the slot unused.
        residual_norm: norm of what the code leaves.
    """
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    weights = jnp.take_along_axis(weights, order, axis=1)
    indices = jnp.where(weights == 0, -1, jnp.take_along_axis(indices, order, axis=1))
    return SparseCode(indices, weights, jnp.sum(weights != 0, axis=1), residual_norm)

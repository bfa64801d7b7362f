"""A pursuit in an encoder's place: an autoencoder's dictionary with the codes found at inference time."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.pursuit.gradient_pursuit import gradient_pursuit
from interp_jax.pursuit.sparse_code import SparseCode
from interp_jax.pursuit.sparse_coder import SparseCoder

__all__ = ["PursuitEncoder"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sae"], meta_fields=["l0", "method"])
@dataclasses.dataclass(frozen=True)
class PursuitEncoder(SparseCoder):
    """An autoencoder whose codes are found by pursuit; gradients by signals and dictionary are the pursuit's."""

    method: Callable[..., SparseCode] = gradient_pursuit
    """The pursuit: a function of signals, dictionary and `l0`, such as `orthogonal_matching_pursuit`, or one of these
    with options set by `functools.partial` (which, to be static under jit, must be one and the same object each time).
    """

    def code(self, x: Float[Array, "*batch d_in"]) -> SparseCode:
        """Sparse codes of activations; the autoencoder's encoder is not used.

        Args:
            x: activations.

        Raises:
            ValueError: if they are of another width than the autoencoder's.
        """
        self.check()
        if jnp.shape(x)[-1:] != (self.sae.d_in,):
            raise ValueError(
                f"The activations have the shape {jnp.shape(x)}; expected [..., {self.sae.d_in}], the autoencoder's "
                "d_in."
            )
        return self.method(x - self.sae.b_dec[...], self.sae.W_dec[...], self.l0)

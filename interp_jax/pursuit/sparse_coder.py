"""What stands in an autoencoder's place where codes are found in another way than by its encoder alone.

    coder.encode(x), coder.decode(codes), coder(x)

A coder is an `interp_jax.sae.Autoencoder`: it stands wherever one is read and not trained, in `evaluate`, splicing and
dashboards. It is a pytree of the autoencoder's arrays, so it goes through `jit`, `grad` and `vmap`. The decoder bias is
subtracted before and added after.
"""

import abc
import dataclasses
from typing import Any

from jaxtyping import Array, Float

from interp_jax.pursuit.sparse_code import SparseCode

__all__ = ["SparseCoder"]


@dataclasses.dataclass(frozen=True)
class SparseCoder(abc.ABC):
    """An autoencoder's dictionary with a way of coding."""

    sae: Any
    """The autoencoder: a `SparseAutoencoder` of any kind."""
    l0: int
    """The most latents a signal may use."""

    def check(self) -> None:
        """Refuses a transcoder, whose dictionary is not of its input's space.

        Raises:
            ValueError: if it is one.
        """
        if self.sae.W_skip is not None or self.sae.d_in != self.sae.d_out:
            raise ValueError(
                "a transcoder's dictionary is of its output's space and has no code of its input. Pursue its targets "
                "instead: `gradient_pursuit(target - sae.b_dec[...], sae.W_dec[...], l0)`."
            )

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.sae.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.sae.d_sae

    @property
    def d_out(self) -> int:
        """Width of the output, which is the input's."""
        return self.sae.d_out

    @abc.abstractmethod
    def code(self, x: Float[Array, "*batch d_in"]) -> SparseCode:
        """Sparse codes of activations, which `encode` writes out densely.

        Args:
            x: activations.

        Raises:
            ValueError: if the autoencoder is a transcoder.
        """

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations: at most `l0` entries a row are not zero.

        Args:
            x: activations.
        """
        return self.code(x).dense(self.d_sae)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_in"]:
        """The activations that dense codes stand for.

        Args:
            codes: dense codes.
        """
        return self.sae.decode(codes)

    def skipped(self, x: Float[Array, "*batch d_in"]) -> float:
        """Nothing goes around the latents.

        Args:
            x: activations.
        """
        return 0.0

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_in"]:
        """The reconstruction of activations, without dense codes in between.

        Args:
            x: activations.
        """
        return self.code(x).decode(self.sae.W_dec[...]) + self.sae.b_dec[...]

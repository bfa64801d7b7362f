"""What an autoencoder is to those who read it and do not train it: evaluation, splicing, dashboards.

`SparseAutoencoder` is one, of every kind, and so is `interp_jax.pursuit.PursuitEncoder`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

__all__ = ["Autoencoder"]


@runtime_checkable
class Autoencoder(Protocol):
    """A dictionary with a way of finding codes in it; a pytree."""

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def d_out(self) -> int:
        """Width of the output; that of the input, but for a transcoder."""
        ...

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations."""
        ...

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_out"]:
        """The activations that dense codes stand for, without a transcoder's skip."""
        ...

    def skipped(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"] | float:
        """What goes around the latents; zero where there is no skip."""
        ...

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """The reconstruction of activations; a transcoder's prediction."""
        ...

"""Norms and inverses that are safe at the ends of the floating-point range, forward and backward."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["norm", "safe_inverse"]


def norm(vectors: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """Norms over the last axis that neither overflow nor underflow, with gradient zero at zero; NaN where one is.

    Args:
        vectors: the vectors.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True, initial=0))
    # A larger one has a subnormal inverse, which is zero where a division is compiled as a product with it.
    largest = jnp.minimum(largest, jnp.finfo(vectors.dtype).max / 8)
    is_zero = largest == 0
    squares = jnp.sum(jnp.square(vectors / jnp.where(is_zero, 1, largest)), axis=-1)
    # XLA for CPU leaves a NaN out of a maximum where it computes several numbers at once; a sum does not.
    is_zero, largest = is_zero[..., 0] & (squares == 0), largest[..., 0]
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)) * largest)


def safe_inverse(values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """1/x, and 0 where x is too small to have one, or so large that it is subnormal, which a CPU takes for 0.

    Args:
        values: not negative.
    """
    of_dtype = jnp.finfo(values.dtype)
    is_none = (values < 4 * of_dtype.tiny) | (values >= of_dtype.max / 8)
    return jnp.where(is_none, 0, 1 / jnp.where(is_none, 1, values))

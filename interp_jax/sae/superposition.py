"""Toy activations with a known answer: sparse features in superposition.

Elhage et al., "Toy models of superposition", 2022. More unit directions than dimensions, a few of them active in each
row with exponential strengths. A trained SAE must find the directions again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["random_directions", "superposed"]


def random_directions(key: PRNGKeyArray, n: int, d_in: int) -> Float[Array, "n d_in"]:
    """Unit vectors, independent and uniform on the sphere.

    Args:
        key: random key.
        n: how many.
        d_in: their width.
    """
    directions = jax.random.normal(key, (n, d_in))
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True)


def superposed(
    key: PRNGKeyArray, directions: Float[Array, "n d_in"], batch: int, active: int
) -> Float[Array, "batch d_in"]:
    """Rows that are sums of a few directions with exponentially distributed strengths of mean one.

    Args:
        key: random key.
        directions: the features.
        batch: rows.
        active: features a row; the same one may be drawn twice.
    """
    key_chosen, key_strength = jax.random.split(key)
    chosen = jax.random.randint(key_chosen, (batch, active), 0, len(directions))
    strengths = jax.random.exponential(key_strength, (batch, active))
    return jnp.einsum("bk,bkd->bd", strengths, directions[chosen])

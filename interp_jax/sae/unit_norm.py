"""The constraint that dictionary rows have norm one.

Without it a loss on activations is lowered by shrinking the codes and growing the dictionary. Both halves are needed:
the part of the gradient along a row is removed before the optimiser sees it, since otherwise its moments fill with a
direction that is never followed; and the row is renormalised after the step, since a step along the tangent leaves the
sphere.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["inside", "tangent", "to_norm_at_most_one", "to_unit_norm"]


def tangent(gradient: Float[Array, "d_sae d_in"], rows: Float[Array, "d_sae d_in"]) -> Float[Array, "d_sae d_in"]:
    """The gradient less its part along each row.

    Args:
        gradient: gradient of the dictionary.
        rows: the dictionary, of unit rows.
    """
    return gradient - jnp.sum(gradient * rows, axis=1, keepdims=True) * rows


def to_unit_norm(rows: Float[Array, "d_sae d_in"]) -> Float[Array, "d_sae d_in"]:
    """Rows scaled to norm one; a zero row stays zero.

    Args:
        rows: the dictionary.
    """
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)


def inside(gradient: Float[Array, "d_sae d_in"], rows: Float[Array, "d_sae d_in"]) -> Float[Array, "d_sae d_in"]:
    """The gradient less what would make rows of norm one longer: for the constraint that norms are at most one.

    Args:
        gradient: gradient of the dictionary.
        rows: the dictionary, of norms at most one.
    """
    outward = jnp.sum(gradient * rows, axis=1, keepdims=True)
    square = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
    # A descent step goes against the gradient: it lengthens a row where the part along it is negative.
    is_held = (square >= 1 - 1e-6) & (outward < 0)
    return jnp.where(is_held, gradient - outward / jnp.maximum(square, 1e-30) * rows, gradient)


def to_norm_at_most_one(rows: Float[Array, "d_sae d_in"]) -> Float[Array, "d_sae d_in"]:
    """Rows that are longer scaled to norm one; the others as they are.

    Args:
        rows: the dictionary.
    """
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1)

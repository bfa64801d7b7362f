"""A dictionary as pursuit sees it: which atom fits a residual best, and the atoms by their numbers.

- Atoms may have any norm: each counts as if it had norm one. The correlations are scaled, not the dictionary, of which
  no second copy is made.
- `jnp.argmax` of a [batch, d_sae] matrix does not vectorise on CPU and would cost 40 % of the product. Maxima of blocks
  do, and leave an argmax over the blocks and one inside the best block.
- A dictionary in bfloat16 is multiplied as it is, and summed in float32.
- Inside `jax.shard_map` a table may hold one shard of the dictionary. The best atom is then that of all shards, told by
  one number and one index from each, and of equally good ones the first, as on one device. The dictionary never moves;
  an atom that was picked does.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interp_jax.pursuit.norms import norm, safe_inverse

__all__ = ["AtomTable"]

BLOCK, PART = 128, 32
"""Neighbouring atoms whose best correlation is found together, and a part of them."""


class AtomTable(NamedTuple):
    """The dictionary, or one shard of it."""

    atoms: Float[Array, "n d_in"]
    inverse_norms: Float[Array, "n"]
    axis: str | None = None
    """The mesh's axis that the dictionary is split over, inside `jax.shard_map`."""

    @classmethod
    def of(cls, atoms: Float[Array, "n d_in"], axis: str | None = None) -> "AtomTable":
        """A table of atoms; no derivative goes through it.

        Args:
            atoms: one a row; zero ones correlate with nothing.
            axis: the mesh's axis that they are split over.
        """
        atoms = jax.lax.stop_gradient(atoms)
        return cls(atoms, safe_inverse(norm(atoms.astype(jnp.promote_types(atoms.dtype, jnp.float32)))), axis)

    def best(
        self, residual: Float[Array, "batch d_in"], *, is_signed: bool
    ) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
        """The greatest correlation of each residual with an atom, and that atom; NaN where there is one.

        Args:
            residual: the residuals.
            is_signed: whether the greatest absolute value counts.
        """
        products = jnp.einsum(
            "bd,nd->bn", residual.astype(self.atoms.dtype), self.atoms, preferred_element_type=residual.dtype
        )
        products = jnp.abs(products) if is_signed else products
        score, atom = _first_maximum(products, self.inverse_norms.astype(residual.dtype))
        if self.axis is None:
            return score, atom
        scores = jax.lax.all_gather(score, self.axis)
        atoms = jax.lax.all_gather(atom + self._first(), self.axis)
        shard = jnp.argmax(scores, axis=0)[None]
        return jnp.max(scores, axis=0), jnp.take_along_axis(atoms, shard, axis=0)[0]

    def units(self, picked: Int[Array, "batch"]) -> Float[Array, "batch d_in"]:
        """Atoms by their numbers, scaled to norm one; zero ones stay zero.

        Args:
            picked: their numbers.
        """
        dtype = self.inverse_norms.dtype
        return self._of_all_shards(
            picked, lambda local: self.atoms[local].astype(dtype) * self.inverse_norms[local][:, None]
        )

    def inverses(self, picked: Int[Array, "batch slots"]) -> Float[Array, "batch slots"]:
        """What `units` multiplies atoms by; zero for a number below zero.

        Args:
            picked: their numbers.
        """
        return self._of_all_shards(picked, lambda local: self.inverse_norms[local])

    def _of_all_shards(self, picked: Int[Array, "*which"], found: Callable[[Array], Array]) -> Array:
        """What one shard says of each of its own atoms, by their numbers on it; zeros for numbers below zero."""
        local = picked if self.axis is None else picked - self._first()
        is_own = (picked >= 0) & (local >= 0) & (local < len(self.atoms))
        value = found(jnp.where(is_own, local, 0))
        value = jnp.where(is_own.reshape(is_own.shape + (1,) * (value.ndim - is_own.ndim)), value, 0)
        return value if self.axis is None else jax.lax.psum(value, self.axis)

    def _first(self) -> Int[Array, ""]:
        """The number of this shard's first atom."""
        assert self.axis is not None
        return jax.lax.axis_index(self.axis) * len(self.atoms)


def _first_maximum(
    products: Float[Array, "batch n"], factors: Float[Array, "n"]
) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
    """The greatest of each row's `products * factors` and its first position; NaN where the row holds one.

    Only the products are ever as large as they are: scaled ones are seen by the maximum of their block, and once more,
    in the best block.
    """
    padding = -len(factors) % BLOCK
    if padding:
        # Zeros correlate with nothing, and what correlates with nothing is never picked.
        products, factors = jnp.pad(products, ((0, 0), (0, padding))), jnp.pad(factors, (0, padding))
    n_blocks = len(factors) // BLOCK
    blocks, factors = products.reshape(len(products), n_blocks, BLOCK), factors.reshape(n_blocks, BLOCK)
    # Parts of a block are compared with one another first, number by number: XLA for CPU stores whatever it reduces.
    parts = [blocks[..., first : first + PART] * factors[:, first : first + PART] for first in range(0, BLOCK, PART)]
    maxima = jnp.max(functools.reduce(jnp.maximum, parts), axis=2)
    which = jnp.argmax(maxima, axis=1)
    block = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0] * factors[which]
    return jnp.max(maxima, axis=1), which * BLOCK + jnp.argmax(block, axis=1)

"""Rows of a table, as of an embedding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["rows_of"]

_BITS_OF_NAN = 0x7FC0


def rows_of(table: Float[Array, "n_rows width"], numbers: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
    """Rows by their numbers; NaN for a number that no row has, where nothing can raise.

    Args:
        table: what they are rows of.
        numbers: from 0.
    """
    return _rows_in_bfloat16(table, numbers) if table.dtype == jnp.bfloat16 else _gathered(table, numbers, jnp.nan)


def _gathered(table: Array, numbers: Array, elsewhere: Any) -> Array:
    return table.at[numbers].get(mode="fill", fill_value=elsewhere, wrap_negative_indices=False)


@jax.custom_jvp
def _rows_in_bfloat16(table: Array, numbers: Array) -> Array:
    return _moved_as_bits(table, numbers)


@_rows_in_bfloat16.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    table, numbers = primals
    return _rows_in_bfloat16(table, numbers), _gathered(tangents[0], numbers, 0)


@functools.partial(jax.jit, inline=True)  # One function for every eager call, or each would compile its branches anew.
def _moved_as_bits(table: Array, numbers: Array) -> Array:
    """XLA for CPU moves no bfloat16: it would widen the whole table to float32 first."""

    def on_cpu(table: Array, numbers: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
        return jax.lax.bitcast_convert_type(_gathered(bits, numbers, _BITS_OF_NAN), table.dtype)

    def otherwise(table: Array, numbers: Array) -> Array:
        return _gathered(table, numbers, jnp.nan)

    return jax.lax.platform_dependent(table, numbers, cpu=on_cpu, default=otherwise)

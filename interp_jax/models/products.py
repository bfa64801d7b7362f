"""Products of activations with weights and with each other, each in the way that is fast on the device it runs on.

A product is written down as for any device, and XLA's choice is left alone on a TPU or a GPU. On a CPU it needs help:

- One row times a matrix is left to one core (`_row_times`).
- A few rows times a matrix go up to 1.6 times as fast where the matrix stands first and lies by its outputs
  (`times_turned`).
- Of a product in bfloat16 XLA first widens both factors, weights and all: that takes more time and memory than float32.
  Asked for the sums in float32, it leaves the factors to the processor's own instructions (AVX512_BF16, AMX), which
  take half of float32's time. So they are asked for, and rounded after (`product`). Where a processor has no such
  instructions it widens as before.

And on a GPU in one case: a product of bfloat16 with one row XLA makes sums of, whose terms it rounds to bfloat16 one by
one (seen on an H100: errors of a hundredth). There, too, sums in float32 are asked for, if not in its derivatives.

Which way is taken is decided where the program is compiled for a device, so that a program for another one can be
compiled anywhere.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

__all__ = ["FEW_ROWS", "Turned", "product", "times", "times_turned"]

FEW_ROWS = 32
"""Up to so many rows a product on a CPU is faster with the matrix first (`times_turned`)."""


class Turned(nnx.Param):
    """A weight that lies as `[*outputs, *inputs]`; see `step_layout`."""


def times(x: Array, parameter: nnx.Param, axes: int = 1) -> Array:
    """The last axes of `x[*rows, *inputs]` times the first of a weight `[*inputs, *outputs]`, in the dtype of `x`.

    Args:
        x: activations.
        parameter: the weight, in its dtype and as it lies.
        axes: how many axes the inputs have.
    """
    weight = parameter[...].astype(x.dtype)
    rows, inputs = x.shape[:-axes], x.shape[-axes:]
    if isinstance(parameter, Turned):
        flat = x.reshape(*rows, -1), weight.reshape(-1, math.prod(inputs))
        return times_turned(*flat).reshape(*rows, *weight.shape[:-axes])
    outputs = weight.shape[axes:]
    if math.prod(rows) == 1 and math.prod(inputs) % 2 == 0:
        return _row_times(x.reshape(-1), weight.reshape(math.prod(inputs), -1)).reshape(*rows, *outputs)
    if weight.ndim == 2:
        return product("...i,io->...o", x, weight)
    return _rows_times(x.reshape(*rows, -1), weight, axes).reshape(*rows, *outputs)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rows_times(x: Float[Array, "*rows d_in"], weight: Array, axes: int) -> Float[Array, "*rows d_out"]:
    """The same with the heads of each side as one axis.

    A sum over two axes of a matrix, which a backward pass would ask for, XLA transposes the matrix for on a CPU. Under
    `checkpoint` the backward pass keeps the weights as they lie in their stack, and no matrices made of them.
    """
    return product("...i,io->...o", x, weight.reshape(math.prod(weight.shape[:axes]), -1))


def product(subscripts: str, x: Array, y: Array) -> Array:
    """`jnp.einsum(subscripts, x, y)` of two arrays of one dtype, in that dtype.

    Args:
        subscripts: as einsum's.
        x: the first factor.
        y: the second.
    """
    if x.dtype != jnp.bfloat16:
        return jnp.einsum(subscripts, x, y)
    return _product_in_bfloat16(subscripts, x, y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product_in_bfloat16(subscripts: str, x: Array, y: Array) -> Array:
    """`product`, whose derivative is plain einsum's: a rounded float32 sum's would multiply two dtypes."""
    return _summed_in_float32(subscripts, x, y)


def _derivative(subscripts: str, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    (x, y), (dx, dy) = primals, tangents
    parts = [(dx, y), (x, dy)]  # one of them at least is there, or JAX would not ask
    parts = [part for part in parts if not any(isinstance(each, SymbolicZero) for each in part)]
    first, *rest = (jnp.einsum(subscripts, *part) for part in parts)
    return _product_in_bfloat16(subscripts, x, y), sum(rest, first)


_product_in_bfloat16.defjvp(_derivative, symbolic_zeros=True)


@functools.partial(jax.jit, inline=True, static_argnums=0)
def _summed_in_float32(subscripts: str, x: Array, y: Array) -> Array:
    def rounded_once(x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    plain = functools.partial(jnp.einsum, subscripts)
    on_gpu = rounded_once if _has_one_row(subscripts, x, y) else plain
    return jax.lax.platform_dependent(x, y, cpu=rounded_once, cuda=on_gpu, rocm=on_gpu, default=plain)


def _has_one_row(subscripts: str, x: Array, y: Array) -> bool:
    """Whether a matrix is multiplied with one row or column, in each example of a batch; dots stand in front alone."""
    inputs, output = subscripts.split("->")
    of_x, of_y = inputs.split(",")

    def rows(mine: str, other: str, shape: tuple[int, ...]) -> Any:
        labels = mine.removeprefix("...")
        before = len(shape) - len(labels)
        named = zip(labels, shape[before:], strict=True)
        return math.prod((*shape[:before], *(size for label, size in named if label in output and label not in other)))

    found = rows(of_x, of_y, x.shape), rows(of_y, of_x, y.shape)
    return any(isinstance(each, int) and each == 1 for each in found)  # in an export of any batch size it is no number


@functools.partial(jax.jit, inline=True)  # One function for every eager call, or each would compile its branches anew.
def _row_times(row: Float[Array, "d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "d_out"]:
    """One row, as in generation.

    On a CPU in two halves, which are summed: XLA leaves a vector times a matrix to one core, and gives a pair of
    matrices times a pair of vectors to all. In bfloat16 it does neither fast, but two rows, be they the same.
    """

    def on_cpu(row: Array, weight: Array) -> Array:
        if row.dtype == jnp.bfloat16:
            return product("ri,io->ro", jnp.broadcast_to(row, (2, *row.shape)), weight)[0]
        halves = weight.reshape(2, -1, weight.shape[1]), row.reshape(2, -1, 1)
        return jax.lax.dot_general(*halves, (((1,), (1,)), ((0,), (0,)))).sum(axis=0)[:, 0]

    return jax.lax.platform_dependent(row, weight, cpu=on_cpu, default=functools.partial(product, "i,io->o"))


def times_turned(x: Float[Array, "*rows d_in"], weight: Float[Array, "d_out d_in"]) -> Float[Array, "*rows d_out"]:
    """Rows times a matrix that lies as its outputs by its inputs.

    Args:
        x: activations.
        weight: in the same dtype.
    """
    n_rows = math.prod(x.shape[:-1])
    is_known = isinstance(n_rows, int)  # in an export of any batch size it is not
    if not is_known or n_rows > FEW_ROWS or (n_rows == 1 and x.dtype != jnp.bfloat16):
        return product("...i,oi->...o", x, weight)
    return _few_rows_times(x.reshape(n_rows, -1), weight).reshape(*x.shape[:-1], -1)


@functools.partial(jax.jit, inline=True)
def _few_rows_times(rows: Float[Array, "rows d_in"], weight: Float[Array, "d_out d_in"]) -> Float[Array, "rows d_out"]:
    """A few rows.

    On a CPU the matrix stands first: XLA gets through it up to 1.6 times as fast as where the rows do. The barrier
    keeps XLA from turning the product round again. In bfloat16 the rows may stand first, if there are two.
    """

    def rows_first(rows: Array, weight: Array) -> Array:
        return product("ri,oi->ro", rows, weight)

    def on_cpu(rows: Array, weight: Array) -> Array:
        if rows.dtype != jnp.bfloat16:
            return jax.lax.optimization_barrier(jnp.einsum("oi,ri->or", weight, rows)).T
        n_rows = len(rows)
        return rows_first(jnp.broadcast_to(rows, (max(2, n_rows), rows.shape[1])), weight)[:n_rows]

    return jax.lax.platform_dependent(rows, weight, cpu=on_cpu, default=rows_first)

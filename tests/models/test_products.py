"""Products in bfloat16, against NumPy's in double precision, and the programs that they become."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interp_jax.models.products import FEW_ROWS, Turned, product, times, times_turned

SHAPES = {
    "rows": ("...i,io->...o", (5, 7, 48), (48, 20)),
    "scores": ("bqgmd,bgkd->bgmqk", (2, 5, 3, 2, 16), (2, 3, 6, 16)),
    "mixed": ("bgmqk,bgkd->bgmqd", (2, 3, 2, 5, 6), (2, 3, 6, 16)),
}


def drawn(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def wide(x):
    return np.asarray(x, np.float64)


def assert_rounded_once(found, exact):
    """What was summed in float32 and rounded to bfloat16's 8 bits is at most half a unit of the last of them away.

    Where a sum cancels, what is left has float32's error of its terms, a few millionths.
    """
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(found), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_product_is_the_exact_one_rounded(case, way):
    subscripts, *shapes = SHAPES[case]
    x, y = drawn(*shapes)
    assert_rounded_once(way(lambda x, y: product(subscripts, x, y))(x, y), np.einsum(subscripts, wide(x), wide(y)))


@pytest.mark.parametrize("n_rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_however_a_weight_lies_a_product_is_the_exact_one_rounded(n_rows):
    x, weight = drawn((n_rows, 1, 3, 16), (3, 16, 2, 10))
    exact = np.einsum("bshi,hino->bsno", wide(x), wide(weight))
    turned = jnp.moveaxis(weight, (0, 1), (2, 3))
    assert_rounded_once(jax.jit(lambda x: times(x, nnx.Param(weight), axes=2))(x), exact)
    assert_rounded_once(jax.jit(lambda x: times(x, Turned(turned), axes=2))(x), exact)
    flat = turned.reshape(20, 48)
    assert_rounded_once(jax.jit(times_turned)(x.reshape(n_rows, 1, 48), flat), exact.reshape(n_rows, 1, 20))


@pytest.mark.parametrize("case", SHAPES)
def test_derivatives_are_those_of_the_exact_product(case):
    subscripts, *shapes = SHAPES[case]
    of_out = np.einsum(subscripts, *map(np.ones, shapes)).shape
    keys = jax.random.split(jax.random.key(1), 5)
    # Small whole numbers, whose sums bfloat16 holds: what is compared is exact, in whichever way XLA sums.
    each = [jax.random.randint(k, shape, -1, 2) for k, shape in zip(keys, (*shapes, *shapes, of_out), strict=True)]
    x, y, dx, dy, weights = (value.astype(jnp.bfloat16) for value in each)
    wide_x, wide_y, wide_dx, wide_dy, wide_weights = map(wide, each)

    def ours(x, y):
        return product(subscripts, x, y)

    def exact(x, y):
        return np.einsum(subscripts, x, y)

    of_x, of_y = jax.vjp(ours, x, y)[1](weights)
    inputs, output = subscripts.split("->")
    first, second = inputs.split(",")
    for found, expected in (
        (jax.jvp(ours, (x, y), (dx, dy))[1], exact(wide_dx, wide_y) + exact(wide_x, wide_dy)),
        (jax.jvp(lambda y: ours(x, y), (y,), (dy,))[1], exact(wide_x, wide_dy)),
        (of_x, np.einsum(f"{output},{second}->{first}", wide_weights, wide_y)),
        (
            of_y,
            np.einsum(f"{first.replace('...', 'ab')},{output.replace('...', 'ab')}->{second}", wide_x, wide_weights),
        ),
        (jax.vjp(lambda y: ours(x, y), y)[1](weights)[0], of_y),
        (jax.vmap(ours)(jnp.stack([x, dx]), jnp.stack([y, dy]))[1], exact(wide_dx, wide_dy)),
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(wide(found), wide(expected))


def test_float32_sums_are_asked_for_on_a_cpu_alone():
    x, weight = drawn((40, 48), (48, 20))
    multiplied = jax.jit(lambda x, y: product("...i,io->...o", x, y))

    def sums(platform):
        program = jax.export.export(multiplied, platforms=[platform])(x, weight).mlir_module()
        return re.search(r"dot_general.*-> tensor<40x20x(\w+)>", program)[1]

    assert [sums(platform) for platform in ("cpu", "tpu", "cuda")] == ["f32", "bf16", "bf16"]


@pytest.mark.parametrize(
    ("subscripts", "of_x", "of_y", "dtype"),
    [
        ("i,io->o", (48,), (48, 20), "f32"),
        ("...i,oi->...o", (1, 1, 48), (20, 48), "f32"),
        ("...i,oi->...o", (1, 2, 48), (20, 48), "bf16"),
        ("bqgmd,bgkd->bgmqk", (4, 1, 2, 1, 8), (4, 2, 5, 8), "f32"),  # a step's query, a head for each key
        ("bqgmd,bgkd->bgmqk", (4, 1, 2, 3, 8), (4, 2, 5, 8), "bf16"),
        ("bqgmd,bgkd->bgmqk", (4, 7, 2, 3, 8), (4, 2, 1, 8), "f32"),
    ],
)
def test_on_a_gpu_the_sums_of_one_row_are_in_float32(subscripts, of_x, of_y, dtype):
    x, y = drawn(of_x, of_y)
    multiplied = jax.jit(lambda x, y: product(subscripts, x, y))

    def sums(platform):
        program = jax.export.export(multiplied, platforms=[platform])(x, y).mlir_module()
        return re.search(r"dot_general.*-> tensor<[\dx]+x(\w+)>", program)[1]

    assert [sums(platform) for platform in ("cuda", "tpu")] == [dtype, "bf16"]


def test_a_program_may_be_exported_for_any_number_of_rows():
    (n_rows,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n_rows, 48), jnp.float32), jax.ShapeDtypeStruct((20, 48), jnp.float32)
    program = jax.export.export(jax.jit(times_turned))(*shapes)
    x, weight = np.random.default_rng(0).normal(size=(7, 48)), np.random.default_rng(1).normal(size=(20, 48))
    # Sums of 48 terms in float32 against double precision.
    np.testing.assert_allclose(program.call(np.float32(x), np.float32(weight)), x @ weight.T, rtol=1e-5, atol=1e-5)

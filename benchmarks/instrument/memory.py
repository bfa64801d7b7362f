"""Temporary memory of compiled layer scans; nothing is run.

Memory is measured in the type that the backend multiplies in: XLA for CPU keeps an f32 copy of stacked weights in bf16,
XLA for TPU a bf16 copy of those in f32.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import interp_jax as ij
from benchmarks.instrument.neox import PYTHIA_1_4B, block, scanned
from benchmarks.instrument.rows import Row, temp_bytes


def rows() -> Iterator[Row]:
    """One layer fetched, and the gradient at one layer."""
    yield from fetching()
    yield from gradient()


LAYERS, D, POSITIONS, FETCHED = 24, 2048, 4096, 12


def fetching() -> Iterator[Row]:
    """One of 24 layers of 34 MB (32 MiB) each."""

    def body(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        return x + ij.site(jnp.tanh(x @ weights), "mlp_out"), None

    def model(weights: jax.Array, x: jax.Array) -> jax.Array:
        return ij.layer_scan(body, x, weights)[0]

    def stacked(weights: jax.Array, x: jax.Array) -> Any:
        def body(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = jnp.tanh(x @ weights)
            return x + out, out

        x, outs = jax.lax.scan(body, x, weights)
        return x, outs[FETCHED]

    args = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32), jax.ShapeDtypeStruct((POSITIONS, D), jnp.float32)
    plain = temp_bytes(lambda weights, x: jax.lax.scan(body, x, weights)[0], *args)
    fetched = temp_bytes(ij.fetch(model, "mlp_out", FETCHED), *args)
    indexed = temp_bytes(stacked, *args)
    yield Row("temporary memory, 1 of 24 layers of 34 MB fetched / plain scan", "B", fetched, plain, 1.02)
    yield Row("temporary memory, all stacked, then 1 indexed / plain scan", "B", indexed, plain)


ROWS, TOKENS, DIFFERENTIATED = 8, 1024, 12


def gradient(dtype: Any = jnp.float32, sharding: jax.sharding.Sharding | None = None) -> Iterator[Row]:
    """The gradient of a scalar with respect to the middle layer's `mlp_out`, every layer checkpointed.

    Setting: Pythia-1.4B's shape (24 layers, d 2048, 16 heads, mlp 8192), 8 rows of 1024 tokens.
    """

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weights(*stack: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: array(*stack, *shape) for name, shape in PYTHIA_1_4B.layer().items()}

    layers, x = PYTHIA_1_4B.layers, array(ROWS, TOKENS, PYTHIA_1_4B.d_model)

    def objective(weights: Any, x: jax.Array) -> jax.Array:
        return (scanned(weights, x, ij.layer_scan, jax.checkpoint(block)) ** 2).mean()

    def by_hand(weights: Any, x: jax.Array) -> Any:
        def run(zero: jax.Array, x: jax.Array) -> jax.Array:
            def add(value: jax.Array, name: str) -> jax.Array:
                return value + zero if name == "mlp_out" else value

            for layer, one in enumerate(weights):
                mark = add if layer == DIFFERENTIATED else unmarked
                x = jax.checkpoint(functools.partial(block, mark=mark))(one, x)
            return (x**2).mean()

        def unmarked(value: jax.Array, name: str) -> jax.Array:
            return value

        return jax.value_and_grad(run)(jnp.zeros_like(x), x)

    def split_by_hand(weights: Any, x: jax.Array) -> Any:
        def part(x: jax.Array, zero: jax.Array | None, first: int, last: int) -> jax.Array:
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def layer(x: jax.Array, number: jax.Array) -> jax.Array:
                def mark(value: jax.Array, name: str) -> jax.Array:
                    if zero is None or name != "mlp_out":
                        return value
                    return value + jnp.where(number == DIFFERENTIATED, zero, 0)

                one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), weights)
                return block(one, x, mark)

            return jax.lax.scan(lambda x, number: (layer(x, number), None), x, jnp.arange(first, last))[0]

        def run(zero: jax.Array, x: jax.Array) -> jax.Array:
            return (part(part(x, None, 0, DIFFERENTIATED), zero, DIFFERENTIATED, layers) ** 2).mean()

        return jax.value_and_grad(run)(jnp.zeros_like(x), x)

    ours = temp_bytes(ij.gradients(objective, "mlp_out", DIFFERENTIATED), weights(layers), x)
    other = temp_bytes(by_hand, [weights() for _ in range(layers)], x)
    yield Row("temporary memory, gradient at layer 12 of 24, scan / unrolled by hand", "B", ours, other, 1.1)
    split = temp_bytes(split_by_hand, weights(layers), x)
    yield Row("temporary memory, the same gradient, scan / two scans by hand", "B", ours, split)

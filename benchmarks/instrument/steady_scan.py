"""A compiled layer scan in which the loop reads or changes k layers, beside a scan in which that is done by hand.

The same model as in `stack.py`, its layers stacked. By hand, what is read goes into a buffer in the scan's carry,
written under a `cond`, or is stacked where every layer is read; what is changed is scaled by a number that is scanned
over.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import interp_jax as ij
from benchmarks.instrument.rows import Row, seconds
from benchmarks.instrument.stack import LAYERS, arguments, block

ROUNDS = 60
LAYER_SETS: dict[int, Collection[int]] = {1: (6,), 6: range(0, LAYERS, 2), LAYERS: range(LAYERS)}

Function = Callable[[Any, jax.Array], Any]


def rows() -> Iterator[Row]:
    """k = 1, 6 and 12 of the 12 layers."""
    params, x = arguments()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    for verb, by_loop, by_hand in (("read", read, read_by_hand), ("changed", changed, changed_by_hand)):
        for count, layers in LAYER_SETS.items():
            ours, other = seconds([_run(by_loop(layers), stacked, x), _run(by_hand(layers), stacked, x)], ROUNDS)
            yield Row(f"steady state, {count} layers of a scan {verb}, loop / by hand", "s", ours, other, 1.02)


def _run(function: Function, *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: compiled(*args)


def model(params: Any, x: jax.Array) -> jax.Array:
    """The model, its layers in a scan."""
    return ij.layer_scan(lambda x, weights: (block(x, weights, None, ij.site), None), x, params)[0]


def read(layers: Collection[int]) -> Function:
    """Carries `mlp_out` of these layers out."""
    return ij.fetch(model, "mlp_out", layers)


def read_by_hand(layers: Collection[int]) -> Function:
    """`read`, written into the scan."""
    row_of = jnp.array([list(layers).index(layer) if layer in layers else -1 for layer in range(LAYERS)])

    def some(params: Any, x: jax.Array) -> Any:
        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            (x, buffer), (weights, row) = carry, xs
            x, value = _with_mlp_out(x, weights)
            buffer = jax.lax.cond(row >= 0, lambda: buffer.at[row].set(value), lambda: buffer)
            return (x, buffer), None

        (x, buffer), _ = jax.lax.scan(body, (x, jnp.zeros((len(layers), *x.shape))), (params, row_of))
        return x, list(buffer)

    def every(params: Any, x: jax.Array) -> Any:
        x, stacked = jax.lax.scan(_with_mlp_out, x, params)
        return x, list(stacked)

    return every if len(layers) == LAYERS else some


def _with_mlp_out(x: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
    values = {}

    def mark(value: jax.Array, name: str, *, layer: int | None) -> jax.Array:
        values[name] = value
        return value

    return block(x, weights, None, mark), values["mlp_out"]


def changed(layers: Collection[int]) -> Function:
    """Scales `mlp_out` of these layers, each by a number of its own."""

    def run(params: Any, x: jax.Array) -> Any:
        for layer, _, value in (running := ij.iterate(model, sites="mlp_out", layers=layers)(params, x)):
            running.modified_value = value * _scale(layer)
        return running.retval

    return run


def changed_by_hand(layers: Collection[int]) -> Function:
    """`changed`, written into the scan."""
    scales = jnp.array([_scale(layer) if layer in layers else 1.0 for layer in range(LAYERS)])

    def run(params: Any, x: jax.Array) -> Any:
        def body(x: jax.Array, xs: Any) -> tuple[jax.Array, None]:
            weights, scale = xs

            def mark(value: jax.Array, name: str, *, layer: int | None) -> jax.Array:
                return value * scale if name == "mlp_out" else value

            return block(x, weights, None, mark), None

        return jax.lax.scan(body, x, (params, scales))[0]

    return run


def _scale(layer: Any) -> float:
    return 1 - 0.01 * (layer + 1)

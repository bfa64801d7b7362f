"""How long tracing takes under the loop: at every site, and through functions nested in functions."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import interp_jax as ij
from benchmarks.instrument.rows import Row, seconds
from benchmarks.instrument.stack import Params, arguments, block, make_model, unmarked

DEPTHS = (1, 5, 10)
ROUNDS = 20
TRANSFORMATIONS: dict[str, Callable[..., Any]] = {"jit": jax.jit, "checkpoint": jax.checkpoint}


def rows() -> Iterator[Row]:
    """The 12-layer model with 72 sites, then nests of 1, 5 and 10 functions."""
    args = arguments()
    visit, ours, by_hand, plain = seconds(
        [_tracing(function, *args) for function in (visited, looped, looped_by_hand, make_model(unmarked))], ROUNDS
    )
    yield Row("tracing, 72 sites, one changed and 12 read, loop / by hand", "s", ours, by_hand, 1.5)
    yield Row("tracing, 72 sites visited and left alone / no sites", "s", visit, plain, 1.5)
    yield Row("tracing, 72 sites, one changed and 12 read, loop / no sites", "s", ours, plain)
    for name, transformation in TRANSFORMATIONS.items():
        runs = [
            _tracing(nest(transformation, depth), args[0], args[1])
            for depth in DEPTHS
            for nest in (nested_loop, nested_by_hand)
        ]
        times = seconds(runs, ROUNDS)
        for depth, ours, by_hand in zip(DEPTHS, times[::2], times[1::2], strict=True):
            yield Row(f"tracing, {name} nested {depth} deep, loop / by hand", "s", ours, by_hand)
        yield Row(f"tracing, {name} nested 10 deep / 5 deep, both by loop", "s", times[4], times[2], 2.2)


def _tracing(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    def run() -> None:
        # A new function object each time, or JAX's cache would answer.
        jax.make_jaxpr(lambda *args: function(*args))(*args)

    return run


def visited(params: Params, x: jax.Array) -> jax.Array:
    """Every site is visited, and nothing done there."""
    for _ in (running := ij.iterate(make_model(ij.site))(params, x)):
        pass
    return running.retval


def looped(params: Params, x: jax.Array) -> Any:
    """Every site is visited; one value is changed, and the norm of every `resid_post` carried out."""
    for layer, name, value in (running := ij.iterate(make_model(ij.site))(params, x)):
        if name == "mlp_out" and layer == 6:
            running.modified_value = value * 0.5
        if name == "resid_post":
            running.save(layer, jnp.linalg.norm(value))
    return running.retval, running.saved


def looped_by_hand(params: Params, x: jax.Array) -> Any:
    """`looped`, written into the model."""
    norms = {}

    def mark(value: jax.Array, name: str, *, layer: int | None) -> jax.Array:
        if name == "mlp_out" and layer == 6:
            return value * 0.5
        if name == "resid_post":
            norms[layer] = jnp.linalg.norm(value)
        return value

    return make_model(mark)(params, x), norms


def nested(transformation: Callable[..., Any], depth: int, block: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks one inside another, each in a transformed function: `block(weights, x, layer, inner)`.

    The functions are new ones, so that JAX's caches know none of them.
    """

    def at(layer: int) -> Callable[..., Any]:
        def run(params: Params, x: jax.Array) -> Any:
            inner = at(layer + 1) if layer + 1 < depth else None
            return block(params, x, layer, inner)

        return transformation(run)

    return at(0)


def nested_loop(transformation: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """One site changed and one read at every level, by the loop."""

    def level(params: Params, x: jax.Array, layer: int, inner: Callable[..., Any] | None) -> jax.Array:
        x = block(x, params[layer], layer, ij.site)
        return x if inner is None else inner(params, x)

    def run(params: Params, x: jax.Array) -> Any:
        model = nested(transformation, depth, level)
        for layer, name, value in (running := ij.iterate(model)(params, x)):
            if name == "mlp_out":
                running.modified_value = value * 0.5
            if name == "resid_post":
                running.save(layer, jnp.linalg.norm(value))
        return running.retval, running.saved

    return run


def nested_by_hand(transformation: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """`nested_loop`, written into the model."""

    def level(params: Params, x: jax.Array, layer: int, inner: Callable[..., Any] | None) -> Any:
        norms = {}

        def mark(value: jax.Array, name: str, *, layer: int | None) -> jax.Array:
            if name == "mlp_out":
                return value * 0.5
            if name == "resid_post":
                norms[layer] = jnp.linalg.norm(value)
            return value

        x = block(x, params[layer], layer, mark)
        if inner is None:
            return x, norms
        x, inner_norms = inner(params, x)
        return x, {**norms, **inner_norms}

    return lambda params, x: nested(transformation, depth, level)(params, x)

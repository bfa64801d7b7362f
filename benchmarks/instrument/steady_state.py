"""A compiled function that reads or changes k sites by the loop, beside one that does so by hand."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

import interp_jax as ij
from benchmarks.instrument.rows import Row, seconds
from benchmarks.instrument.stack import SITES, Params, Site, arguments, make_model

Function = Callable[[Any, jax.Array], Any]

ROUNDS = 80


def rows() -> Iterator[Row]:
    """k = 1, 6 and 72 of the 72 sites, of a model whose layers are a Python loop."""
    args = arguments()
    for verb, by_loop, by_hand in (("read", read, read_by_hand), ("changed", changed, changed_by_hand)):
        for count, sites in SITES.items():
            ours, other = seconds([_run(by_loop(sites), args), _run(by_hand(sites), args)], ROUNDS)
            yield Row(f"steady state, {count} sites {verb}, loop / by hand", "s", ours, other, 1.02)


def _run(function: Function, args: tuple[Params, jax.Array]) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: compiled(*args)


def read(sites: Collection[Site]) -> Function:
    """Carries the values of these sites out."""

    def run(params: Params, x: jax.Array) -> Any:
        for layer, name, value in (running := ij.iterate(make_model(ij.site))(params, x)):
            if (layer, name) in sites:
                running.save((layer, name), value)
        return running.retval, list(running.saved.values())

    return run


def read_by_hand(sites: Collection[Site]) -> Function:
    """`read`, written into the model."""

    def run(params: Params, x: jax.Array) -> Any:
        values = []

        def mark(value: jax.Array, name: str, *, layer: int | None) -> jax.Array:
            if (layer, name) in sites:
                values.append(value)
            return value

        return make_model(mark)(params, x), values

    return run


def changed(sites: Collection[Site]) -> Function:
    """Scales the values of these sites, each by a number of its own."""

    def run(params: Params, x: jax.Array) -> Any:
        for layer, name, value in (running := ij.iterate(make_model(ij.site))(params, x)):
            if (layer, name) in sites:
                running.modified_value = value * _scale(layer)
        return running.retval

    return run


def changed_by_hand(sites: Collection[Site]) -> Function:
    """`changed`, written into the model."""

    def mark(value: jax.Array, name: str, *, layer: int | None) -> jax.Array:
        return value * _scale(layer) if (layer, name) in sites else value

    return make_model(mark)


def _scale(layer: Any) -> Any:
    return 1 - 0.01 * (layer + 1)

"""A tagged model with nothing listening: it must be the untagged one."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import interp_jax as ij
from benchmarks.instrument.rows import Row, memory_analysis, seconds
from benchmarks.instrument.stack import LAYERS, Mark, arguments, make_model, unmarked


def rows() -> Iterator[Row]:
    """The jaxpr, jit's dispatch and the memory of both."""
    args = arguments()
    tagged, untagged = make_model(ij.site), make_model(unmarked)
    jaxpr, untagged_jaxpr = (str(jax.make_jaxpr(model)(*args)) for model in (tagged, untagged))
    if jaxpr != untagged_jaxpr:
        raise AssertionError(f"the tagged model's jaxpr differs from the untagged one's:\n{jaxpr}\n{untagged_jaxpr}")
    yield Row("nothing listening: characters of the jaxpr, the same", "", len(jaxpr), len(untagged_jaxpr), 1.0)
    yield Row("nothing listening: peak memory", "B", _peak(tagged), _peak(untagged), 1.0)
    ours, other = seconds([_dispatches(ij.site), _dispatches(unmarked)], 61)
    yield Row("nothing listening: one dispatch", "s", ours / DISPATCHES, other / DISPATCHES, 1.02)


DISPATCHES = 1000


def _peak(model: Callable[..., jax.Array]) -> int:
    found = memory_analysis(jax.jit(model).lower(*arguments()).compile())
    return found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes


def _dispatches(mark: Mark) -> Callable[[], None]:
    # Weights of one element leave nothing but the dispatch to measure.
    params = [(jnp.ones((1, 1)), jnp.ones((1, 1)))] * LAYERS
    compiled = jax.jit(lambda x: make_model(mark)(params, x))
    x = jnp.ones((1, 1))

    def run() -> None:
        for _ in range(DISPATCHES):
            compiled(x)

    return run

"""What the loop costs, beside the same work written by hand; one run, medians and ratios.

    python -m benchmarks.instrument

Setting: a 12-layer transformer-like stack in f32, 6 sites a layer, d 256, batch 8 x 64. Timings alternate A B A B, so
that a drift of the machine falls on both.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import interp_jax as ij

LAYERS, D, ROWS = 12, 256, 512
NAMES = ("resid_pre", "mlp_in", "mlp_pre", "mlp_act", "mlp_out", "resid_post")


def make_model(mark: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The stack, its six values a layer passed through `mark`."""

    def model(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
        for layer, (w_in, w_out) in enumerate(params):
            x = mark(x, "resid_pre", layer=layer)
            normed = mark(x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6), "mlp_in", layer=layer)
            pre = mark(normed @ w_in, "mlp_pre", layer=layer)
            act = mark(jax.nn.gelu(pre), "mlp_act", layer=layer)
            out = mark(act @ w_out, "mlp_out", layer=layer)
            x = mark(x + out, "resid_post", layer=layer)
        return x

    return model


def looped(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every site visited; one value changed and the norm of every `resid_post` carried out."""
    for layer, name, value in (running := ij.iterate(tagged)(params, x)):
        if name == "mlp_out" and layer == 6:
            running.modified_value = value * 0.5
        if name == "resid_post":
            running.save(layer, jnp.linalg.norm(value))
    return running.retval, jnp.stack(list(running.saved.values()))


def by_hand(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, written into the model."""
    norms = []

    def mark(value: jax.Array, name: str, *, layer: int) -> jax.Array:
        if name == "mlp_out" and layer == 6:
            return value * 0.5
        if name == "resid_post":
            norms.append(jnp.linalg.norm(value))
        return value

    return make_model(mark)(params, x), jnp.stack(norms)


tagged = make_model(ij.site)
untagged = make_model(lambda value, name, *, layer: value)


def seconds(function: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for which, run in enumerate((function, other)):
            start = time.perf_counter()
            run()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Prints the table and writes it as JSON."""
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS)
    params = [
        (jax.random.normal(keys[2 * i], (D, 4 * D)) / D**0.5, jax.random.normal(keys[2 * i + 1], (4 * D, D)) / D)
        for i in range(LAYERS)
    ]
    x = jax.random.normal(jax.random.key(1), (ROWS, D))

    def trace(function: Callable[..., object]) -> Callable[[], object]:
        # A new function object each time, or JAX's cache would answer.
        return lambda: jax.make_jaxpr(lambda params, x: function(params, x))(params, x)

    def run(function: Callable[..., object]) -> Callable[[], object]:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(params, x))
        return lambda: jax.block_until_ready(compiled(params, x))

    def dispatch(model: Callable[..., jax.Array]) -> Callable[[], object]:
        compiled = jax.jit(lambda x: model([], x))
        small = jnp.ones(())
        compiled(small)
        return lambda: [compiled(small) for _ in range(1000)]

    rows = {
        "tracing, 72 sites under the loop / the untagged model": seconds(trace(looped), trace(untagged), 15),
        "tracing, 72 sites under the loop / the same by hand": seconds(trace(looped), trace(by_hand), 15),
        "steady state under jit, the loop / the same by hand": seconds(run(looped), run(by_hand), 31),
        "steady state, tagged with nothing listening / untagged": seconds(run(tagged), run(untagged), 31),
        "1000 dispatches, tagged with nothing listening / untagged": seconds(dispatch(tagged), dispatch(untagged), 15),
    }
    print(f"JAX {jax.__version__}; median ms, and their ratio")
    for name, (ours, other) in rows.items():
        print(f"{name:<60} {ours * 1e3:9.2f} {other * 1e3:9.2f} {ours / other:7.3f}")
    same = str(jax.make_jaxpr(tagged)(params, x)) == str(jax.make_jaxpr(untagged)(params, x))
    print(f"the tagged model's jaxpr equals the untagged one's: {same}")
    results = pathlib.Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    (results / "instrument.json").write_text(json.dumps({"jax": jax.__version__, "seconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

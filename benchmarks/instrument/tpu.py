"""The layer scan compiled ahead of time for TPUs; no TPU is needed.

    make bench-tpu, or: python -m benchmarks.instrument.tpu

Setting: Pythia-12B's shape (36 layers, d 5120, 40 heads, mlp 20480) in bf16, 8 rows of 1024 tokens, for the 8 chips of
v5e:2x4 and of v5p:2x2x2, in a mesh of 2 (data) by 4 (model). Seconds are XLA's on this machine's CPU, medians of
compiles taken in turn; tracing has rows of its own. Temporary memory and program size are a chip's.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import interp_jax as ij
from benchmarks.instrument import memory
from benchmarks.instrument.neox import PYTHIA_12B, scanned, unrolled
from benchmarks.instrument.rows import Row, memory_analysis, report

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2")
ROWS, TOKENS = 8, 1024
FETCHED = 18
STEERED: dict[int, Sequence[int]] = {1: (18,), 6: tuple(range(0, 36, 6)), 36: tuple(range(36))}

COMPILE_TARGETS = {"fetched": 1.15, **{f"{count} steered": 1.3 for count in STEERED}}

# How the mesh's axis `model` cuts one layer's weights: by head, and by neuron.
CUTS = {
    "attn_norm": (None,),
    "qkv": (None, None, "model", None),
    "attn_out": ("model", None, None),
    "mlp_norm": (None,),
    "mlp_in": (None, "model"),
    "mlp_out": ("model", None),
}


@dataclasses.dataclass
class Compiles:
    """The compiles of one variant."""

    trace_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: list[float] = dataclasses.field(default_factory=list)
    temp_bytes: int = 0
    program_bytes: int = 0

    @property
    def trace_median(self) -> float:
        return statistics.median(self.trace_seconds)

    @property
    def compile_median(self) -> float:
        return statistics.median(self.compile_seconds)

    def add(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Compiles once more. A new function object each time, or JAX's cache would answer."""
        start = time.perf_counter()
        lowered = jax.jit(lambda *args: function(*args)).lower(*args)
        traced = time.perf_counter()
        compiled = lowered.compile()
        self.compile_seconds.append(time.perf_counter() - traced)
        self.trace_seconds.append(traced - start)
        found = memory_analysis(compiled)
        self.temp_bytes, self.program_bytes = found.temp_size_in_bytes, found.generated_code_size_in_bytes


def steered(layers: Collection[int]) -> Callable[..., Any]:
    """The scan with a vector added to `mlp_out` at these layers, with a strength of its own at each."""

    def run(weights: Any, x: jax.Array, vector: jax.Array) -> jax.Array:
        model = functools.partial(scanned, scan=ij.layer_scan)
        for layer, _, value in (running := ij.iterate(model, sites="mlp_out", layers=layers)(weights, x)):
            assert layer is not None
            running.modified_value = value + 0.1 * (layer + 1) * vector
        return running.retval

    return run


def variants() -> dict[str, Callable[..., Any]]:
    """What is compiled, each a function of the stacked weights, the input and a vector."""
    fetch = ij.fetch(functools.partial(scanned, scan=ij.layer_scan), "mlp_out", FETCHED)
    return {
        "plain": lambda weights, x, vector: scanned(weights, x),
        "fetched": lambda weights, x, vector: fetch(weights, x),
        **{f"{count} steered": steered(layers) for count, layers in STEERED.items()},
    }


def compiles(topology: str, rounds: int) -> dict[str, Compiles]:
    """Compiles every variant in turn, `rounds` times; the unrolled model once."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))

    def array(shape: tuple[int, ...], *cuts: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*cuts)))

    shapes = PYTHIA_12B.layer()
    stacked = {name: array((PYTHIA_12B.layers, *shape), None, *CUTS[name]) for name, shape in shapes.items()}
    listed = [{name: array(shape, *CUTS[name]) for name, shape in shapes.items()} for _ in range(PYTHIA_12B.layers)]
    x = array((ROWS, TOKENS, PYTHIA_12B.d_model), "data", None, None)
    vector = array((PYTHIA_12B.d_model,), None)
    found = {name: Compiles() for name in ("unrolled", *variants())}
    found["unrolled"].add(unrolled, (listed, x))
    for _ in range(rounds):
        for name, function in variants().items():
            found[name].add(function, (stacked, x, vector))
    return found


def rows(topology: str, rounds: int) -> Iterator[Row]:
    """The rows of one kind of TPU."""
    found = compiles(topology, rounds)
    plain = found["plain"]

    def row(what: str, unit: str, ours: float, other: float, at_most: float | None = None) -> Row:
        return Row(f"{topology}: {what}", unit, ours, other, at_most)

    for name, one in found.items():
        if name == "plain":
            continue
        against = f"{name} / plain scan"
        yield row(f"compile, {against}", "s", one.compile_median, plain.compile_median, COMPILE_TARGETS.get(name))
        yield row(f"trace and lower, {against}", "s", one.trace_median, plain.trace_median)
        target = 1.05 if name == "fetched" else None
        yield row(f"temporary memory, {against}", "B", one.temp_bytes, plain.temp_bytes, target)
        yield row(f"program size, {against}", "B", one.program_bytes, plain.program_bytes)
    ours, other = found["fetched"], found["unrolled"]
    yield row("compile, fetched / unrolled", "s", ours.compile_median, other.compile_median, 1 / 2.4)


def gradient(topology: str) -> Iterator[Row]:
    """The row of `memory.gradient`, on one chip."""
    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    for row in memory.gradient(jnp.bfloat16, SingleDeviceSharding(chip)):
        yield dataclasses.replace(row, what=f"{topology}: {row.what}")


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="compiles of each variant of the scan")
    rounds = parser.parse_args().rounds
    # libtpu asks a metadata server where it runs, and locks a TPU to one process: here there is neither.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    table = [row for topology in TOPOLOGIES for row in (*rows(topology, rounds), *gradient(topology))]
    report("instrument_tpu", table)


if __name__ == "__main__":
    main()

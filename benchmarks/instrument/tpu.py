"""The layer scan compiled ahead of time for TPUs; no TPU is needed.

    make bench-tpu, or: python -m benchmarks.instrument.tpu

Setting: Pythia-12B (36 layers, d 5120, 40 heads, mlp 20480; the project's `Transformer`, from tokens to logits) in
bf16, 8 rows of 1024 tokens, for the 8 chips of v5e:2x4 and of v5p:2x2x2, in a mesh of 2 (data) by 4 (model). Seconds
are XLA's on this machine's CPU, medians of compiles taken in turn; tracing has rows of its own. Temporary memory and
program size are a chip's.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import interp_jax as ij
from benchmarks.instrument import memory
from benchmarks.instrument.rows import Row, memory_analysis, report
from interp_jax.models.loss import next_token_loss
from interp_jax.models.transformer import Transformer, apply, partition_specs
from interp_jax.models.transformer_config import TransformerConfig

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2")
ROWS, TOKENS = 8, 1024
FETCHED = 18
STEERED: dict[int, Sequence[int]] = {1: (18,), 6: tuple(range(0, 36, 6)), 36: tuple(range(36))}

COMPILE_TARGETS = {"fetched": 1.15, **{f"{count} steered": 1.3 for count in STEERED}}

PYTHIA_12B = TransformerConfig(
    vocab_size=50688, d_model=5120, n_layers=36, n_heads=40, n_kv_heads=40, d_head=128, d_mlp=20480, context=2048,
    norm="layer", activation="gelu", gated_mlp=False, parallel_residual=True, rotary_dim=32, qkv_bias=True,
    attn_out_bias=True, mlp_bias=True, tied_embeddings=False,
)  # fmt: skip

PYTHIA_1_4B = dataclasses.replace(
    PYTHIA_12B, vocab_size=50304, d_model=2048, n_layers=24, n_heads=16, n_kv_heads=16, d_mlp=8192
)


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
    """The model with a vector added to `mlp_out` at these layers, with a strength of its own at each."""

    def run(model: Transformer, tokens: jax.Array, vector: jax.Array) -> jax.Array:
        for layer, _, value in (running := ij.iterate(apply, sites="mlp_out", layers=layers)(model, tokens)):
            assert layer is not None
            running.modified_value = value + 0.1 * (layer + 1) * vector
        return running.retval

    return run


def variants() -> dict[str, Callable[..., Any]]:
    """What is compiled, each a function of the stacked model, the tokens and a vector."""
    fetch = ij.fetch(apply, "mlp_out", FETCHED)
    return {
        "plain": lambda model, tokens, vector: apply(model, tokens),
        "fetched": lambda model, tokens, vector: fetch(model, tokens),
        **{f"{count} steered": steered(layers) for count, layers in STEERED.items()},
    }


def compiles(topology: str, rounds: int) -> dict[str, Compiles]:
    """Compiles every variant in turn, `rounds` times; the unrolled model among them."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def model(layers: Literal["stacked", "unrolled"]) -> Transformer:
        shapes = jax.eval_shape(lambda: Transformer(PYTHIA_12B, jax.random.key(0), dtype=jnp.bfloat16, layers=layers))
        return jax.tree.map(lambda leaf, spec: array(leaf.shape, leaf.dtype, spec), shapes, partition_specs(shapes))

    stacked, listed = model("stacked"), model("unrolled")
    tokens = array((ROWS, TOKENS), jnp.int32, PartitionSpec("data", None))
    vector = array((PYTHIA_12B.d_model,), jnp.bfloat16, PartitionSpec(None))
    found = {name: Compiles() for name in ("unrolled", *variants())}
    for _ in range(rounds):
        found["unrolled"].add(apply, (listed, tokens))
        for name, function in variants().items():
            found[name].add(function, (stacked, tokens, vector))
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
    """Temporary memory of a gradient at one layer, on one chip: of the whole model, and of its blocks alone."""
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])

    def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
        return next_token_loss(apply(model, tokens).astype(jnp.float32), tokens)

    def temporary(layers: Literal["stacked", "unrolled"]) -> int:
        shapes = jax.eval_shape(
            lambda: Transformer(PYTHIA_1_4B, jax.random.key(0), dtype=jnp.bfloat16, layers=layers, remat=True)
        )
        model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), shapes)
        tokens = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32, sharding=chip)
        gradients = ij.gradients(loss, "resid_post", 12)
        compiled = jax.jit(lambda model, tokens: gradients(model, tokens)).lower(model, tokens).compile()
        return memory_analysis(compiled).temp_size_in_bytes

    what = f"{topology}: temporary memory, gradient of the loss at layer 12 of 24, stacked / unrolled"
    yield Row(what, "B", temporary("stacked"), temporary("unrolled"), 1.1)
    for row in memory.gradient(jnp.bfloat16, chip):
        yield dataclasses.replace(row, what=f"{topology}, blocks alone: {row.what}")


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="compiles of each variant")
    rounds = parser.parse_args().rounds
    # libtpu asks a metadata server where it runs, and locks a TPU to one process: here there is neither.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    table = [row for topology in TOPOLOGIES for row in (*rows(topology, rounds), *gradient(topology))]
    report("instrument_tpu", table)


if __name__ == "__main__":
    main()

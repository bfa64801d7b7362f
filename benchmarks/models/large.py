"""Large models compiled ahead of time for a TPU: whether they fit, and in what memory. No TPU is needed.

    make bench-tpu, or: python -m benchmarks.models.large, where libtpu is installed

Setting: the project's `Transformer` in bf16, layers stacked, for the 8 chips of v5p:2x2x2 in a mesh of 2 (data) by 4
(model); 8 rows of 1024 tokens with every site of the middle layer fetched, a generation of 128 tokens after 8 prompts
of 896, and 2 rows of 16384 tokens, whatever the context is that such a model was trained with. XLA refuses to compile
what does not fit into a chip's memory. All figures are a chip's.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import interp_jax as ij
from benchmarks.instrument.rows import Row, memory_analysis, report
from benchmarks.instrument.tpu import PYTHIA_12B
from interp_jax.models.cached_decoding import decode_with_cache
from interp_jax.models.decoding import Sampling
from interp_jax.models.transformer import Transformer, apply, partition_specs
from interp_jax.models.transformer_config import TransformerConfig

TOPOLOGY = "v5p:2x2x2"
CHIP_BYTES = 95 * 2**30
ROWS, TOKENS, NEW_TOKENS = 8, 1024, 128
LONG = 16384

LLAMA_3_8B = TransformerConfig(
    vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_head=128, d_mlp=14336, context=8192,
    rotary_base=500000.0, tied_embeddings=False,
)  # fmt: skip

MODELS = {"Pythia-12B": PYTHIA_12B, "Llama-3-8B": LLAMA_3_8B}


def rows(name: str, config: TransformerConfig, mesh: Mesh) -> Iterator[Row]:
    """The memory of each program."""
    config = dataclasses.replace(config, context=LONG)

    def array(shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    shapes = jax.eval_shape(lambda: Transformer(config, jax.random.key(0), dtype=jnp.bfloat16))
    model = jax.tree.map(lambda leaf, spec: array(leaf.shape, leaf.dtype, *spec), shapes, partition_specs(shapes))
    fetch = ij.fetch(apply, layers=config.n_layers // 2)
    tokens = array((ROWS, TOKENS), jnp.int32, "data")
    prompts = array((ROWS, TOKENS - NEW_TOKENS), jnp.int32, "data")
    likeliest = Sampling(is_greedy=True, top_k=None, has_top_p=False, stop_tokens=())

    def generate(model: Any, prompts: Any) -> Any:
        is_token, keys = jnp.ones(prompts.shape, bool), jax.random.split(jax.random.key(0), len(prompts))
        return decode_with_cache(
            model, prompts, is_token, keys, 1.0, 1.0, None, None, NEW_TOKENS, likeliest, "both", None, (), None
        )

    def plain(model: Any, tokens: Any) -> Any:
        return apply(model, tokens)

    def looking(model: Any, tokens: Any) -> Any:
        """A pass whose scores are all in memory, for they may be looked at."""
        for _ in (running := ij.iterate(apply, sites="attn_probs")(model, tokens)):
            pass
        return running.retval

    long = array((2, LONG), jnp.int32, "data")
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "forward": (plain, (model, tokens)),
        f"forward, all sites of layer {config.n_layers // 2} fetched": (fetch, (model, tokens)),
        f"{NEW_TOKENS} tokens generated": (generate, (model, prompts)),
        f"forward over 2 x {LONG}": (plain, (model, long)),
        f"forward over 2 x {LONG}, looking at attn_probs": (looking, (model, long)),
    }
    for what, (function, args) in programs.items():
        found = memory_analysis(jax.jit(function).lower(*args).compile())
        parts = {"weights and tokens": found.argument_size_in_bytes, "results": found.output_size_in_bytes}
        parts |= {"temporary memory": found.temp_size_in_bytes}
        for part, size in parts.items():
            yield Row(f"{name}, {what}: {part} / a chip's", "B", size, CHIP_BYTES)
        yield Row(f"{name}, {what}: all / a chip's", "B", sum(parts.values()), CHIP_BYTES, 1.0)


def main() -> None:
    """Prints the table and writes it as JSON."""
    # libtpu asks a metadata server where it runs, and locks a TPU to one process: here there is neither.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))
    report("models_large", [row for name, config in MODELS.items() for row in rows(name, config, mesh)])


if __name__ == "__main__":
    main()

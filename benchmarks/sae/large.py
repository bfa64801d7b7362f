"""A training step of a large autoencoder, compiled ahead of time for a TPU: whether it fits. No TPU is needed.

    make bench-tpu, or: python -m benchmarks.sae.large, where libtpu is installed

Setting: d_in 5120, d_sae 131072, a batch of 4096 in bf16, weights and Adam's moments in f32, over the 8 chips of
v5p:2x2x2 in a mesh of 2 (data) by 4 (latent). XLA refuses to compile what does not fit into a chip's memory. All
figures are a chip's.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.instrument.rows import Row, memory_analysis, report
from benchmarks.models.large import CHIP_BYTES, TOPOLOGY
from interp_jax.sae import TrainConfig
from interp_jax.sae.mesh import shardings
from interp_jax.sae.step import initial_state, step

D_IN, D_SAE, BATCH, K = 5120, 131072, 4096, 64
ARCHITECTURES: tuple[Any, ...] = ("relu", "topk", "jumprelu")


def rows(architecture: Any, mesh: Mesh) -> Iterator[Row]:
    """The memory of a step."""
    options: dict[str, Any] = {"k": K} if architecture == "topk" else {}
    config = TrainConfig(D_IN, D_SAE, architecture, **options)
    batch = jax.ShapeDtypeStruct((BATCH, D_IN), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data", None)))
    shapes = jax.eval_shape(functools.partial(initial_state, config), batch)
    where = shardings(mesh, shapes)

    def array(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(array, shapes, where)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    everywhere = NamedSharding(mesh, PartitionSpec())
    run = jax.jit(functools.partial(step, config, mesh=mesh), donate_argnums=0, out_shardings=(where, everywhere))
    found = memory_analysis(run.lower(state, batch, number).compile())
    for part, size in (
        ("state and batch", found.argument_size_in_bytes),
        ("temporary memory", found.temp_size_in_bytes),
    ):
        yield Row(f"{architecture} step: {part} / a chip's", "B", size, CHIP_BYTES)
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    yield Row(f"{architecture} step: all / a chip's", "B", total, CHIP_BYTES, 1.0)


def main() -> None:
    """Prints the table and writes it as JSON."""
    # libtpu asks a metadata server where it runs, and locks a TPU to one process: here there is neither.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "latent"))
    report("sae_large", [row for architecture in ARCHITECTURES for row in rows(architecture, mesh)])


if __name__ == "__main__":
    main()

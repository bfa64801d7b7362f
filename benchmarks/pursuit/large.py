"""Gradient pursuit in a large dictionary, compiled ahead of time for TPUs: whether it fits. No TPU is needed.

    make bench-tpu, or: python -m benchmarks.pursuit.large, where libtpu is installed

Setting: d_in 3584, d_sae 131072 in bf16, a batch of 512, 32 atoms; on one chip of v5e:1x1, and over the 4 chips of
v5p:2x2x1 in a mesh of 1 (data) by 4 (latent), where the dictionary may not be gathered.
"""

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.instrument.rows import Row, memory_analysis, report
from interp_jax.pursuit import gradient_pursuit

D_IN, D_SAE, BATCH, L0 = 3584, 131072, 512, 32
CHIP_BYTES = {"v5e:1x1": 16 * 2**30, "v5p:2x2x1": 95 * 2**30}


def rows(topology: str) -> Iterator[Row]:
    """The memory of a pursuit."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(1, -1), ("data", "latent"))
    signals = jax.ShapeDtypeStruct((BATCH, D_IN), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    dictionary = jax.ShapeDtypeStruct((D_SAE, D_IN), jnp.bfloat16, sharding=NamedSharding(mesh, P("latent")))
    run = functools.partial(gradient_pursuit, l0=L0, mesh=mesh if devices.size > 1 else None)
    compiled = jax.jit(run).lower(signals, dictionary).compile()
    found = memory_analysis(compiled)
    size = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
    yield Row(f"gradient pursuit on {topology}: memory of a chip / what it has", "B", size, CHIP_BYTES[topology], 1.0)
    if devices.size > 1:
        # A gathered dictionary would be temporary memory of its size.
        whole = 2 * D_SAE * D_IN
        what = f"gradient pursuit on {topology}: temporary memory of a chip / the whole dictionary"
        yield Row(what, "B", found.temp_size_in_bytes, whole, 0.5)


def main() -> None:
    """Prints the table and writes it as JSON."""
    # libtpu asks a metadata server where it runs, and locks a TPU to one process: here there is neither.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    report("pursuit_large", [row for topology in CHIP_BYTES for row in rows(topology)])


if __name__ == "__main__":
    main()

"""The TopK training step against what this machine can do.

    python benchmarks/sae.py [--d-in 576 --d-sae 9216 --batch 4096 --k 32 --rounds 7]

Prints the median time of one whole step (forward, backward, Adam, unit-norm constraint), with and without dead latents
to revive, beside plain JAX matmuls run in turn with it: a square one, the machine's peak, and the encoder's own.
`GFLOP/s` counts the 10 * batch * d_in * d_sae of a dense step, so that it can be compared with dense SAEs and with the
issue's table.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.sae import TrainConfig
from interp_jax.sae.step import initial_state, step
from interp_jax.sae.superposition import random_directions, superposed


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 576), ("d-sae", 9216), ("batch", 4096), ("k", 32), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    directions = random_directions(jax.random.key(0), 4 * sizes.d_in, sizes.d_in)
    batch = superposed(jax.random.key(1), directions, sizes.batch, sizes.k)
    encoder = jnp.ones((sizes.d_in, sizes.d_sae))
    square = jax.random.normal(jax.random.key(2), (4096, 4096))
    product = jax.jit(jnp.matmul)

    contenders: dict[str, Callable[[], Any]] = {
        "matmul 4096^3": lambda: product(square, square),
        "encoder matmul": lambda: product(batch, encoder),
        "step": _stepper(sizes, batch, dead_after=2**29),
        "step, reviving": _stepper(sizes, batch, dead_after=1),
    }
    product_flop = 2 * sizes.batch * sizes.d_in * sizes.d_sae
    flop = {
        "matmul 4096^3": 2 * 4096**3,
        "encoder matmul": product_flop,
        "step": 5 * product_flop,
        "step, reviving": 5 * product_flop,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(sizes.rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_number:  # the first compiles
                times[name].append(time.perf_counter() - start)
    print(f"{jax.devices()[0].platform}, {vars(sizes)}")
    peak = flop["matmul 4096^3"] / np.median(times["matmul 4096^3"])
    for name, seconds in times.items():
        rate = flop[name] / np.median(seconds)
        print(f"{name:16s} {np.median(seconds):8.3f} s {rate / 1e9:8.0f} GFLOP/s {rate / peak:6.2f} of the peak")


def _stepper(sizes: argparse.Namespace, batch: jax.Array, dead_after: int) -> Callable[[], Any]:
    config = TrainConfig(sizes.d_in, sizes.d_sae, k=sizes.k, dead_after=dead_after)
    state = jax.jit(functools.partial(initial_state, config))(batch)
    run_step = jax.jit(functools.partial(step, config), donate_argnums=0)

    def run() -> Any:
        nonlocal state
        state, metrics = run_step(state, batch, 0)
        return state, metrics

    return run


if __name__ == "__main__":
    main()

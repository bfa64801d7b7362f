"""Training steps of sparse autoencoders, each beside its peer.

    python -m benchmarks.sae [--d-in 576 --d-sae 9216 --batch 4096 --k 32 --rounds 5 --only relu topk]

A step is whole: forward, backward, Adam, and the constraint on the dictionary. With `--steps` a time is that of so
many, one after another, as in training; on a GPU a single one would be mostly waiting for it. SAELens and sparsify run
in processes and environments of their own (`make bench-sae` makes them), on the same batch, in turn with ours. The
matmul peak is that of a 4096-cubed product in JAX, and a dense step counts as 10 * batch * d_in * d_sae operations.

The kinds with a penalty are timed twice: as a run starts, half of all codes active, and as it goes on once the penalty
has made them sparse, k codes a row. The peers' steps are dense, and take the same time for both.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.instrument.rows import Row, report
from benchmarks.instrument.rows import seconds as seconds_of
from benchmarks.peer_process import PeerProcess, peer_python
from interp_jax.sae import TrainConfig
from interp_jax.sae.step import initial_state, step
from interp_jax.sae.superposition import random_directions, superposed
from interp_jax.sae.sweep import initial_states, stacked_knobs, step_all

PEAK = 4096
SWEEP = 8
NEVER = 2**29
"""Rows after which a latent is dead, where none shall be."""
AT_MOST = {"relu": 1 / 2.2, "topk": 1 / 4, "gated": 1 / 3, "batch_topk": 1 / 2, "jumprelu": 1 / 2, "matryoshka": None}


def seconds(
    runs: list[Callable[[], Any]], sizes: argparse.Namespace, of_several: Sequence[Callable[[], Any]] = ()
) -> list[float]:
    """Median seconds of a step of each; those of the last argument do several at a call."""

    def several(run: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [run() for _ in range(sizes.steps)][-1]

    every = [*map(several, runs), *of_several]
    return [time / sizes.steps for time in seconds_of(every, sizes.rounds)]


def stepper(
    config: TrainConfig, batch: jax.Array, dead: float = 0.0, codes_a_row: int | None = None
) -> Callable[[], Any]:
    """A step to be timed, again and again.

    Args:
        config: the configuration; a learning rate of next to nothing leaves the codes as sparse as they are.
        batch: the batch of every step.
        dead: share of the latents that are dead, and stay so.
        codes_a_row: how many latents a row has active, by a bias that is the same for all; None leaves it at zero.
    """
    state = jax.jit(functools.partial(initial_state, config))(batch)
    if codes_a_row is not None:
        above = np.asarray(state.sae.pre_activations(batch * state.scales[0]) - state.sae.floor()).ravel()
        kth = np.partition(above, -codes_a_row * len(batch))[-codes_a_row * len(batch)]
        bias = state.sae.encoder_bias
        state.sae = state.sae.replace(**{bias: state.sae.parameter(bias) - kth})
    n_dead = int(dead * config.d_sae)
    if n_dead:
        bias = state.sae.encoder_bias
        state.sae = state.sae.replace(**{bias: state.sae.parameter(bias).at[:n_dead].set(-1e6)})
        state.idle = state.idle.at[:n_dead].set(2 * config.dead_after)
    run_step = jax.jit(functools.partial(step, config), donate_argnums=0)

    def run() -> Any:
        nonlocal state
        state, metrics = run_step(state, batch, 5)
        return state, metrics

    return run


def sweep_rows(sizes: argparse.Namespace, batch: jax.Array) -> list[Row]:
    """A step of eight runs in one program beside eight steps of one."""
    configs = [TrainConfig(sizes.d_in, sizes.d_sae // 4, "relu", seed=seed, dead_after=NEVER) for seed in range(SWEEP)]
    single = stepper(configs[0], batch)
    runs: list[Callable[[], Any]] = [lambda: [single() for _ in range(SWEEP)][-1]]
    ways: tuple[Any, ...] = ("map", "vmap")
    runs += [sweep_stepper(configs, batch, how) for how in ways]
    alone, *together = seconds(runs, sizes)
    return [
        Row(
            f"a step of {SWEEP} relu runs, d_sae {sizes.d_sae // 4}, how={how} / {SWEEP} steps of one",
            "s",
            time,
            alone,
            1.05,
        )
        for how, time in zip(ways, together, strict=True)
    ]


def sweep_stepper(configs: list[TrainConfig], batch: jax.Array, how: Any) -> Callable[[], Any]:
    """A step of all runs to be timed, again and again."""
    states = jax.jit(functools.partial(initial_states, configs[0], stacked_knobs(configs)))(batch)
    run_steps = jax.jit(functools.partial(step_all, configs[0], how=how), donate_argnums=0)

    def run() -> Any:
        nonlocal states
        states, metrics = run_steps(states, batch, 5)
        return states, metrics

    return run


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 576), ("d-sae", 9216), ("batch", 4096), ("k", 32), ("rounds", 5), ("steps", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    kinds = [*AT_MOST, "ghost", "sweep"]
    parser.add_argument("--only", nargs="*", choices=kinds, default=kinds)
    parser.add_argument("--peer-python", help="interpreter of the peers, where they share an environment")
    sizes = parser.parse_args()
    directions = random_directions(jax.random.key(0), 4 * sizes.d_in, sizes.d_in)
    batch = superposed(jax.random.key(1), directions, sizes.batch, sizes.k)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "batch.npy"
        np.save(path, np.asarray(batch))
        peers = {
            name: PeerProcess(peer_python(name, sizes.peer_python), f"benchmarks.sae.{name}_peer", str(path))
            for name in ("saelens", "sparsify")
        }
        try:
            for architecture in sizes.only:
                if architecture in AT_MOST:
                    rows += architecture_rows(architecture, sizes, batch, peers)
                    print(f"{architecture}: done", file=sys.stderr, flush=True)
        finally:
            for peer in peers.values():
                peer.close()
    if "ghost" in sizes.only:
        rows += ghost_rows(sizes, batch)
    if "sweep" in sizes.only:
        rows += sweep_rows(sizes, batch)
    report("sae", rows, **{name: value for name, value in vars(sizes).items() if name not in ("only", "peer_python")})


def architecture_rows(
    architecture: Any, sizes: argparse.Namespace, batch: jax.Array, peers: dict[str, PeerProcess]
) -> list[Row]:
    """A kind of autoencoder beside its peers, and beside the matmul peak."""
    sparse = {"k": sizes.k} if "topk" in architecture or architecture == "matryoshka" else {}
    config = TrainConfig(sizes.d_in, sizes.d_sae, architecture, dead_after=NEVER, **sparse)
    still = dataclasses.replace(config, learning_rate=1e-12)
    names = ["saelens", "sparsify"] if architecture == "topk" else ["saelens"]
    for name in names:
        peers[name].ask("prepare", architecture, sizes.d_sae, sizes.k)
    square = jax.random.normal(jax.random.key(2), (PEAK, PEAK))
    product = jax.jit(jnp.matmul)
    steps = {f"{architecture} step": stepper(config, batch)}
    if not sparse:
        steps = {
            f"{architecture} step, {sizes.k} codes a row": stepper(still, batch, codes_a_row=sizes.k),
            f"{architecture} step, as it starts": stepper(still, batch),
        }
    runs = [*steps.values(), lambda: product(square, square)]
    # A peer is asked once for all its steps.
    peer_runs = [functools.partial(peers[name].ask, "step", architecture, sizes.steps) for name in names]
    times = seconds(runs, sizes, peer_runs)
    ours, (matmul, *others) = times[: len(steps)], times[len(steps) :]
    rows = [
        Row(f"{what} / {'SAELens' if name == 'saelens' else name}", "s", time, other, goal)
        for what, time in zip(steps, ours, strict=True)
        for name, other, goal in zip(names, others, (AT_MOST[architecture], 1 / 1.3), strict=False)
    ]
    dense = 10 * sizes.batch * sizes.d_in * sizes.d_sae * matmul / (2 * PEAK**3)
    goal = 1 / 0.78 if architecture == "relu" else None
    return [*rows, Row(f"{[*steps][-1]} / 10 B d n at matmul peak", "s", ours[-1], dense, goal)]


def ghost_rows(sizes: argparse.Namespace, batch: jax.Array) -> list[Row]:
    """A step with ghost gradients beside the same without."""
    shares = {"a sixteenth": 1 / 16, "a quarter": 1 / 4, "all but one latent": 1 - 1 / sizes.d_sae}
    make = functools.partial(TrainConfig, sizes.d_in, sizes.d_sae, "relu", dead_after=NEVER // 2)
    plain = stepper(make(dead_latents="none"), batch)
    ghosts = [stepper(make(dead_latents="ghost"), batch, share) for share in shares.values()]
    without, *withs = seconds([plain, *ghosts], sizes)
    return [
        Row(
            f"relu step with ghost gradients, {share} dead / without",
            "s",
            time,
            without,
            1.35 if "all" not in share else None,
        )
        for share, time in zip(shares, withs, strict=True)
    ]


if __name__ == "__main__":
    main()

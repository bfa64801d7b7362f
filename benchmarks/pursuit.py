"""Gradient pursuit against the k products that it cannot do without, and against scikit-learn.

    python benchmarks/pursuit.py [--d-in 576 --d-sae 9216 --batch 512 --l0 32 --rounds 5]

Prints the median of the ratios, run in turn, of gradient pursuit to `l0` plain `[batch, d_in] x [d_in, d_sae]` products
in one jitted loop; and the time a signal and the error beside scikit-learn's `orthogonal_mp` (a few signals: it takes
milliseconds each).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from interp_jax.pursuit import gradient_pursuit
from interp_jax.sae.superposition import random_directions, superposed


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 576), ("d-sae", 9216), ("batch", 512), ("l0", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    dictionary = random_directions(jax.random.key(0), sizes.d_sae, sizes.d_in)
    signals = superposed(jax.random.key(1), dictionary, sizes.batch, 2 * sizes.l0)
    signals += 0.05 * jax.random.normal(jax.random.key(2), signals.shape)

    @jax.jit
    def products(signals: jax.Array, dictionary: jax.Array) -> jax.Array:
        # Each product depends on the one before it, as the pursuit's do, so none can be left out or merged.
        def step(_: int, signals: jax.Array) -> jax.Array:
            return signals + 1e-9 * (signals @ dictionary.T)[:, : sizes.d_in]

        return jax.lax.fori_loop(0, sizes.l0, step, signals)

    def pursue() -> Any:
        return gradient_pursuit(signals, dictionary, sizes.l0)

    plain, ours = [], []
    for round_number in range(sizes.rounds + 1):
        pair = _seconds(lambda: products(signals, dictionary)), _seconds(pursue)
        if round_number:  # the first compiles
            plain.append(pair[0])
            ours.append(pair[1])
    print(f"{jax.devices()[0].platform}, {vars(sizes)}")
    print(f"{sizes.l0} plain products  {np.median(plain):7.3f} s")
    print(f"gradient pursuit   {np.median(ours):7.3f} s, {np.median(np.divide(ours, plain)):.2f} times the products")

    from sklearn.linear_model import orthogonal_mp

    few = np.asarray(signals[:16], np.float64)
    atoms = np.asarray(dictionary, np.float64)
    start = time.perf_counter()
    codes = np.asarray(orthogonal_mp(atoms.T, few.T, n_nonzero_coefs=sizes.l0)).T
    theirs = (time.perf_counter() - start) / len(few)
    mine = float(np.median(ours)) / sizes.batch
    error = np.linalg.norm(few - codes @ atoms, axis=1).mean()
    print(f"a signal: {1e3 * mine:.2f} ms; scikit-learn's OMP {1e3 * theirs:.2f} ms, {theirs / mine:.1f} times as long")
    found = float(pursue().residual_norm[:16].mean())
    print(f"mean residual norm: {found:.4f}; scikit-learn's OMP, signed, {error:.4f}")


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

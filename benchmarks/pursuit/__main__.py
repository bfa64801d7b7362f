"""Pursuits against the k products that they cannot do without, and against scikit-learn.

    python -m benchmarks.pursuit [--d-in 576 --d-sae 9216 --batch 512 --l0 32 --rounds 5 --only products sklearn memory]

Signals are sums of twice as many atoms as a code may have, and noise. A plain product is `[batch, d_in] x [d_in,
d_sae]`, `l0` of them in one compiled loop. scikit-learn's `orthogonal_mp` is given a few signals, as it takes
milliseconds each, and is compared by the signal. Memory is what XLA says of the compiled program, inputs included,
beside that of one matrix of inner products and the inputs.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import orthogonal_mp

from benchmarks.instrument.rows import Row, memory_analysis, report, seconds
from interp_jax.pursuit import gradient_pursuit, nonnegative_omp, orthogonal_matching_pursuit
from interp_jax.sae.superposition import random_directions, superposed

FEW = 16
"""Signals that scikit-learn is given."""
OTHER_SIZES = ((2304, 32768, 512, 8), (2304, 32768, 64, 128))
"""d_in, d_sae, batch and l0 of further comparisons with plain products; the last batch is small to take less time."""


def problem(d_in: int, d_sae: int, batch: int, l0: int) -> tuple[jax.Array, jax.Array]:
    """Signals and a dictionary."""
    dictionary = random_directions(jax.random.key(0), d_sae, d_in)
    signals = superposed(jax.random.key(1), dictionary, batch, 2 * l0)
    return signals + 0.05 * jax.random.normal(jax.random.key(2), signals.shape), dictionary


def plain_products(l0: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`l0` products of the signals with the dictionary."""

    @jax.jit
    def run(signals: jax.Array, dictionary: jax.Array) -> jax.Array:
        # Each product depends on the one before it, as the pursuit's do, so none can be left out or merged.
        def step(_: int, signals: jax.Array) -> jax.Array:
            return signals + 1e-9 * (signals @ dictionary.T)[:, : signals.shape[1]]

        return jax.lax.fori_loop(0, l0, step, signals)

    return run


def product_rows(d_in: int, d_sae: int, batch: int, l0: int, rounds: int, at_most: float) -> Iterator[Row]:
    """Each pursuit beside the products."""
    given = problem(d_in, d_sae, batch, l0)
    runs = [functools.partial(plain_products(l0), *given), lambda: gradient_pursuit(*given, l0)]
    plain, gradient = seconds(runs, rounds)
    size = f"d_in {d_in}, d_sae {d_sae}, batch {batch}"
    yield Row(f"gradient pursuit of {l0} atoms / {l0} products; {size}", "s", gradient, plain, at_most)


def sklearn_rows(d_in: int, d_sae: int, batch: int, l0: int, rounds: int) -> Iterator[Row]:
    """A signal's time and error beside scikit-learn's and the best non-negative weights'."""
    signals, dictionary = problem(d_in, d_sae, batch, l0)
    few, atoms = np.asarray(signals[:FEW], np.float64), np.asarray(dictionary, np.float64)

    def theirs() -> Any:
        return np.asarray(orthogonal_mp(atoms.T, few.T, n_nonzero_coefs=l0)).T

    signed = functools.partial(orthogonal_matching_pursuit, nonnegative=False)
    runs = [
        theirs,
        *(functools.partial(run, signals, dictionary, l0) for run in (gradient_pursuit, nonnegative_omp, signed)),
    ]
    sklearn, gradient, nonnegative, orthogonal = seconds(runs, rounds)
    yield Row("a signal by gradient pursuit / scikit-learn's OMP", "s", gradient / batch, sklearn / FEW, 1 / 6)
    yield Row("a signal by signed OMP / scikit-learn's OMP", "s", orthogonal / batch, sklearn / FEW, 1 / 4)
    yield Row("a signal by non-negative OMP / scikit-learn's OMP", "s", nonnegative / batch, sklearn / FEW)
    errors = [float(jnp.mean(run().residual_norm)) for run in runs[1:]]
    yield Row("residual norm of gradient pursuit / of non-negative OMP", "", errors[0], errors[1], 1.01)
    codes, ours = theirs(), runs[3]()
    same = [set(np.flatnonzero(a)) == set(b.tolist()) for a, b in zip(codes, np.asarray(ours.indices), strict=False)]
    yield Row("signals whose atoms by signed OMP are scikit-learn's / all", "", float(sum(same)), float(FEW))
    error = float(np.linalg.norm(few - codes @ atoms, axis=1).mean())
    yield Row(
        "residual norm of signed OMP / of scikit-learn's", "", float(jnp.mean(ours.residual_norm[:FEW])), error, 1.00001
    )


def memory_rows(d_in: int, d_sae: int, batch: int, l0: int) -> Iterator[Row]:
    """What XLA says of the compiled program's memory."""
    signals, dictionary = problem(d_in, d_sae, batch, l0)
    compiled = jax.jit(functools.partial(gradient_pursuit, l0=l0)).lower(signals, dictionary).compile()
    found = memory_analysis(compiled)
    ours = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
    inputs = signals.nbytes + dictionary.nbytes
    at_most = (1.3 * 4 * batch * d_sae + inputs) / (4 * batch * d_sae + inputs)
    yield Row("memory of gradient pursuit / [batch, d_sae] and inputs", "B", ours, 4 * batch * d_sae + inputs, at_most)


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 576), ("d-sae", 9216), ("batch", 512), ("l0", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    kinds = ["products", "sklearn", "memory", "other_sizes"]
    parser.add_argument("--only", nargs="*", choices=kinds, default=kinds)
    options = parser.parse_args()
    sizes = (options.d_in, options.d_sae, options.batch, options.l0)
    rows: list[Row] = []
    if "products" in options.only:
        rows += product_rows(*sizes, options.rounds, 1.35)
    if "sklearn" in options.only:
        rows += sklearn_rows(*sizes, options.rounds)
    if "memory" in options.only:
        rows += memory_rows(*sizes)
    if "other_sizes" in options.only:
        for other in OTHER_SIZES:
            rows += product_rows(*other, 2, 1.4)
    report("pursuit", rows, **{name: value for name, value in vars(options).items() if name != "only"})


if __name__ == "__main__":
    main()

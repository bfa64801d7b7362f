"""The disk store beside plain file copy.

    python -m benchmarks.activations [--megabytes 512 --d-in 576 --batch 4096 --rounds 5 --folder FOLDER]

A copy is `shutil.copyfile` of the same number of bytes within the same folder. Everything that is written is synced to
the disk, by the copy as by the store. For the rows that are about reading, everything that is read was dropped from the
system's cache before; a store that is written comes from memory, in batches of 8 x 127 as a model gives them, and the
copy beside it from the cache. Two rows have a copy that is neither synced nor read from the disk. The last row is the
share of its time that a training waits for batches from the store.
"""

import argparse
import functools
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.instrument.rows import Row, report, seconds
from interp_jax.activations.prefetch import prefetched
from interp_jax.activations.store import ActivationStore
from interp_jax.sae import TrainConfig, train

GOAL = 1 / 0.6
PER_BATCH = 8 * 127
D_SAE, STEPS = 4096, 20


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("megabytes", 512), ("d-in", 576), ("batch", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="on the disk that is to be measured")
    sizes = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=sizes.folder) as folder:
        rows = store_rows(pathlib.Path(folder), sizes)
    report("activations", rows, **{name: value for name, value in vars(sizes).items() if name != "folder"})


def store_rows(folder: pathlib.Path, sizes: argparse.Namespace) -> list[Row]:
    """Writing, reading shuffled, and reading through, each beside a copy."""
    n_batches = sizes.megabytes * 1_000_000 // (PER_BATCH * sizes.d_in * 4)
    activations = np.random.default_rng(0).normal(size=(n_batches * PER_BATCH, sizes.d_in)).astype(np.float32)
    source, copied = folder / "source", folder / "copied"
    activations.tofile(source)
    os.sync()

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(activations), PER_BATCH):
            yield activations[start : start + PER_BATCH]

    def write() -> None:
        # As the copy writes over its file. Where files pile up, the system takes its time to find pages for them.
        shutil.rmtree(folder / "written", ignore_errors=True)
        ActivationStore(folder / "written", d_in=sizes.d_in).extend(batches())

    ActivationStore(folder / "store", d_in=sizes.d_in).extend(batches())
    n_steps = len(activations) // sizes.batch

    def read_shuffled() -> None:
        batch = ActivationStore.open(folder / "store", verify=False).shuffled(sizes.batch, seed=1)
        for step in range(n_steps):
            batch(step)

    def read_rows() -> None:
        ActivationStore.open(folder / "store", verify=True)

    def from_disk(read: Callable[[], Any], path: pathlib.Path) -> None:
        forget(path)
        read()

    copy = functools.partial(shutil.copyfile, source, copied)
    written, copied_s = seconds([write, functools.partial(synced, copy, copied)], sizes.rounds)
    cold = [
        functools.partial(from_disk, read_shuffled, folder / "store"),
        functools.partial(from_disk, read_rows, folder / "store"),
        functools.partial(from_disk, functools.partial(synced, copy, copied), source),
    ]
    shuffled, through, cold_copy = seconds(cold, sizes.rounds)
    hot_shuffled, hot_copy = seconds([read_shuffled, copy], sizes.rounds)
    waited, trained = waiting(ActivationStore.open(folder / "store", verify=False), sizes)
    return [
        Row("the store written / copied, synced", "s", written, copied_s, GOAL),
        Row("the store read shuffled / copied, from the disk, the copy synced", "s", shuffled, cold_copy, GOAL),
        Row("the store opened and verified / copied, from the disk, the copy synced", "s", through, cold_copy),
        Row("the store written, synced / copied within the cache, not synced", "s", written, hot_copy),
        Row("the store read shuffled / copied, all within the cache, not synced", "s", hot_shuffled, hot_copy, GOAL),
        Row(f"waiting for data / training, topk, d_sae {D_SAE}, prefetched", "s", waited, trained, 0.05),
    ]


def waiting(store: ActivationStore, sizes: argparse.Namespace) -> tuple[float, float]:
    """Seconds that a training waited for its batches, and that it took, both after its first step, which compiles."""
    config = TrainConfig(sizes.d_in, D_SAE, "topk", k=32, n_steps=STEPS, warmup_steps=1, log_every=STEPS)
    at_first: list[float] = []

    with prefetched(store.shuffled(sizes.batch)) as batches:
        train(
            config,
            batches,
            on_step=lambda number, metrics: (
                at_first.extend((time.perf_counter(), batches.waited_s)) if number == 1 else None
            ),
        )
        end = time.perf_counter()
        return batches.waited_s - at_first[1], end - at_first[0]


def synced(write: Callable[[], Any], path: pathlib.Path) -> None:
    """Writes a file, and waits until it is on the disk."""
    write()
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def forget(path: pathlib.Path) -> None:
    """Drops a file, or all in a folder, from the system's cache."""
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on the disk yet is not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()

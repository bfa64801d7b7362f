"""A row of a benchmark: what is ours, what is the peer's, and their ratio."""

import dataclasses
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

RESULTS = pathlib.Path("benchmarks/results")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; `ours` and `other` are medians if they are times."""

    what: str
    unit: str
    """`s`, `B` (bytes), or none."""
    ours: float
    other: float
    at_most: float | None = None
    """The ratio that is to be reached; None for a row that is there to be compared with."""

    @property
    def ratio(self) -> float:
        return self.ours / self.other

    @property
    def is_met(self) -> bool | None:
        return None if self.at_most is None else self.ratio <= self.at_most

    def __str__(self) -> str:
        target = "" if self.at_most is None else f"{self.at_most:8.3g} {'met' if self.is_met else 'MISSED'}"
        ours, other = _readable(self.ours, self.unit), _readable(self.other, self.unit)
        return f"{self.what:<84} {ours:>10} {other:>10} {self.ratio:8.3f} {target}"


def _readable(value: float, unit: str) -> str:
    """`0.0123` seconds as `12.3 ms`."""
    sizes = {"G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}
    for prefix, size in sizes.items():
        if unit and value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:g} {unit}"


def seconds(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each run.

    They are taken in turn, there and back (A B B A), so that a drift of the machine, and what one leaves behind for the
    next, falls on all alike. The first round warms up and is not counted.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        order = range(len(runs)) if number % 2 else range(len(runs) - 1, -1, -1)
        gc.collect()
        for which in order:
            start = time.perf_counter()
            jax.block_until_ready(runs[which]())
            if number:
                times[which].append(time.perf_counter() - start)
    return [statistics.median(one) for one in times]


def memory_analysis(compiled: jax.stages.Compiled) -> Any:
    """What XLA says of a compiled program's memory."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"JAX's backend {jax.default_backend()!r} gives no memory analysis of compiled programs")
    return analysis


def temp_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of temporary memory of the compiled function."""
    return memory_analysis(jax.jit(function).lower(*args).compile()).temp_size_in_bytes


def report(name: str, rows: Sequence[Row], **setting: Any) -> None:
    """Prints the table and writes it as JSON.

    Args:
        name: of the file.
        rows: the table.
        setting: what else is to be known: the machine, say.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":  # in a file of its own, beside that of the CPU
        name = f"{name}_{device.device_kind.lower().replace(' ', '_')}"
        setting = {"device": device.device_kind, **setting}
    setting = {"jax": jax.__version__, **setting}
    print("; ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'':<84} {'ours':>10} {'peer':>10} {'ratio':>8} {'at most':>8}")
    print(*rows, sep="\n", flush=True)
    table = [{**dataclasses.asdict(row), "ratio": row.ratio, "is_met": row.is_met} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**setting, "rows": table}, indent=1) + "\n", encoding="utf-8")

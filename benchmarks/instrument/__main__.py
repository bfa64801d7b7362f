"""The rows that this machine's CPU can tell.

make bench, or: python -m benchmarks.instrument
"""

import jax

from benchmarks.instrument import memory, nothing_listening, steady_scan, steady_state, tracing
from benchmarks.instrument.rows import report


def main() -> None:
    """Prints the table and writes it as JSON."""
    jax.config.update("jax_platforms", "cpu")
    parts = (nothing_listening, steady_state, steady_scan, tracing, memory)
    report("instrument", [row for part in parts for row in part.rows()])


if __name__ == "__main__":
    main()

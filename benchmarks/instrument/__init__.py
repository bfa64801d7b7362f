"""What the running pass costs, beside code written by hand that does the same.

    python -m benchmarks.instrument          on this machine
    python -m benchmarks.instrument.tpu      compiled ahead of time for TPUs; needs the extra `tpu`, and no TPU

Every row is measured in one run with its peer, taken in turn, and is a ratio of medians. A row that has a target says
whether it was met. Each run prints a table and writes `benchmarks/results/instrument.json` or `instrument_tpu.json`.
"""

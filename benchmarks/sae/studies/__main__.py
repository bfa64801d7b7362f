"""Runs a study: `python -m benchmarks.sae.studies NAME`."""

import argparse
import datetime
import functools
import importlib
import json
import pathlib

import jax

from benchmarks.instrument.rows import RESULTS
from benchmarks.sae.studies.groups import BATCH_SIZE, sweep_resumed, trained_and_judged
from benchmarks.sae.studies.setting import activations_and_judge
from interp_jax.whole_file import write_whole


def main() -> None:
    """Trains what is not trained yet, and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=["beta1", "ghost", "test_time_l0"])
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(".cache/sae_studies"))
    options = parser.parse_args()
    study = importlib.import_module(f"benchmarks.sae.studies.{options.study}")
    store, judge = activations_and_judge(options.cache)
    judged = functools.partial(study.judged, judge)
    train = getattr(study, "train", sweep_resumed)
    runs = trained_and_judged(study.groups(), store, judged, options.cache / options.study, train)
    setting = {"jax": jax.__version__, "date": f"{datetime.date.today()}", "batch_size": BATCH_SIZE}
    losses = {name: getattr(judge, name) for name in ("clean", "zero_ablated", "mean_ablated")}
    content = {**setting, "losses": losses, "runs": runs}
    write_whole(RESULTS / f"sae_studies_{options.study}.json", json.dumps(content, indent=1) + "\n")
    print(study.report(runs))


if __name__ == "__main__":
    main()

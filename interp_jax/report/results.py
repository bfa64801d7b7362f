"""The report as JSON, for programs: `demo/results.json` holds every number that the page shows.

A number that is not finite becomes null, since JSON has no NaN and most readers of it refuse one.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from interp_jax.report.demo_report import DemoReport
from interp_jax.whole_file import write_whole

__all__ = ["to_json", "write_results"]


def to_json(report: DemoReport) -> str:
    """The report as a JSON document, fields named as in `DemoReport`.

    Args:
        report: what the demo found.

    Returns:
        JSON text.
    """
    return json.dumps(_plain(dataclasses.asdict(report)), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def write_results(path: str | os.PathLike[str], report: DemoReport) -> pathlib.Path:
    """Writes the report as JSON, atomically.

    Args:
        path: the file, usually `demo/results.json`.
        report: what the demo found.

    Returns:
        The path.
    """
    return write_whole(path, to_json(report))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The numbers among a record's fields, ready for JSON: what a command prints and saves of a measurement."""

import dataclasses
import math
from typing import Any

__all__ = ["scalars"]


def scalars(record: Any) -> dict[str, int | float | None]:
    """The fields that are one number each, by name.

    Args:
        record: a dataclass; arrays and nested records among its fields are left out.

    Returns:
        Plain ints and floats. None stands for NaN and infinity, which JSON does not have.
    """
    found: dict[str, int | float | None] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, int):
            found[field.name] = int(value)
        elif isinstance(value, float):
            found[field.name] = float(value) if math.isfinite(value) else None
    return found

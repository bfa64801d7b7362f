"""Frozen attributes, for the tokenizers only."""

from typing import Any


def freeze_dict_attrs(instance: Any, names: list[str]) -> None:
    """Leaves all as it is."""

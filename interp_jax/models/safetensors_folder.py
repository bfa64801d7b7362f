"""The tensors of a directory of safetensors, in one file or in shards: opened and mapped, read one at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

__all__ = ["SafetensorsFolder", "read_json"]


class SafetensorsFolder:
    """A `TensorSource` over a directory.

    Attributes:
        metadata: what the headers of the files hold besides tensors.
    """

    def __init__(self, directory: str | Path, *, full_name: Callable[[str], str] = lambda name: name):
        """Opens every file.

        Args:
            directory: Holds `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.
            full_name: From the name of a stored tensor to the one that is asked for.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: A file is cut short or damaged.
        """
        self._directory = Path(directory)
        index = self._directory / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        self._where: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        for name in files:
            path = self._directory / name
            # A name from an index is data: it may not lead elsewhere.
            if path.parent != self._directory or not path.is_file():
                raise FileNotFoundError(f"{path} is not there; a model is a directory with safetensors in it.")
            try:
                opened = safetensors.safe_open(path, framework="numpy")
                keys = list(opened.keys())
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again.") from error
            self._where.update(dict.fromkeys(keys, opened))
            self.metadata |= opened.metadata() or {}
        self._stored = {full_name(name): name for name in self._where}

    @property
    def path(self) -> str:
        """The directory."""
        return str(self._directory)

    @property
    def names(self) -> Iterable[str]:
        """All tensors, by their full names."""
        return self._stored

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, in the dtype that it is stored in."""
        stored = self._stored[name]
        return self._where[stored].get_tensor(stored)


def read_json(path: Path) -> Mapping[str, Any]:
    """A table of fields from a file.

    Args:
        path: The file.

    Returns:
        The fields.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is cut short or damaged, or holds no table.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no table of fields.")
    return fields

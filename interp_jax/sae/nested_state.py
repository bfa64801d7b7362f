"""The state of something that a run reads from, as a file: nested dictionaries and lists with arrays in them.

What is small is copied at once, as JSON; arrays are only referred to until they are written, so that a shuffle buffer
of gigabytes does not hold up the training.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

__all__ = ["NestedState", "read_nested_state"]


@dataclasses.dataclass(frozen=True)
class NestedState:
    """A state, taken apart."""

    text: str
    """All but the arrays, as JSON; in the place of each stands `{"array": NAME}`."""
    arrays: dict[str, np.ndarray]
    """The arrays by name; they must not be changed before they are written."""

    @classmethod
    def of(cls, state: dict[str, Any]) -> "NestedState":
        """Takes a state apart.

        Args:
            state: dictionaries, lists, numbers, strings, None and NumPy arrays.

        Raises:
            TypeError: if it holds anything else.
        """
        arrays: dict[str, np.ndarray] = {}

        def without_arrays(value: Any) -> Any:
            if isinstance(value, np.generic):
                return value.item()
            if not isinstance(value, np.ndarray):
                raise TypeError(
                    f"state_dict of the batches holds a {type(value).__name__}; expected dictionaries, lists, numbers, "
                    "strings and NumPy arrays."
                )
            name = f"array_{len(arrays)}"
            arrays[name] = value
            return {"array": name}

        return cls(json.dumps(state, default=without_arrays), arrays)

    @property
    def n_bytes(self) -> int:
        """What it takes on the disk, but for a header."""
        return len(self.text) + sum(array.nbytes for array in self.arrays.values())

    def write(self, path: pathlib.Path) -> None:
        """Writes it.

        Args:
            path: the file.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        safetensors.numpy.save_file(arrays, path, {"state": self.text})


def read_nested_state(path: pathlib.Path) -> dict[str, Any]:
    """The state as it was.

    Args:
        path: the file that `NestedState.write` wrote.
    """
    with safetensors.safe_open(path, "numpy") as file:
        text = file.metadata()["state"]
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def with_arrays(value: dict[str, Any]) -> Any:
        return arrays[value["array"]] if value.keys() == {"array"} and value["array"] in arrays else value

    return json.loads(text, object_hook=with_arrays)

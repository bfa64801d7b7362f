"""A direction that can be added to a model's stream, with what it needs to be used again: its site and its origin.

Saved as one safetensors file, the words in its metadata. Written whole or not at all.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from interp_jax.whole_file import write_whole

__all__ = ["SteeringVector"]

_FORMAT = "interp_jax.SteeringVector/1"


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction, the place where it is added, and where it came from."""

    direction: Float[np.ndarray | Array, "width"]
    """Kept as a float32 NumPy array, in the units of the activation: a coefficient of 1 adds it as it is."""
    layer: int | None
    """The site's layer."""
    site: str = "resid_post"
    """The site's name."""
    source: str = ""
    """Where it came from, in words: `latent 512 of sae.safetensors`, `mean of " happy" minus " sad"`."""

    def __post_init__(self):
        """Makes a float32 NumPy array of the direction.

        Raises:
            ValueError: when it is not a vector of finite numbers.
        """
        direction = np.asarray(self.direction, np.float32)
        if direction.ndim != 1 or not np.isfinite(direction).all():
            raise ValueError(
                f"A direction is one vector of finite numbers, got shape {direction.shape} with "
                f"{int((~np.isfinite(direction)).sum())} numbers that are not finite."
            )
        object.__setattr__(self, "direction", direction)

    @property
    def norm(self) -> float:
        """The direction's Euclidean norm, in the units of the activation."""
        return float(np.linalg.norm(self.direction))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, atomically.

        Args:
            path: the file; one that is there is replaced.
        """
        about = {"format": _FORMAT, "layer": self.layer, "site": self.site, "source": self.source}
        tensors = {"direction": np.asarray(self.direction)}
        data = safetensors.numpy.save(tensors, metadata={"steering_vector": json.dumps(about)})
        write_whole(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SteeringVector":
        """Reads what `save` wrote.

        Args:
            path: the file.

        Returns:
            The vector.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not a file of `save`.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no steering vector at {path}.")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {}).get("steering_vector", "{}"))
                if about.get("format") != _FORMAT:
                    raise ValueError(f"its format is {about.get('format')!r}, expected {_FORMAT!r}")
                return cls(file.get_tensor("direction"), about["layer"], about["site"], about["source"])
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{path} is not a saved SteeringVector: {error}. Write one with SteeringVector.save."
            ) from error

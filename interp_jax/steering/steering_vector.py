"""A direction that can be added to a model's stream, with what it needs to be used again: its site and its origin.

It is one direction for every position it is added at, or one a position of the prompt. It adds, scales and is
projected; what comes out says in words how it was made. Saved as one safetensors file, the words in its metadata.
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

from interp_jax.steering.positions import Positions, check_positions
from interp_jax.whole_file import write_whole

__all__ = ["SteeringVector"]

_FORMAT = "interp_jax.SteeringVector/1"


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction, the place where it is added, and where it came from."""

    direction: Float[np.ndarray | Array, "width"] | Float[np.ndarray | Array, "n_positions width"]
    """Kept as a float32 NumPy array, in the units of the activation: a coefficient of 1 adds it as it is. A row a
    position where there are two axes."""
    layer: int | None
    """The site's layer."""
    site: str = "resid_post"
    """The site's name."""
    source: str = ""
    """Where it came from, in words: `latent 512 of sae.safetensors`, `" happy" minus " sad"`."""
    positions: Positions | None = None
    """Where it is added; see `positions`. When None: at every position, or, of several rows, row i at token i of the
    prompt."""
    model: str = ""
    """The name of the model whose activations it is of. Steering another with it is refused; "" is for any."""

    def __post_init__(self) -> None:
        """Makes a float32 NumPy array of the direction.

        Raises:
            ValueError: when it holds no finite numbers, or not as many rows as positions.
        """
        direction = np.asarray(self.direction, np.float32)
        if direction.ndim not in (1, 2) or not direction.size or not np.isfinite(direction).all():
            raise ValueError(
                "A direction is one vector of finite numbers, or one a position; got shape "
                f"{direction.shape} with {int((~np.isfinite(direction)).sum())} numbers that are not finite."
            )
        positions = self.positions
        if positions is None:
            positions = "all" if direction.ndim == 1 else tuple(range(len(direction)))
        elif not isinstance(positions, str):
            positions = tuple(int(at) for at in positions)
        check_positions(positions)
        if direction.ndim == 2 and (isinstance(positions, str) or len(positions) != len(direction)):
            raise ValueError(
                f"The direction has {len(direction)} rows, one a position, but positions is {positions!r}. Name as "
                "many tokens of the prompt, or add one direction: .mean(), or one of its rows."
            )
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "positions", positions)

    @property
    def width(self) -> int:
        """How wide the site is."""
        return self.direction.shape[-1]

    @property
    def norm(self) -> float:
        """The Euclidean norm over all its numbers, in the units of the activation."""
        return float(np.linalg.norm(self.direction))

    @property
    def rows(self) -> Float[np.ndarray, "n_rows width"]:
        """Its directions, one a position, or the only one."""
        return np.atleast_2d(np.asarray(self.direction))

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """The sum; added at the same place.

        Raises:
            ValueError: if the two are not for the same model, site, layer and positions.
        """
        here, there = ((of.layer, of.site, of.positions, of.direction.shape, of.model) for of in (self, other))
        if here != there:
            raise ValueError(
                "Vectors at different places do not add: layer, site, positions, shape and model are "
                f"{here} and {there}. "
                "Steer with both instead: steer(..., [one, other])."
            )
        return self._made(self.direction + other.direction, f"({self.source}) + ({other.source})")

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        """The difference; added at the same place."""
        return self + -1 * other

    def __mul__(self, factor: float | int) -> "SteeringVector":
        """Scaled."""
        return self._made(self.direction * np.float32(factor), f"{factor:g} * ({self.source})")

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        """The opposite direction."""
        return -1 * self

    def to_norm(self, norm: float | int) -> "SteeringVector":
        """Scaled to a norm.

        Args:
            norm: in the units of the activation; 1 gives the unit vector.

        Raises:
            ValueError: if it is zero.
        """
        if self.norm == 0:
            raise ValueError(f"The vector from {self.source or 'somewhere'} is zero, and cannot be scaled to a norm.")
        return self._made(self.direction * np.float32(norm / self.norm), f"({self.source}) to norm {norm:g}")

    def mean(self) -> "SteeringVector":
        """The mean over its positions, to be added everywhere."""
        source = f"mean over positions of ({self.source})"
        return dataclasses.replace(self, direction=self.rows.mean(axis=0), positions="all", source=source)

    def at(self, positions: Positions) -> "SteeringVector":
        """The same, added elsewhere.

        Args:
            positions: where; see `positions`.
        """
        return dataclasses.replace(self, positions=positions)

    def without(
        self, *others: "SteeringVector | Float[np.ndarray, 'width'] | Float[Array, 'width']"
    ) -> "SteeringVector":
        """What is left of it when directions are projected out: orthogonal to all of them and to their sums.

        Args:
            *others: the directions, of any norm; of a vector with a row a position, each row.

        Raises:
            ValueError: if there is none, or one is of another width or not finite.
        """
        rows = [np.asarray(row) for of in others for row in (of.rows if isinstance(of, SteeringVector) else [of])]
        wrong = [row.shape for row in rows if row.shape != (self.width,)]
        if wrong:
            raise ValueError(f"A direction of shape {wrong[0]} cannot be projected out of a vector of {self.width}.")
        if not rows or not np.isfinite(rows).all():
            raise ValueError("Give at least one direction to project out, of finite numbers.")
        span, singular, _ = np.linalg.svd(np.asarray(rows, np.float64).T, full_matrices=False)
        span = span[:, singular > 1e-6 * singular.max(initial=1e-30)]
        left = self.direction - (self.direction @ span) @ span.T
        return self._made(left, f"({self.source}) without {len(rows)} direction{'s' * (len(rows) > 1)}")

    def cosine(self, other: "SteeringVector") -> float:
        """The cosine of the angle to another, over all their numbers; 0 where one is zero."""
        product = float(np.sum(self.direction * other.direction))
        return product / (self.norm * other.norm) if self.norm * other.norm else 0.0

    def _made(self, direction: Any, source: str) -> "SteeringVector":
        return dataclasses.replace(self, direction=direction, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, atomically.

        Args:
            path: the file; one that is there is replaced.
        """
        about = {"format": _FORMAT, "layer": self.layer, "site": self.site, "source": self.source}
        about |= {"positions": self.positions, "model": self.model}
        tensors = {"direction": np.ascontiguousarray(self.direction)}
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
                positions = about.get("positions")
                if isinstance(positions, list):
                    positions = tuple(int(at) for at in positions)
                place = about["layer"], about["site"], about["source"], positions, about.get("model", "")
                return cls(file.get_tensor("direction"), *place)
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{path} is not a saved SteeringVector: {error}. Write one with SteeringVector.save."
            ) from error

"""A shuffle buffer whose rows stay on the device: they come from the model there, and go to the training there.

It promises what `ShuffleBuffer` does and is used like it. Only the numbers of slots are mixed, on the host: a row is
written to a free slot and stays there until it is served. So the device holds the buffer once, and no row moves twice.

Hazard: a source's batches should be of one length. Each length compiles a program of its own, of a few milliseconds.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.shuffle_buffer import check_same_sizes, check_sizes

__all__ = ["DeviceShuffleBuffer"]


class DeviceShuffleBuffer:
    """Serves the rows of a stream in mixed order, in batches of one size, without their leaving the device."""

    def __init__(self, *, capacity: int, batch_size: int, seed: int = 0):
        """An empty buffer.

        Args:
            capacity: rows that it holds; at least twice `batch_size`, and twice a batch of the source.
            batch_size: rows a batch.
            seed: seed of the mixing.

        Raises:
            ValueError: if `capacity` is less than twice `batch_size`.
        """
        check_sizes(capacity, batch_size)
        self.capacity = capacity
        self.batch_size = batch_size
        self.n_taken = 0
        """Batches of the source that were taken in; where the source must start after `load_state_dict`."""
        self._random = np.random.default_rng(seed)
        self._rows: Array | None = None
        self._filled = np.zeros(0, np.int32)
        """Slots that hold a row still to be served, in mixed order; served from the end."""
        self._free = np.arange(capacity, dtype=np.int32)

    def batches(self, source: Iterable[Any]) -> Iterator[Float[Array, "batch d_in"]]:
        """Mixes a stream.

        Args:
            source: `[n, d_in]` arrays of one dtype. After `load_state_dict`: those from number `n_taken` on.

        Yields:
            Batches, each row once. At the source's end the buffer is served empty, but for rows that fill no batch.

        Raises:
            ValueError: if the source has rows of different widths, no row at all, or batches of more than half the
                capacity.
        """
        source = iter(source)
        waiting: Any = next(source, None)
        while True:
            if waiting is not None and len(self._filled) < max(self.capacity // 2, self.batch_size):
                while waiting is not None and len(self._checked(waiting)) <= len(self._free):
                    self._take_in(waiting)
                    waiting = next(source, None)
                self._filled = self._random.permutation(self._filled)
            if self._rows is None:
                raise ValueError("the source of the shuffle buffer gave no rows.")
            if len(self._filled) < self.batch_size:
                return
            slots, self._filled = self._filled[-self.batch_size :], self._filled[: -self.batch_size]
            self._free = np.concatenate([self._free, slots])
            yield _read(self._rows, slots)

    def state_dict(self) -> dict[str, Any]:
        """All that the buffer holds, on the host."""
        return {
            "capacity": self.capacity,
            "batch_size": self.batch_size,
            "n_taken": self.n_taken,
            "random": self._random.bit_generator.state,
            "filled": self._filled,
            "free": self._free,
            "rows": None if self._rows is None else np.array(self._rows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Go on with `batches(source from number n_taken on)`.

        Args:
            state_dict: what it gave.

        Raises:
            ValueError: if it is from a buffer of another capacity or batch size.
        """
        check_same_sizes(state_dict, self.capacity, self.batch_size)
        self.n_taken = state_dict["n_taken"]
        self._random.bit_generator.state = state_dict["random"]
        self._filled, self._free = state_dict["filled"], state_dict["free"]
        # A copy: the buffer is given up to each writing, and a state may be loaded twice.
        self._rows = None if state_dict["rows"] is None else jnp.array(state_dict["rows"])

    def _checked(self, rows: Any) -> Any:
        width = rows.shape[-1] if self._rows is None else self._rows.shape[1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"batch {self.n_taken} of the source has shape {rows.shape}; expected [n, {width}].")
        if len(rows) > self.capacity - self.capacity // 2:
            raise ValueError(
                f"batch {self.n_taken} of the source has {len(rows)} rows; a buffer of {self.capacity} takes at most "
                "half as many at a time."
            )
        return rows

    def _take_in(self, rows: Any) -> None:
        if self._rows is None:
            self._rows = jnp.zeros((self.capacity, rows.shape[1]), rows.dtype)
        slots, self._free = self._free[: len(rows)], self._free[len(rows) :]
        self._rows = _written(self._rows, slots, rows)
        self._filled = np.concatenate([self._filled, slots])
        self.n_taken += 1


@jax.jit
def _read(buffer: Float[Array, "capacity d_in"], slots: Int[Array, "batch"]) -> Float[Array, "batch d_in"]:
    return buffer[slots]


@jax.jit(donate_argnums=0)
def _written(
    buffer: Float[Array, "capacity d_in"], slots: Int[Array, "n"], rows: Float[Array, "n d_in"]
) -> Float[Array, "capacity d_in"]:
    return buffer.at[slots].set(rows, unique_indices=True)

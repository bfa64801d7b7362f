"""A shuffle buffer: activations come in the order of the text, training wants them in none.

The buffer is filled, mixed, and served from until half of it is left; then it is filled up and mixed again. A row
thus meets rows from the whole buffer, and a batch seldom holds two neighbours if the buffer is many times longer than a
text. Where everything fits on the disk, `ActivationStore.shuffled` mixes perfectly; this is for streams that do not.

The order is a function of the seed and the source. `state_dict` and `load_state_dict` carry it over an interruption:
rows, random state and how many batches of the source were taken, so that the source can be started from there.
`ShuffledStream` joins the two, and `train` keeps its state in each checkpoint.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["ShuffleBuffer", "check_same_sizes", "check_sizes"]


class ShuffleBuffer:
    """Serves the rows of a stream in mixed order, in batches of one size."""

    def __init__(self, *, capacity: int, batch_size: int, seed: int = 0):
        """An empty buffer.

        Args:
            capacity: rows that it holds; at least twice `batch_size`.
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
        self._rows: np.ndarray = np.zeros((0, 0), np.float32)
        self._waiting: np.ndarray | None = None

    def batches(self, source: Iterable[Any]) -> Iterator[Float[np.ndarray, "batch d_in"]]:
        """Mixes a stream.

        Args:
            source: `[n, d_in]` arrays of one dtype, of any lengths. After `load_state_dict`: those from number
                `n_taken` on.

        Yields:
            Batches, each row once. At the source's end the buffer is served empty, but for rows that fill no batch.

        Raises:
            ValueError: if the source has rows of different widths, or no row at all.
        """
        source = iter(source)
        is_open = True
        while True:
            if is_open and len(self._rows) < max(self.capacity // 2, self.batch_size):
                is_open = self._fill(source)
                if self._rows.size == 0:
                    raise ValueError("the source of the shuffle buffer gave no rows.")
            if len(self._rows) < self.batch_size:
                return
            batch = self._rows[-self.batch_size :].copy()
            self._rows = self._rows[: -self.batch_size]
            yield batch

    def _fill(self, source: Iterator[Any]) -> bool:
        """Fills the buffer up and mixes it.

        Returns:
            Whether the source may have more.
        """
        parts, n_rows, is_open = [self._rows], len(self._rows), True
        while n_rows < self.capacity:
            if self._waiting is not None:
                rows, self._waiting = self._waiting, None
            else:
                try:
                    rows = np.asarray(next(source))
                except StopIteration:
                    is_open = False
                    break
                self.n_taken += 1
            width = next((part.shape[1] for part in parts if part.size), rows.shape[-1])
            if rows.ndim != 2 or rows.shape[1] != width:
                raise ValueError(
                    f"batch {self.n_taken - 1} of the source has shape {rows.shape}; expected [n, {width}]."
                )
            room = self.capacity - n_rows
            if len(rows) > room:
                rows, self._waiting = rows[:room], rows[room:]
            parts.append(rows)
            n_rows += len(rows)
        joined = np.concatenate([part for part in parts if part.size] or [self._rows])
        self._rows = joined[self._random.permutation(len(joined))]
        return is_open

    def state_dict(self) -> dict[str, Any]:
        """All that the buffer holds, its rows not copied: they are never written over."""
        return {
            "capacity": self.capacity,
            "batch_size": self.batch_size,
            "n_taken": self.n_taken,
            "random": self._random.bit_generator.state,
            "rows": self._rows,
            "waiting": self._waiting,
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
        self._rows, self._waiting = state_dict["rows"], state_dict["waiting"]


def check_sizes(capacity: int, batch_size: int) -> None:
    """Raises ValueError for sizes that no shuffle buffer can have."""
    if batch_size < 1 or capacity < 2 * batch_size:
        raise ValueError(
            f"capacity {capacity} with batch_size {batch_size}: expected a positive batch_size and at "
            "least twice as many rows in the buffer; it mixes well from about twenty times."
        )


def check_same_sizes(state: dict[str, Any], capacity: int, batch_size: int) -> None:
    """Raises ValueError for the state of a buffer of other sizes."""
    if (state["capacity"], state["batch_size"]) != (capacity, batch_size):
        raise ValueError(
            f"the state is from a buffer of capacity {state['capacity']} and batch_size {state['batch_size']}; "
            f"this one has {capacity} and {batch_size}."
        )

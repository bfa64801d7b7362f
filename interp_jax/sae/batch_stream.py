"""What a run trains on: batches by step, checked as they come, and where they stand carried over an interruption.

Batches are a function of the step, which has no position to keep, or an iterable. A plain iterable is run through from
its start to where a resumed run goes on. One that is `Restorable` says where it stands instead, and is put back there.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from interp_jax.sae.nested_state import NestedState
from interp_jax.sae.train_config import TrainConfig

__all__ = ["BatchStream", "Batches", "Restorable"]

Batches = Callable[[int], Any] | Iterable[Any]
"""`[batch, d_in]` arrays, or pairs of them for a transcoder: an iterable, or a function from the step (from 0)."""


@runtime_checkable
class Restorable(Protocol):
    """Batches that can go on from where they stood, as Hugging Face's iterable datasets can, and PyTorch's loaders."""

    def __iter__(self) -> Iterator[Any]:
        """The batches, from the start or from where `load_state_dict` put it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: after the last batch that was given.

        Returns:
            Dictionaries, lists, numbers, strings and NumPy arrays. The iteration must not write into these arrays any
            more: they are written to the disk as it goes on.
        """
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next iteration go on from there.

        Args:
            state_dict: what `state_dict` gave.
        """
        ...


class BatchStream:
    """Batches by step, checked as they come."""

    def __init__(
        self,
        batches: Batches,
        config: TrainConfig,
        first_step: int,
        place: Callable[[Any], Any],
        position: dict[str, Any] | None = None,
    ):
        """A stream.

        Args:
            batches: a function of the step, or an iterable.
            config: the run's.
            first_step: the step of the first batch that is wanted.
            place: puts an array where the training is.
            position: the state of the batches when `first_step` of them had been read; None runs through them again.
        """
        self._place = place
        self._widths = (config.d_in,) if config.d_out is None else (config.d_in, config.d_out)
        self._first_step = first_step
        self._at: Callable[[int], Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        self._restorable = batches if isinstance(batches, Restorable) else None
        if isinstance(batches, Iterable):
            if self._restorable is not None and position is not None:
                self._restorable.load_state_dict(position)
                first_step = 0
            self._iterator = itertools.islice(iter(batches), first_step, None)
        else:
            self._at = batches
        self._peeked: Any = None

    def position(self) -> NestedState | None:
        """Where the batches stand, after the last that `next` gave; None where they do not tell."""
        return None if self._restorable is None else NestedState.of(self._restorable.state_dict())

    def peek(self) -> Any:
        """The first batch, which is still to come."""
        if self._peeked is None:
            self._peeked = self._read(self._first_step)
        return self._peeked

    def next(self, step: int) -> Any:
        """The batch of a step.

        Args:
            step: its number; the one after the last.
        """
        if self._peeked is not None:
            batch, self._peeked = self._peeked, None
            return batch
        return self._read(step)

    def _read(self, step: int) -> Any:
        if self._at is not None:
            batch = self._at(step)
        else:
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"batches ended after {step} steps: pass more of them, start over at their end (a function of "
                    "the step can), or lower n_steps."
                ) from None
        if (len(self._widths) == 2) != (isinstance(batch, tuple) and len(batch) == 2):
            expected = "a pair (input, target), since d_out is set" if len(self._widths) == 2 else "one array"
            raise ValueError(f"the batch of step {step} is a {type(batch).__name__}; expected {expected}.")
        parts = batch if isinstance(batch, tuple) else (batch,)
        shapes = [np.shape(part) for part in parts]
        for shape, width in zip(shapes, self._widths, strict=True):
            if len(shape) != 2 or shape[1] != width or shape[0] == 0:
                raise ValueError(f"the batch of step {step} has shape {shape}; expected [batch, {width}], not empty.")
        if shapes[0][0] != shapes[-1][0]:
            raise ValueError(f"the batch of step {step} has {shapes[0][0]} inputs and {shapes[-1][0]} targets.")
        arrays = tuple(map(self._place, parts))
        return arrays if len(arrays) == 2 else arrays[0]

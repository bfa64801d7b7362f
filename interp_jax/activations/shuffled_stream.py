"""A stream of activations in mixed order that `train` can interrupt: where it stands is kept in each checkpoint.

    stream = ShuffledStream(batches_from, ShuffleBuffer(capacity=100_000, batch_size=4096))
    train(config, stream, checkpoint_dir="run", resume=True)

A resumed run starts the source where the buffer had read to, with the buffer as it was: nothing is computed twice but
for what was read since the last checkpoint. Hazard: each checkpoint then holds the whole buffer.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from interp_jax.activations.device_shuffle_buffer import DeviceShuffleBuffer
from interp_jax.activations.shuffle_buffer import ShuffleBuffer

__all__ = ["ShuffledStream"]


class ShuffledStream:
    """Batches of a stream in mixed order, `Restorable` as `interp_jax.sae.batch_stream` wants them."""

    def __init__(self, source: Callable[[int], Iterable[Any]], buffer: ShuffleBuffer | DeviceShuffleBuffer):
        """A stream.

        Args:
            source: gives the stream's `[n, d_in]` arrays from a number of them on; always the same ones.
            buffer: an empty one, on the host or on the device.
        """
        self._source = source
        self._buffer = buffer

    def __iter__(self) -> Iterator[Any]:
        """The batches that are still to come: `[batch, d_in]`, on the host or on the device."""
        return self._buffer.batches(self._source(self._buffer.n_taken))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the buffer, and how much of the source it has read."""
        return self._buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to where the stream stood.

        Args:
            state_dict: what `state_dict` gave.

        Raises:
            ValueError: if it is of a buffer of another capacity or batch size.
        """
        self._buffer.load_state_dict(state_dict)

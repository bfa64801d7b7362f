"""The next batches are made while the model trains on this one.

One thread beside the training reads the disk, or runs the model; how long the training waited all the same is counted
in `waited_s`. A batch is never ahead of its turn by more than `depth`, and each is made by the source, once and in
order, so a run with prefetching is the run without it to the bit, and is resumed as that is.

Every batch is a task of its own for the thread, which therefore never blocks on a full queue: there is nothing to
deadlock on when an exception ends the training, or at the interpreter's exit.

Hazard: on a CPU the model and the training share the same cores. Prefetching then hides the disk's time alone.
"""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar, cast, overload

from interp_jax.sae.batch_stream import Restorable

__all__ = ["PrefetchedRestorable", "PrefetchedSteps", "PrefetchedStream", "prefetched"]

Batch = TypeVar("Batch")
Ahead = TypeVar("Ahead", bound="_Ahead[Any]")


@overload
def prefetched(batches: Callable[[int], Batch], depth: int = 2) -> "PrefetchedSteps[Batch]": ...
@overload
def prefetched(batches: Iterable[Batch], depth: int = 2) -> "PrefetchedStream[Batch]": ...
def prefetched(
    batches: Callable[[int], Batch] | Iterable[Batch], depth: int = 2
) -> "PrefetchedSteps[Batch] | PrefetchedStream[Batch]":
    """Makes batches ahead of their turn, in a thread.

        with prefetched(store.shuffled(4096)) as batches:
            train(config, batches)
        print(batches.waited_s)

    Args:
        batches: what `train` takes: a function from the step to its batch, or an iterable.
        depth: how many batches are made ahead; each is held in memory.

    Returns:
        The same, prefetched: a function of the step, or an iterator, `Restorable` where the source is. Its thread ends
        with the `with` block, with `close`, or with the interpreter.

    Raises:
        ValueError: if `depth` is less than one.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; expected at least one batch to be made ahead.")
    if isinstance(batches, Restorable):
        return PrefetchedRestorable(batches, depth)
    if isinstance(batches, Iterable):
        return PrefetchedStream(batches, depth)
    return PrefetchedSteps(batches, depth)


class _Ahead(Generic[Batch]):
    """Tasks for one thread, and the waiting for them."""

    waited_s: float
    """Seconds that were spent waiting for a batch, the first one included."""
    n_batches: int
    """Batches that were given."""

    def __init__(self, depth: int):
        self.waited_s = 0.0
        self.n_batches = 0
        self._depth = depth
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "interp_jax-prefetch")
        self._coming: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()

    def _wait(self) -> Batch:
        """The next of the batches that are coming.

        Raises:
            Exception: whatever the source raised for it.
        """
        start = time.perf_counter()
        try:
            batch = self._coming.popleft().result()
        finally:
            self.waited_s += time.perf_counter() - start
        self.n_batches += 1
        return batch

    def _forget(self) -> None:
        """Drops what is coming; the task that is being done is waited for."""
        for future in self._coming:
            future.cancel()
        concurrent.futures.wait(self._coming)
        self._coming.clear()

    def close(self) -> None:
        """Ends the thread, after the batch that it is at."""
        self._forget()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self: Ahead) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class PrefetchedSteps(_Ahead[Batch]):
    """A function from the step to its batch, which expects the steps after it to be asked for next."""

    def __init__(self, batches: Callable[[int], Batch], depth: int):
        """Nothing is made before the first step is asked for.

        Args:
            batches: from the step to its batch.
            depth: how many batches are made ahead.
        """
        super().__init__(depth)
        self._batches = batches
        self._step = 0
        """Of the first batch that is coming."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step.

        Args:
            step: any; another than the next one makes what was made ahead useless.

        Raises:
            Exception: whatever the source raised for that step.
        """
        if step != self._step:
            self._forget()
            self._step = step
        while len(self._coming) <= self._depth:
            self._coming.append(self._thread.submit(self._batches, self._step + len(self._coming)))
        self._step += 1
        return self._wait()


class PrefetchedStream(_Ahead[Batch], Iterator[Batch]):
    """An iterator that is ahead of itself."""

    def __init__(self, batches: Iterable[Batch], depth: int):
        """Nothing is made before the first batch is asked for.

        Args:
            batches: the source.
            depth: how many batches are made ahead.
        """
        super().__init__(depth)
        self._source = iter(batches)
        self._ended: BaseException | None = None

    def _next(self) -> Batch:
        """The source's next batch; nothing more is asked of it once it has ended or failed."""
        if self._ended is not None:
            raise self._ended
        try:
            return next(self._source)
        except BaseException as error:
            # Of the tasks that are still waiting each raises it again: the source is not asked once more.
            self._ended = _End() if isinstance(error, StopIteration) else error
            raise self._ended from None

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            Exception: whatever the source raised.
        """
        while self._ended is None and len(self._coming) <= self._depth:
            self._coming.append(self._thread.submit(self._next))
        try:
            if self._ended is not None and not self._coming:
                raise self._ended
            return self._wait()
        except _End:
            self.close()
            raise StopIteration from None


class PrefetchedRestorable(PrefetchedStream[Batch]):
    """A stream that is ahead of itself, and tells where it stands after the last batch that was given."""

    def __init__(self, batches: Restorable, depth: int):
        """Nothing is made before the first batch is asked for.

        Args:
            batches: the source.
            depth: how many batches are made ahead; as many states are held.
        """
        super().__init__(_with_states(batches), depth)
        self._batches = batches
        self._state: dict[str, Any] | None = None

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            Exception: whatever the source raised.
        """
        batch, self._state = cast(Any, super().__next__())
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The source's state, as it was when it had given the last batch that was given here."""
        return self._batches.state_dict() if self._state is None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts the source where it stood; before the first batch is asked for.

        Args:
            state_dict: what `state_dict` gave.
        """
        self._batches.load_state_dict(state_dict)


def _with_states(batches: Restorable) -> Iterator[Any]:
    """Batches, each with the state after it. Nothing of the source is asked for before the first one is."""
    for batch in batches:
        yield batch, batches.state_dict()


class _End(Exception):
    """The source has no more."""

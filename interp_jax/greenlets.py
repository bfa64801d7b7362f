"""Generators whose body yields from any depth of its call stack.

An ordinary generator can yield only from its own frame. A forward pass of a model is many frames deep where an
activation exists, and none of them is ours. `GreenletGenerator` runs a plain function in a greenlet of its own;
`yield_`, called anywhere below that function, hands a value to whoever iterates and waits there for the next step.

What is promised, and what enforces it:

* It is a `collections.abc.Generator` in full: `next`, `send`, `throw`, `close` and the return value behave as PEP 342
  and PEP 380 say, and a `StopIteration` that escapes the body becomes a `RuntimeError` as PEP 479 says.
* Context variables of the place that starts it are seen inside, as a copy.
* Steps are nested, never interleaved. A body that runs inside JAX changes thread-wide state (the current trace) in
  `with` blocks, so generators started from one place must be finished last in, first out. One generator may run from
  start to end between two steps of another; `zip` of two is refused with an `InterleavingError`, after both were closed
  in the right order, so that the state they had changed is restored.
* It is closed when the last reference to it goes, so `break` out of a `for` unwinds the body at once. For that to hold,
  nothing that the body can reach may refer to the generator object: the two share a `_Channel` instead.
* It belongs to the thread that started it. A step from another thread is an error.

This module does not import JAX.
"""

import collections.abc
import contextvars
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import greenlet

__all__ = ["GreenletGenerator", "InterleavingError", "yield_"]

Yielded = TypeVar("Yielded")
Sent = TypeVar("Sent")
Returned = TypeVar("Returned")


class InterleavingError(RuntimeError):
    """Two generators were stepped in turns, or one was stepped from a place that did not start it."""


class _Channel:
    """What a body and its generator share: where each waits, and how the body ended."""

    def __init__(self, run: Callable[[], Any]):
        self.run: Callable[[], Any] | None = run
        self.consumer: greenlet.greenlet | None = None  # started the body, and alone may step it
        self.suspended: greenlet.greenlet | None = None  # waits in `yield_to`; a nested body's greenlet, perhaps
        self.thread = 0
        self.state = "created"  # created, running, suspended, finished
        self.returned: Any = None
        self.raised: BaseException | None = None

    def body(self) -> None:
        run, self.run = self.run, None
        assert run is not None
        try:
            self.returned = run()
        except BaseException as error:  # handed to the consumer, who raises it with this traceback
            self.raised = error
        finally:
            # The frame's reference would keep alive what the body was called with.
            del run
            self.state = "finished"

    def leave(self) -> None:
        """Takes this channel off its consumer's stack of unfinished bodies."""
        if self.consumer is not None:
            unfinished = _unfinished(self.consumer)
            if self in unfinished:
                unfinished.remove(self)


class _Child(greenlet.greenlet):
    """A greenlet that knows the channel of its body and which bodies it has itself started."""

    channel: _Channel


# Unfinished bodies by the greenlet that started them, oldest first. Kept on the greenlet where it is ours, and per
# thread for a thread's own main greenlet (or a foreign one), which takes no attributes.
_of_thread = threading.local()


def _unfinished(consumer: greenlet.greenlet) -> list[_Channel]:
    if isinstance(consumer, _Child):
        return consumer.__dict__.setdefault("unfinished", [])
    if not hasattr(_of_thread, "unfinished"):
        _of_thread.unfinished = {}
    return _of_thread.unfinished.setdefault(id(consumer), [])


def yield_(value: Any) -> Any:
    """Yields `value` from the innermost running `GreenletGenerator`, from any depth of its body.

    Args:
        value: handed to the consumer as it is; None and tuples are themselves.

    Returns:
        What the consumer sent: None after `next`.

    Raises:
        RuntimeError: no generator's body is running here.
    """
    current = greenlet.getcurrent()
    if not isinstance(current, _Child):
        raise RuntimeError(
            "yield_ was called outside the body of a GreenletGenerator: call it in the function that the generator runs"
        )
    return _yield_to(current.channel, value)


def _yield_to(channel: _Channel, value: Any) -> Any:
    assert channel.consumer is not None
    channel.suspended = greenlet.getcurrent()
    channel.state = "suspended"
    return channel.consumer.switch(value)


class GreenletGenerator(collections.abc.Generator, Generic[Yielded, Sent, Returned]):
    """Runs `function(*args, **kwargs)` as the body of a generator; `yield_` inside it yields."""

    def __init__(self, function: Callable[..., Returned], /, *args: Any, **kwargs: Any):
        self._channel = _Channel(lambda: function(*args, **kwargs))

    def yielder(self) -> Callable[[Yielded], Sent]:
        """A `yield_` that yields from this very generator, also below another one that runs inside its body.

        What it returns refers to the generator's channel only, so the body may keep it.
        """
        channel = self._channel
        return lambda value: _yield_to(channel, value)

    def send(self, value: Any, /) -> Yielded:
        """Resumes the body with `value` as what `yield_` returns, and gives what it yields next."""
        channel = self._channel
        if channel.state == "created" and value is not None:
            raise TypeError("can't send non-None value to a just-started generator")
        if channel.state == "finished":
            raise StopIteration
        if channel.state == "running":
            raise ValueError("generator already executing")
        self._check_turn()
        if channel.state == "suspended":
            assert channel.suspended is not None
            return self._step(channel.suspended.switch, value)
        consumer = greenlet.getcurrent()
        channel.consumer, channel.thread = consumer, threading.get_ident()
        child = _Child(channel.body, parent=consumer)
        child.channel = channel
        child.gr_context = contextvars.copy_context()
        _unfinished(consumer).append(channel)
        return self._step(child.switch)

    def throw(
        self,
        typ: Any,
        val: Any = None,
        tb: TracebackType | None = None,
        /,
    ) -> Yielded:
        """Raises an exception in the body where it waits, and gives what it yields next."""
        channel = self._channel
        if channel.state == "running":
            raise ValueError("generator already executing")
        if channel.state in ("created", "finished"):
            channel.state = "finished"
            channel.run = None
            raise _as_exception(typ, val, tb)
        self._check_turn()
        assert channel.suspended is not None
        return self._step(channel.suspended.throw, _as_exception(typ, val, tb))

    def close(self) -> None:
        """Unwinds the body: `GreenletExit` is raised where it waits, and its `with` and `finally` blocks run.

        Raises:
            RuntimeError: the body yielded again instead of ending. It is then unwound without further ado.
        """
        channel = self._channel
        if channel.state == "created":
            channel.state, channel.run = "finished", None
        if channel.state != "suspended":
            return
        self._check_thread()
        _close(channel)

    def __del__(self) -> None:
        channel = self._channel
        # In another thread nothing can be unwound from here; the greenlet library does it when its own thread runs
        # next.
        if channel.state == "suspended" and channel.thread == threading.get_ident():
            _close(channel)

    def _step(self, switch: Callable[..., Any], *args: Any) -> Yielded:
        channel = self._channel
        channel.state = "running"
        channel.suspended = None
        value = switch(*args)
        if channel.state == "suspended":
            return value
        channel.leave()
        _raise_outcome(channel)
        raise AssertionError("unreachable")

    def _check_thread(self) -> None:
        if self._channel.consumer is not None and self._channel.thread != threading.get_ident():
            raise InterleavingError(
                "this generator was started in another thread: step it, and close it, "
                "in the thread that took its first step"
            )

    def _check_turn(self) -> None:
        channel = self._channel
        self._check_thread()
        if channel.consumer is None:
            return
        if channel.consumer is not greenlet.getcurrent():
            raise InterleavingError(
                "this generator was started elsewhere in the stack of running passes: "
                "step it where its first step was taken"
            )
        if _unfinished(channel.consumer)[-1] is not channel:
            _close(channel)
            raise InterleavingError(
                "two generators were stepped in turns, as zip does. What the younger one changed in the thread's state "
                "must be undone before the older one goes on: run the one to its end (or break out of it), keep what "
                "you need, then step the other. Both were closed."
            )


def _close(channel: _Channel) -> None:
    """Closes a suspended body, the younger ones that its consumer started after it first."""
    assert channel.consumer is not None
    unfinished = _unfinished(channel.consumer)
    while unfinished and unfinished[-1] is not channel:
        _unwind(unfinished[-1])
    _unwind(channel)


def _unwind(channel: _Channel) -> None:
    yields = 0
    while channel.state == "suspended":  # again, where the body yielded while it was being unwound
        assert channel.suspended is not None
        waiting = channel.suspended
        channel.state, channel.suspended = "running", None
        waiting.throw(greenlet.GreenletExit)
        yields += 1
    channel.leave()
    raised, channel.raised, channel.returned = channel.raised, None, None
    if yields > 1:
        raise RuntimeError("generator ignored GreenletExit: its body yielded while it was being closed")
    if raised is not None and not isinstance(raised, (greenlet.GreenletExit, GeneratorExit, StopIteration)):
        raise raised


def _raise_outcome(channel: _Channel) -> None:
    """Ends a step after the body has ended: raises what it raised, or StopIteration with what it returned."""
    raised, returned = channel.raised, channel.returned
    channel.raised = channel.returned = None
    if raised is None:
        raise StopIteration(returned)
    try:
        if isinstance(raised, StopIteration):
            raise RuntimeError("generator raised StopIteration") from raised
        raise raised
    finally:
        del raised  # the traceback refers to this frame: no cycle may keep the body's values alive


def _as_exception(typ: Any, val: Any, tb: TracebackType | None) -> BaseException:
    """The exception that `throw(typ, val, tb)` of a plain generator raises."""
    if isinstance(typ, BaseException):
        if val is not None:
            raise TypeError("instance exception may not have a separate value")
        error = typ
    elif isinstance(typ, type) and issubclass(typ, BaseException):
        if isinstance(val, typ):
            error = val
        elif val is None:
            error = typ()
        else:
            error = typ(*val) if isinstance(val, tuple) else typ(val)
    else:
        raise TypeError(
            f"exceptions must be classes or instances deriving from BaseException, not {type(typ).__name__}"
        )
    return error if tb is None else error.with_traceback(tb)

"""Loop values of inner functions: an error that says `save`, where JAX would speak of an unexpected tracer.

A site in a function that JAX traces (jit, checkpoint, scan, vmap, ...) has a value that is gone when that function has
been traced. Kept in a Python variable and used later it is a leak, which JAX reports in words of its own machinery, and
sometimes only much later. So the loop's body gets such a value in a box, and what it computes from a box is a box too.
Inside the body a box is as good as the value; used where its function is over, it raises a `LoopValueError`, which
names the site and the cure.

How. While the body runs, a `_BoxTrace` stands as the current trace over that of the function. It takes the values
out of their boxes, hands the operation down, and boxes what comes back. A site outside all such functions needs none of
this: its values live as long as the loop's surroundings, and are handed over as they are.

What bites: a box keeps its function's trace alive, as the bare value would, so JAX's own leak checker reports a loop
variable that outlives the function; `del value` at the body's end is the cure there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core

from interp_jax.instrument import trace_context

__all__ = ["LoopValueError", "LoopValues", "unboxed"]


class LoopValueError(RuntimeError):
    """A loop value was used where it no longer lives; the message says which one, and what to do instead."""


class LoopValues:
    """The boxed values of one pass."""

    def __init__(self) -> None:
        self._now: _BoxTrace | None = None  # the trace of the body that runs

    @contextlib.contextmanager
    def shown(self, value: Any, where: str, top: jax.core.Trace | None) -> Iterator[Any]:
        """Gives the value as the loop's body is to see it, and makes the body's operations stand where it does.

        Args:
            value: the activation, of the current trace.
            where: the site, in words.
            top: the pass's own trace, in which nothing needs a box.
        """
        here = trace_context.current_trace()
        if here is top:
            yield value
            return
        trace, before = _BoxTrace(self, here, top, where), self._now
        self._now = trace
        trace.is_running = True
        try:
            with trace_context.entered(trace):
                yield jax.tree.map(trace.boxed, value)
        finally:
            self._now = before
            trace.is_running = False

    def reach(self, trace: jax.core.Trace) -> bool:
        """Whether a body runs now, and stands in `trace` or in a function inside it."""
        return self._now is not None and self._now.stands_in(trace)


def unboxed(tree: Any) -> Any:
    """What is in the boxes of a tree; other leaves are themselves."""
    return jax.tree.map(_unboxed, tree)


def _unboxed(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, _Box) else leaf


class _Box(jax.core.Tracer):
    """A value of an inner function, for the loop's body."""

    __slots__ = ("inner",)
    _trace: "_BoxTrace"

    def __init__(self, trace: "_BoxTrace", inner: jax.core.Tracer):
        # Not by the base's __init__, which would store what is a property here.
        self._trace, self._line_info, self.inner = trace, None, inner

    @property
    def aval(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Every use of an array asks for its type first.
        self._trace.check_alive()
        return self.inner.aval

    def to_concrete_value(self) -> Any:
        self._trace.check_alive()
        return self.inner.to_concrete_value()

    def __repr__(self) -> str:
        return f"LoopValue<{self.inner.aval}> of {self._trace.where}"


def _owner(trace: Any) -> Any:
    """The trace that the values of `trace` belong to: a harvest has none of its own, but those of its parent."""
    while (parent := getattr(trace, "parent", None)) is not None:
        trace = parent
    return trace


def _parent(trace: Any) -> Any:
    """The trace around a harvest's, or around one of JAX's own; None where that cannot be told."""
    return getattr(trace, "parent", None) or getattr(trace, "parent_trace", None)


class _BoxTrace(jax.core.Trace):
    """Stands over the trace of an inner function while the loop's body runs there."""

    def __init__(self, values: LoopValues, inner: jax.core.Trace, top: jax.core.Trace | None, where: str):
        super().__init__()
        trace_context.pass_for(self, inner)
        self.values = values
        self.inner = inner
        self.owner = _owner(inner)
        self.top = top
        self.where = where
        self.is_running = False

    def boxed(self, value: Any) -> Any:
        # Concrete values, and those of the traces around the function, live on.
        return _Box(self, value) if isinstance(value, jax.core.Tracer) and value._trace is self.owner else value

    def stands_in(self, trace: jax.core.Trace) -> bool:
        at: Any = self.inner
        while at is not self.top:
            if at is trace:
                return True
            at = _parent(at)
            if at is None:
                return True  # a kind of trace that does not tell what is around it: JAX must judge
        return False

    def check_alive(self) -> None:
        if not self.is_running and not self.values.reach(self.owner):
            raise LoopValueError(
                f"a value that the loop gave at {self.where}, or one computed from it, was used where it no longer "
                "lives: the site stands in a function that JAX traces (jit, checkpoint, scan, vmap or the like), and "
                "that function is over. A Python variable does not carry a value out of it: use "
                "running.save(name, value) in the loop, and running.saved[name] after it"
            )

    def stage_value(self, val: Any) -> Any:
        return self.boxed(self.inner.stage_value(_unboxed(val)))

    def process_primitive(self, primitive: Any, tracers: Sequence[Any], params: dict[str, Any], /) -> Any:
        return self._all_boxed(self.inner.process_primitive(primitive, [_unboxed(each) for each in tracers], params))

    def process_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._handed_down(self.inner.process_call, args, kwargs)

    def process_custom_jvp_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._handed_down(self.inner.process_custom_jvp_call, args, kwargs)

    def process_custom_vjp_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._handed_down(self.inner.process_custom_vjp_call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # shard_map and others ask the current trace for a method of their own (process_shard_map, ...).
        if not name.startswith("process_"):
            raise AttributeError(name)
        process = getattr(self.inner, name)
        return lambda *args, **kwargs: self._handed_down(process, args, kwargs)

    def _handed_down(self, process: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the inner trace, one of whose arguments is the list of operands."""
        lowered = [[_unboxed(each) for each in arg] if isinstance(arg, (list, tuple)) else arg for arg in args]
        return self._all_boxed(process(*lowered, **kwargs))

    def _all_boxed(self, outs: Any) -> Any:
        return [self.boxed(each) for each in outs] if isinstance(outs, (list, tuple)) else self.boxed(outs)

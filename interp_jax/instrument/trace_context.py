"""JAX's trace state and cache keys: everything that the running pass asks of JAX's internals stands here.

**Stale caches.** `jit`, `checkpoint`, `scan` and the rest keep what they traced. A function that was traced before
would not reach its sites again, and an edit made while tracing would stay in the cache and come back in later, clean
calls. The cure is `jax.make_user_context`: its value is part of every cache key. While a pass runs, the value is a
token of its thread; outside it is None. So clean calls and passes never share an entry.

**When the token changes.** A token could be new at every site, but then every small jitted function of `jax.numpy`
would be traced (and outside jit compiled) again between any two sites, in every pass. It is enough to give up a token
when it has been *spoilt*: at the first site in a trace whose result JAX will cache (that of a jitted function, a scan's
body, ...). The functions around that trace were entered before the new token was; so later sites in it spoil nothing,
and only a function that is entered under the new token can, at its own first site. Sites in the pass's own top-level
trace, or under `grad` and `vmap` there, spoil nothing at all: a model that is a plain Python loop keeps one token for
ever, and its helper functions stay compiled. Sites that a filter passes over spoil the token too: a later pass may want
them.

Tokens are by thread, so that one thread's tracing cannot spoil a token that another is using.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import numpy as np
from jax.extend.core import set_current_trace, take_current_trace

_cache_key = jax.make_user_context(None)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.generation = 0
        self.spoilt_by: weakref.WeakSet[jax.core.Trace] = weakref.WeakSet()
        self.entered: list[CacheToken] = []


_thread = _Thread()


class CacheToken:
    """The cache key of one pass, entered for as long as the pass's body runs."""

    def __enter__(self) -> "CacheToken":
        self._enter()
        _thread.entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _thread.entered.remove(self)
        self._context.__exit__(None, None, None)
        if _thread.entered:
            # What this pass spoilt, the pass around it must not meet again.
            _thread.entered[-1].renew()

    def spoil(self, trace: jax.core.Trace) -> None:
        """Gives up the token, at the first site in `trace`.

        What is traced from here on has a new cache key, in this pass and in those to come.
        """
        if trace not in _thread.spoilt_by:
            _thread.spoilt_by.add(trace)
            _thread.generation += 1
            self.renew()

    def renew(self) -> None:
        """Enters the thread's newest token in the place of the one that was entered."""
        self._context.__exit__(None, None, None)
        self._enter()

    def _enter(self) -> None:
        self._context: Any = _cache_key((threading.get_ident(), _thread.generation))
        self._context.__enter__()


def current_trace() -> jax.core.Trace:
    """The trace in which a JAX operation called here and now would stand."""
    with take_current_trace() as trace:
        return trace


@functools.cache
def _transparent() -> frozenset[type]:
    """The kinds of trace that compute as they go, and cache nothing: those of jvp, grad and vmap."""
    types: list[type] = []

    def note(x: Any) -> Any:
        types.append(type(current_trace()))
        return x

    with jax.core.eval_context():
        jax.jvp(note, (0.0,), (0.0,))
        jax.linearize(note, 0.0)
        jax.vmap(note)(np.zeros(1))
    return frozenset(types)


@functools.cache
def vmap_types() -> tuple[type, type]:
    """The kind of trace of a vmap, and the kind of its values."""
    types: list[tuple[type, type]] = []

    def note(x: Any) -> Any:
        types.append((type(current_trace()), type(x)))
        return x

    with jax.core.eval_context():
        jax.vmap(note)(np.zeros(1))
    return types[0]


def mapped(trace: jax.core.Trace, value: Any) -> Any:
    """An array whose first axis is a vmap's batch, as a value in that vmap's trace."""
    return vmap_types()[1](trace, value, 0)


def is_of_current_trace(value: Any) -> bool:
    """Whether a value is the current trace's own. In a vmap's, one that does not depend on the batch is not."""
    return getattr(value, "_trace", None) is current_trace()


def staging_trace(top: jax.core.Trace | None) -> jax.core.Trace | None:
    """The innermost trace between here and `top` whose result JAX may cache; None if there is none."""
    trace: Any = current_trace()
    while trace is not top:
        around = getattr(trace, "parent_trace", None)
        if type(trace) not in _transparent() or around is None:
            return trace
        trace = around
    return None


@contextlib.contextmanager
def entered(trace: jax.core.Trace) -> Iterator[None]:
    """Makes `trace` the current one in the block."""
    with set_current_trace(trace):
        yield


def pass_for(trace: jax.core.Trace, other: jax.core.Trace) -> None:
    """Gives `trace` the identity of `other` in the eyes of `jax.extend.core.get_opaque_trace_state`.

    Flax NNX compares it before it lets a module be changed: under a trace of ours every module that was made before the
    pass would be foreign, and every one that was changed in it, after. JAX has no public way to say that two traces are
    one, so this sets the attribute that the state is made of.
    """
    trace._weakref = other._weakref  # pyright: ignore[reportAttributeAccessIssue]

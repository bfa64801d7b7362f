"""Sowing: a value is tagged where it stands in a computation, for a harvest around it to collect or replace.

`sow` binds the primitive `sow_p` only while somebody listens for that very tag and name; otherwise it is the plain
identity and nothing is traced. A sow that is always bound is not free: its effect slows jit's dispatch and defeats
rematerialisation.

What bites, and the answer:

* Without an effect, `grad(jit(...))` and `grad(checkpoint(...))` would drop a sow whose result nobody uses. JAX permits
  effects of a few types of its own in control flow, rematerialisation and custom derivatives, `jax.debug`'s being one.
  Ours derives from it: the one public way to be permitted there.
* Who listens is part of JAX's cache keys (`jax.make_user_context`), so a function that was traced while nobody listened
  is traced again for a harvest, and a harvest that comes back meets its own traces.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

__all__ = ["Listener", "listening", "nest", "sow", "sow_cond", "sow_p", "sow_value"]

MODES = ("strict", "append", "clobber", "cond_clobber")


def _debug_effect_type() -> type:
    (effect,) = jax.make_jaxpr(lambda: jax.debug.print(""))().effects
    return type(effect)


class SowEffect(_debug_effect_type()):
    """Keeps a sow in the program although nothing may use its result."""

    __str__ = __repr__ = lambda self: "Sow"


_effect = SowEffect()

sow_p = jex.Primitive("sow")
"""The primitive. Operands: a predicate where `has_pred`, a row number in mode `slot`, then the value's leaves, which
are also its results. The predicate's axes are the leading axes of every leaf, or it is a scalar."""
sow_p.multiple_results = True


def controls(params: dict[str, Any]) -> int:
    """How many of a sow's operands come before the leaves."""
    return params["has_pred"] + (params["mode"] == "slot")


def _impl(*operands: Any, **params: Any) -> list[Any]:
    return list(operands[controls(params) :])


sow_p.def_impl(_impl)
sow_p.def_effectful_abstract_eval(lambda *operands, **params: (_impl(*operands, **params), {_effect}))
mlir.register_lowering(sow_p, lambda ctx, *operands, **params: _impl(*operands, **params))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    return sow_p.bind(*primals, **params), list(tangents[controls(params) :])


def _batch(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[list[Any], list[int | None]]:
    """Reaped values carry the batch axis in front, wherever it was. One that does not depend on the batch has none."""
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    fronted = [
        operand if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]
    mapped = [axis is not None for axis in axes]
    first = controls(params)
    if params["mode"] == "slot" and mapped[first - 1]:
        raise NotImplementedError("a row of a layer scan's buffer must not depend on a vmapped value")
    if params["has_pred"] and (mapped[0] or (any(mapped[first:]) and jnp.ndim(operands[0]))):
        # The predicate's axes must stay the leading axes of every leaf.
        for i in (0, *range(first, len(operands))):
            fronted[i] = fronted[i] if mapped[i] else jnp.broadcast_to(fronted[i], (size, *jnp.shape(fronted[i])))
            mapped[i] = True
    return sow_p.bind(*fronted, **params), [0 if one else None for one in mapped[first:]]


ad.primitive_jvps[sow_p] = _jvp
batching.primitive_batchers[sow_p] = _batch


edit_p = jex.Primitive("edit")
"""Marks in a jaxpr that a running pass replaced a value there. It costs nothing: no operand, no result, no effect."""
edit_p.multiple_results = True
edit_p.def_impl(list)
edit_p.def_abstract_eval(list)
mlir.register_lowering(edit_p, lambda ctx: [])


@contextlib.contextmanager
def bound(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    """In the block a context variable has this value."""
    reset = variable.set(value)
    try:
        yield
    finally:
        variable.reset(reset)


_silent: contextvars.ContextVar[bool] = contextvars.ContextVar("silent", default=False)


def is_silent() -> bool:
    """Whether the code that runs is there for its derivative alone, and its sites and sows have had their turn."""
    return _silent.get()


def silence() -> contextlib.AbstractContextManager[None]:
    """Nothing is sown in the block."""
    return bound(_silent, True)


_fronts: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("fronts", default=())


def in_front_of_scans(fronts: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
    """In the block, what is saved will have a batch axis for each of these: in front of what so many scans stack."""
    return bound(_fronts, fronts)


def mark_edit() -> None:
    """Notes in the jaxpr that is being traced that a value of it was replaced."""
    edit_p.bind()


@dataclasses.dataclass(frozen=True)
class Listener:
    """Which sows a harvest is for."""

    tag: Hashable
    allowlist: frozenset[Hashable] | None = None
    blocklist: frozenset[Hashable] = frozenset()
    exclusive: bool = False
    planted: frozenset[tuple[Hashable, tuple[Hashable, ...]]] = frozenset()
    """The tag and the paths at which it puts values."""

    @classmethod
    def of(
        cls,
        tag: Hashable,
        allowlist: Collection[Hashable] | None,
        blocklist: Collection[Hashable],
        exclusive: bool,
    ) -> "Listener":
        return cls(tag, None if allowlist is None else frozenset(allowlist), frozenset(blocklist), exclusive)

    def wants(self, tag: Hashable, name: Hashable) -> bool:
        return tag == self.tag and (self.allowlist is None or name in self.allowlist) and name not in self.blocklist


# Innermost last. The user context says the same as the context variable, to JAX's caches.
_listeners: contextvars.ContextVar[tuple[Listener, ...]] = contextvars.ContextVar("listeners", default=())
_scope: contextvars.ContextVar[tuple[Hashable, ...]] = contextvars.ContextVar("scope", default=())
_cache_key = jax.make_user_context(((), ()))


def listeners() -> tuple[Listener, ...]:
    """Who listens here, innermost last."""
    return _listeners.get()


def is_heard(by: tuple[Listener, ...], tag: Hashable, name: Hashable) -> bool:
    """Whether one of these listeners, innermost last, gets to see a sow."""
    if _silent.get():
        return False
    for listener in reversed(by):
        if listener.wants(tag, name):
            return True
        if listener.exclusive and listener.tag != tag:
            return False
    return False


@contextlib.contextmanager
def _entered(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    with bound(variable, value), _cache_key((_listeners.get(), _scope.get())):
        yield


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Makes `listener` the innermost in the block."""
    with _entered(_listeners, (*_listeners.get(), listener)):
        yield


def sow(value: Any, *, tag: Hashable, name: Hashable, mode: str = "strict", key: Any = None) -> Any:
    """Tags a value, to be reaped or replaced by a harvest of the same tag.

    Args:
        value: any pytree of arrays.
        tag: which harvest the value is meant for.
        name: what it is called there; below the scopes of `nest`.
        mode: what happens where the name is met again, or inside control flow. `"strict"`: an error. `"append"`: a
            `scan` stacks its iterations on a new leading axis. `"clobber"`: the last value stands.
        key: an array that the value is made to depend on, so that it is computed after it.

    Returns:
        `value`, or what was planted in its place. Where no harvest wants it, it is the very same object and nothing is
        traced.

    Raises:
        ValueError: if the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"the mode of a sow is one of {', '.join(MODES)}, not {mode!r}")
    if mode == "cond_clobber":
        raise ValueError("for the mode 'cond_clobber' use sow_cond, which takes the predicate")
    if not is_heard(_listeners.get(), tag, name):
        return value
    if key is not None:
        value, _ = jax.lax.optimization_barrier((value, key))
    return sow_value(value, tag=tag, name=name, mode=mode)


def sow_cond(value: Any, pred: Any, *, tag: Hashable, name: Hashable, mode: str = "cond_clobber") -> Any:
    """`sow` under a condition: the last value for which `pred` held is reaped, zeros if it never held.

    Args:
        value: any pytree of arrays.
        pred: a boolean scalar. A planted value replaces `value` where it holds.
        tag: as in `sow`.
        name: as in `sow`.
        mode: `"cond_clobber"`, the only one that takes a predicate.

    Returns:
        `value`, or where `pred` holds what was planted in its place.

    Raises:
        ValueError: if the mode is another, or `pred` is no boolean scalar.
    """
    if mode != "cond_clobber":
        raise ValueError(f"sow_cond has the mode 'cond_clobber' only, not {mode!r}")
    if not is_heard(_listeners.get(), tag, name):
        return value
    if jnp.shape(pred) or jnp.result_type(pred) != jnp.bool_:
        raise ValueError(
            f"sow_cond of {name!r}: pred must be a boolean scalar, but it has shape {jnp.shape(pred)} and dtype "
            f"{jnp.result_type(pred)}"
        )
    return sow_value(value, tag=tag, name=name, mode=mode, pred=pred)


def sow_value(
    value: Any,
    *,
    tag: Hashable,
    name: Hashable,
    mode: str = "save",
    pred: Any = None,
    index: Any = None,
    slots: int | None = None,
    scans: int | None = None,
    scope: tuple[Hashable, ...] | None = None,
) -> Any:
    """Binds the primitive, whoever listens.

    There are four modes beyond those of `sow`, for the running pass: `"save"` is strict, stacks in a scan, is zero
    where a branch was not taken, and the last value of a while loop; `"stack"` stacks the iterations of scans, always
    in front; `"slot"` writes `value` into row `index` of a buffer of `slots` rows. The last two are for layer scans:
    `scans` says how many stand around the sow, and another scan besides is an error. `"ask"` is for a value that is
    planted, never reaped, and the same for a whole batch.
    """
    leaves, tree = jax.tree.flatten(value)
    operands = [*([] if pred is None else [pred]), *([] if index is None else [index]), *leaves]
    path = (*(_scope.get() if scope is None else scope), name)
    results = sow_p.bind(
        *operands,
        tag=tag,
        path=path,
        mode=mode,
        tree=tree,
        has_pred=pred is not None,
        slots=slots,
        scans=scans,
        fronts=_fronts.get() if mode == "save" else (),
    )
    return jax.tree.unflatten(tree, results)


def nest(f: Callable[..., Any], *, scope: Hashable) -> Callable[..., Any]:
    """Puts everything that `f` sows one level down, under `scope`: it is reaped, and planted, as `{scope: {name:
    ...}}`.

    Args:
        f: any function of JAX arrays.
        scope: the name of the level.

    Returns:
        A function as `f`.
    """

    @functools.wraps(f, updated=())
    def nested(*args: Any, **kwargs: Any) -> Any:
        with _entered(_scope, (*_scope.get(), scope)):
            return f(*args, **kwargs)

    return nested

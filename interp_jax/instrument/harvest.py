"""Harvest: values tagged deep inside a JAX computation, collected outside it.

`sow(value, tag=..., name=...)` marks a value; `call_and_reap(fn, tag=...)(*args)` gives `fn`'s result and every value
sown under the tag, by name. The vocabulary is that of Oryx Harvest. Here it is what carries `running.save` across `jit`
and `checkpoint`.

How a value gets out. At the top level a `Reaper` stands as the current trace. It hands every primitive to the trace
that was current before, so eager values stay concrete; a `sow` it keeps; a call primitive whose jaxpr holds a sow it
replaces by one whose jaxpr returns the sown values too, so that they leave as ordinary outputs and every transformation
outside treats them as such. The call itself stays in the program, with its shardings or its policy.

What bites, and the answer:

* An always-bound sow primitive is not free: its effect slows jit's dispatch and defeats rematerialisation. So `sow`
  binds it only while a reaper of that very tag is listening, and is the plain identity otherwise.
* Without an effect, `grad(jit(...))` and `grad(checkpoint(...))` would drop a sow whose result nobody uses. JAX
  permits, in control flow, rematerialisation and custom derivatives alike, effects of a few types of its own,
  `jax.debug`'s being one. Ours derives from
  it: the one public way to be permitted there.
* `jit`, `checkpoint` and `vmap` are crossed today. A sow in another call primitive (scan, while, cond, custom
  derivatives) is found, and refused by name; it is never dropped in silence.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax.extend import source_info_util
from jax.extend.core import primitives as jex_primitives
from jax.interpreters import ad, batching, mlir

from interp_jax.instrument import trace_context

__all__ = ["ReapError", "call_and_reap", "sow", "sow_p"]


class ReapError(ValueError):
    """A sown value cannot be reaped; the message says which one and why."""


def _debug_effect_type() -> type:
    (effect,) = jax.make_jaxpr(lambda: jax.debug.print(""))().effects
    return type(effect)


class SowEffect(_debug_effect_type()):
    """Keeps a sow in the program although nothing may use its result."""

    __str__ = __repr__ = lambda self: "Sow"


_effect = SowEffect()

sow_p = jex.Primitive("sow")
sow_p.multiple_results = True
sow_p.def_impl(lambda *values, **_: list(values))
sow_p.def_effectful_abstract_eval(lambda *avals, **_: (list(avals), {_effect}))
mlir.register_lowering(sow_p, lambda ctx, *values, **_: values)


def _sow_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    return sow_p.bind(*primals, **params), list(tangents)


def _sow_batch(values: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[list[Any], list[int | None]]:
    """Reaped values carry the batch axis in front, wherever it was. One that does not depend on the batch has none."""
    moved = [
        value if axis is None else jax.numpy.moveaxis(value, axis, 0) for value, axis in zip(values, axes, strict=True)
    ]
    fronts = [None if axis is None else 0 for axis in axes]
    return sow_p.bind(*moved, **params), fronts


ad.primitive_jvps[sow_p] = _sow_jvp
batching.primitive_batchers[sow_p] = _sow_batch

_listening: contextvars.ContextVar[tuple[Hashable, ...]] = contextvars.ContextVar("listening", default=())


def sow(value: Any, *, tag: Hashable, name: Hashable) -> Any:
    """Tags a value, to be collected by `call_and_reap` with the same tag.

    Args:
        value: any pytree of arrays.
        tag: which harvest the value is meant for.
        name: unique among the values of one harvest.

    Returns:
        `value`. Where no harvest of this tag is active it is the very same object and nothing is traced.
    """
    if tag not in _listening.get():
        return value
    return sow_value(value, tag=tag, name=name)


def sow_value(value: Any, *, tag: Hashable, name: Hashable) -> Any:
    """`sow` for a caller who knows that a harvest of this tag is active: the loop's body runs outside its context."""
    leaves, tree = jax.tree.flatten(value)
    return jax.tree.unflatten(tree, sow_p.bind(*leaves, tag=tag, name=name, tree=tree))


@dataclasses.dataclass(frozen=True)
class _Sown:
    """What one sow equation says of its values: name and tree, and how many leaves."""

    name: Hashable
    tree: Any

    @property
    def leaves(self) -> int:
        return self.tree.num_leaves


class _Reaped:
    """Values by name, in the order in which they were sown; a name is sown once."""

    def __init__(self) -> None:
        self.values: dict[_Sown, list[Any]] = {}

    def add(self, sown: _Sown, leaves: Sequence[Any]) -> None:
        if any(sown.name == other.name for other in self.values):
            raise ReapError(
                f"{sown.name!r} was saved or sown more than once in one pass: give each value a name of its own, "
                'for example f"norm/{layer}"'
            )
        self.values[sown] = list(leaves)

    def flat(self) -> tuple[list[_Sown], list[Any]]:
        return list(self.values), [leaf for leaves in self.values.values() for leaf in leaves]

    def add_flat(self, sown: Sequence[_Sown], leaves: Sequence[Any]) -> None:
        remaining = iter(leaves)
        for one in sown:
            self.add(one, [next(remaining) for _ in range(one.leaves)])

    def by_name(self) -> dict[Hashable, Any]:
        return {sown.name: jax.tree.unflatten(sown.tree, leaves) for sown, leaves in self.values.items()}


class Reaper(jax.core.Trace):
    """A trace that hands everything to `parent`, and keeps what is sown under `tag`.

    Values are the parent's own: nothing is boxed, and what is concrete stays concrete.
    """

    def __init__(self, parent: jax.core.Trace, tag: Hashable):
        super().__init__()
        self.parent = parent
        self.tag = tag
        self.reaped = _Reaped()

    def take(self) -> dict[Hashable, Any]:
        """The values by name. They are let go: JAX's caches may keep a trace, and must not keep what it reaped."""
        reaped, self.reaped = self.reaped, _Reaped()
        return reaped.by_name()

    def stage_value(self, val: Any) -> Any:
        return self.parent.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Sequence[Any], params: dict[str, Any], /) -> Any:
        with trace_context.entered(self.parent):
            return _bind(primitive, tracers, params, self.tag, self.reaped)

    def process_call(self, *args: Any, **kwargs: Any) -> Any:
        return self.parent.process_call(*args, **kwargs)

    def process_custom_jvp_call(self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **kwargs: Any) -> Any:
        if self.parent is _eager_trace():
            with trace_context.entered(self):  # runs as plain code: sites inside stand in this trace
                return fun.call_wrapped(*tracers)
        return self.parent.process_custom_jvp_call(primitive, fun, jvp, tracers, **kwargs)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **kwargs: Any
    ) -> Any:
        if self.parent is _eager_trace():
            with trace_context.entered(self):
                return fun.call_wrapped(*tracers)
        return self.parent.process_custom_vjp_call(primitive, fun, fwd, bwd, tracers, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # shard_map and others ask the current trace for a method of their own (process_shard_map, ...).
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.parent, name)


def _eager_trace() -> jax.core.Trace:
    with jax.core.eval_context():
        return trace_context.current_trace()


def _sows(jaxpr: jex.Jaxpr, tag: Hashable) -> bool:
    return any(
        (eqn.primitive is sow_p and eqn.params["tag"] == tag)
        or any(_sows(inner, tag) for inner in jex.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def _bind(
    primitive: Any, args: Sequence[Any], params: dict[str, Any], tag: Hashable, reaped: _Reaped
) -> list[Any] | Any:
    """Binds a primitive in the current trace; what is sown under `tag` inside it is added to `reaped`."""
    if primitive is sow_p and params["tag"] == tag:
        reaped.add(_Sown(params["name"], params["tree"]), args)
        return list(args)
    if not any(_sows(inner, tag) for inner in jex.jaxprs_in_params(params)):
        return primitive.bind(*args, **primitive.get_bind_params(params))
    if primitive not in _rules:
        raise ReapError(
            f"a value was saved inside `{primitive}`, which save does not cross yet: it crosses "
            "jit, checkpoint and vmap. Return the value from that function, or run the pass inside it"
        )
    sown, leaves, outs = _rules[primitive](args, params, tag)
    reaped.add_flat(sown, leaves)
    return outs


def _interpret(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any], tag: Hashable, reaped: _Reaped) -> list:
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        names = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
            outs = _bind(eqn.primitive, [read(atom) for atom in eqn.invars], eqn.params, tag, reaped)
        env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _reaping(jaxpr: jex.Jaxpr, consts: Sequence[Any], tag: Hashable) -> tuple[Callable[..., list[Any]], list[_Sown]]:
    """A function giving the jaxpr's outputs and then the sown leaves, and a list that it fills with what those are."""
    found: list[_Sown] = []

    def function(*args: Any) -> list[Any]:
        reaped = _Reaped()
        outs = _interpret(jaxpr, consts, args, tag, reaped)
        found[:], leaves = reaped.flat()
        return [*outs, *leaves]

    return function, found


_Rule = Callable[[Sequence[Any], dict[str, Any], Hashable], tuple[list[_Sown], list[Any], list[Any]]]


def _reap_jit(args: Sequence[Any], params: dict[str, Any], tag: Hashable) -> tuple[list[_Sown], list[Any], list[Any]]:
    closed = params["jaxpr"]
    function, sown = _reaping(closed.jaxpr, closed.consts, tag)
    reaping = jax.make_jaxpr(function)(*closed.in_avals)
    extra = len(reaping.out_avals) - len(closed.out_avals)
    unspecified, no_layout = _unspecified_sharding()
    outs = jex_primitives.jit_p.bind(
        *args,
        **{
            **params,
            "jaxpr": reaping,
            "out_shardings": (*params["out_shardings"], *[unspecified] * extra),
            "out_layouts": (*params["out_layouts"], *[no_layout] * extra),
        },
    )
    split = len(outs) - extra
    return sown, list(outs[split:]), list(outs[:split])


def _unspecified_sharding() -> tuple[Any, Any]:
    """What jit itself writes for an output that nobody gave a sharding or a layout."""
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x * 2))(jax.ShapeDtypeStruct((), "float32")).eqns
    return eqn.params["out_shardings"][0], eqn.params["out_layouts"][0]


def _reap_checkpoint(
    args: Sequence[Any], params: dict[str, Any], tag: Hashable
) -> tuple[list[_Sown], list[Any], list[Any]]:
    function, sown = _reaping(params["jaxpr"], (), tag)
    outs = jax.checkpoint(function, policy=params["policy"], prevent_cse=params["prevent_cse"])(*args)
    split = len(params["jaxpr"].outvars)
    return sown, list(outs[split:]), list(outs[:split])


_rules: dict[Any, _Rule] = {jex_primitives.jit_p: _reap_jit, jex_primitives.remat_p: _reap_checkpoint}


@contextlib.contextmanager
def reaping(tag: Hashable) -> Iterator[Reaper]:
    """Listens for `tag` in the block: operations there stand in a `Reaper` over the trace that was current."""
    reaper = Reaper(trace_context.current_trace(), tag)
    listening = _listening.set((*_listening.get(), tag))
    try:
        with trace_context.entered(reaper):
            yield reaper
    finally:
        _listening.reset(listening)


def call_and_reap(function: Callable[..., Any], *, tag: Hashable) -> Callable[..., tuple[Any, dict[Hashable, Any]]]:
    """Wraps `function` so that it also returns what is sown in it.

    Args:
        function: any function of JAX arrays.
        tag: the tag to collect.

    Returns:
        A function of the same arguments that gives `(result, {name: value})`.

    Raises:
        ReapError: on the call, if a name is sown twice or inside a primitive that harvest does not cross.
    """

    def harvested(*args: Any, **kwargs: Any) -> tuple[Any, dict[Hashable, Any]]:
        with trace_context.CacheToken() as token, reaping(tag) as reaper:
            token.spoil()  # `function` may hold jitted functions that were traced for another tag, or for none
            try:
                result = function(*args, **kwargs)
            finally:
                token.spoil()
        return result, reaper.take()

    return harvested

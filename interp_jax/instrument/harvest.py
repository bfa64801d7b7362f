"""Harvest: values sown deep inside a JAX computation, collected or replaced from outside it.

The vocabulary is Oryx Harvest's. `sow(value, tag=..., name=...)` marks a value; `reap` collects what is sown under a
tag, `plant` puts values in the place of what is sown, `harvest` does both. All of them work through jit, grad, vmap,
checkpoint, scan, while, cond, custom derivatives and shard_map, and under any of these.

```python
def f(x):
    y = sow(jnp.sin(x), tag="probe", name="y")
    return y**2

call_and_reap(f, tag="probe")(1.0)  # (0.708, {"y": 0.841})
plant(f, tag="probe")({"y": 3.0}, 1.0)  # 9.0
```

How it works. At the top level a `Harvester` stands as the current trace. It hands every primitive to the trace that was
current before, so eager values stay concrete; a sow it deals with itself; an equation with sows inside it binds anew,
so that they come out (`carry.py`). So a harvest inside `grad`, `vmap` or `jit` is an ordinary computation to them.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax.extend import linear_util
from jax.extend.core.primitives import custom_jvp_call_p

from interp_jax.instrument import carry, crossings, trace_context, vmapped_control_flow
from interp_jax.instrument.carry import ReapError
from interp_jax.instrument.sow import (
    Listener,
    is_silent,
    listeners,
    listening,
    mark_edit,
    nest,
    sow,
    sow_cond,
    sow_p,
    sow_value,
)

__all__ = [
    "ReapError",
    "call_and_reap",
    "harvest",
    "is_silent",
    "mark_edit",
    "nest",
    "plant",
    "reap",
    "sow",
    "sow_cond",
    "sow_p",
    "sow_value",
]


carry.rules.update(crossings.RULES)
vmapped_control_flow.install()


class Harvester(jax.core.Trace):
    """A trace that hands everything to `parent`, and keeps or replaces what is sown.

    Values are the parent's own: nothing is boxed, and what is concrete stays concrete.
    """

    def __init__(self, parent: jax.core.Trace, level: carry.Level):
        super().__init__()
        trace_context.pass_for(self, parent)
        self.parent = parent
        self.level: carry.Level | None = level

    def take(self) -> dict[Hashable, Any]:
        """What was reaped, by name. It is let go: JAX's caches may keep a trace, and must not keep values."""
        return {path[-1]: value for (_, path), value in self.take_keyed().items()}

    def take_keyed(self) -> dict[carry.Key, Any]:
        """The same by tag and path, where values of several tags are reaped."""
        level, self.level = self.level, None
        assert level is not None
        return level.values()

    def keeps(self, key: carry.Key, mode: str) -> bool:
        """Whether a value that is sown here stays here."""
        return self.level is not None and self.level.purpose.reaps and self.level.purpose.handles(key, mode)

    def stage_value(self, val: Any) -> Any:
        return self.parent.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Sequence[Any], params: dict[str, Any], /) -> Any:
        if primitive is not sow_p and not carry.holds_any(params):
            return self.parent.process_primitive(primitive, tracers, params)
        with trace_context.entered(self.parent):
            return self._bind(primitive, tracers, params)

    def _bind(self, primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> Any:
        assert self.level is not None
        is_equation = primitive is not sow_p and carry.concerns(self.level, primitive, params)
        if is_equation and self.parent is _eager_trace():
            return _bind_cached(primitive, args, params, self.level)
        return carry.bind(primitive, args, params, self.level)

    def process_custom_jvp_call(self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **params: Any) -> Any:
        return self._process_custom(primitive, fun, (jvp,), tracers, params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self._process_custom(primitive, fun, (fwd, bwd), tracers, params)

    def _process_custom(self, primitive: Any, fun: Any, rules: tuple[Any, ...], args: Any, params: Any) -> Any:
        if self.parent is _eager_trace():
            with trace_context.entered(self):  # runs as plain code: what is sown inside stands in this trace
                return fun.call_wrapped(*args)
        assert self.level is not None
        with trace_context.entered(self.parent):
            eqn, operands, _ = vmapped_control_flow.staged(primitive, args, {"subfuns": (fun, *rules), **params})
            if carry.concerns(self.level, primitive, eqn.params):
                outs = carry.bind(primitive, operands, eqn.params, self.level)
            elif primitive is custom_jvp_call_p:
                outs = self._bind_custom_jvp(operands, eqn.params)
            else:
                bind_params = primitive.get_bind_params(eqn.params)
                code, forward, backward = bind_params["subfuns"]
                bind_params["subfuns"] = (code, self._heard(forward), backward)
                outs = primitive.bind(*operands, **bind_params)
        if _was_called(rules[0]):  # JAX wants to find that one of the two was called
            _reset(fun)
        return outs

    def _bind_custom_jvp(self, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        """Binds the call so that its rule, where the parent runs it here and now, is harvested too."""
        assert self.level is not None
        params = custom_jvp_call_p.get_bind_params(params)
        code, rule = params["subfuns"]
        # What is planted goes through JAX with the operands: the rule wants primal values.
        plants, tree = jax.tree.flatten(dict(self.level.plants))
        plants = [jax.numpy.asarray(value) for value in plants]
        n_args = len(args)  # not the tracers, which a jaxpr that keeps the rule would keep

        def code_alone(*operands: Any) -> list[Any]:
            return code.call_wrapped(*operands[:n_args])

        def rule_alone(*operands: Any) -> list[Any]:
            primals, tangents = operands[: len(operands) // 2], operands[len(operands) // 2 :]
            planted = jax.tree.unflatten(tree, primals[n_args:])
            return self._heard(rule, planted).call_wrapped(*primals[:n_args], *tangents[:n_args])

        params["subfuns"] = (
            linear_util.wrap_init(code_alone, debug_info=code.debug_info),
            linear_util.wrap_init(rule_alone, debug_info=rule.debug_info),
        )
        return custom_jvp_call_p.bind(*args, *plants, **params)

    def _heard(self, rule: Any, plants: Mapping[Hashable, Any] | None = None) -> Any:
        """A derivative rule whose sows this harvest gets, as long as it lasts."""
        harvester = weakref.ref(self)

        def call(*args: Any) -> Any:
            this, trace = harvester(), trace_context.current_trace()
            if this is None or this.level is None:
                return rule.call_wrapped(*args)
            # Concrete values can be kept. Tracers of an inner trace could not.
            kind = carry.Level if trace is _eager_trace() else carry.OutOfReach
            inner = Harvester(trace, kind(this.level.purpose, state=this.level.reaped, plants=plants))
            try:
                with trace_context.entered(inner):
                    return rule.call_wrapped(*args)
            finally:
                assert inner.level is not None
                this.level.met.update(inner.level.met)
                inner.level = None

        return linear_util.wrap_init(call, debug_info=rule.debug_info)

    def process_call(self, primitive: Any, fun: Any, tracers: Sequence[Any], params: dict[str, Any], /) -> Any:
        # JAX makes such calls where it splits a nested scan for a backward pass; they mean what their code means.
        with trace_context.entered(self):
            return fun.call_wrapped(*tracers)

    def process_shard_map(self, primitive: Any, fun: Any, tracers: Any, /, **params: Any) -> Any:
        assert self.level is not None
        with trace_context.entered(self.parent):
            eqn, operands, empty = vmapped_control_flow.staged(primitive, tracers, {"subfuns": (fun,), **params})
            return empty.update(self._bind(primitive, operands, eqn.params))

    def __getattr__(self, name: str) -> Any:
        # Primitives with functions for operands ask the current trace for a method of their own.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.parent, name)


def _eager_trace() -> jax.core.Trace:
    with jax.core.eval_context():
        return trace_context.current_trace()


def _was_called(function: Any) -> bool:
    for store in function.stores:
        try:
            if store is not None:
                _ = store.val
                return True
        except linear_util.StoreException:
            pass
    return False


def _reset(function: Any) -> None:
    for store in function.stores:
        if store is not None:
            store.reset()


# For eager calls: what an equation was made into, by its first jaxpr. The jaxprs in it are then the same from call to
# call, and JAX finds what it compiled.
_bound: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _bind_cached(primitive: Any, args: Sequence[Any], params: dict[str, Any], level: carry.Level) -> Any:
    jaxprs = list(jex.jaxprs_in_params(params))
    crossing = carry.Crossing(level, level.slots(primitive, params))
    operands, tree = jax.tree.flatten((list(args), crossing.state_in(level), crossing.planted_in(level)))
    avals = tuple(map(jax.typeof, operands))
    told = tuple((name, _weakly(params[name])) for name in sorted(params))
    key = (primitive, tree, avals, level.purpose, tuple(crossing.planted), told)
    try:
        found = _bound.setdefault(jaxprs[0], {}).get(key)
    except TypeError:  # a parameter that cannot be hashed
        return carry.bind(primitive, args, params, level)
    if found is None:
        trees: list[Any] = []

        def function(*operands: Any) -> list[Any]:
            results, out_tree = jax.tree.flatten(crossing.bind(primitive, params, *jax.tree.unflatten(tree, operands)))
            trees.append(out_tree)
            return results

        jaxpr = jax.make_jaxpr(function)(*avals)
        found = _bound[jaxprs[0]][key] = (jaxpr, trees[0])
    jaxpr, out_tree = found
    outs, state, once = jax.tree.unflatten(out_tree, jex.jaxpr_as_fun(jaxpr)(*operands))
    crossing.leave(level, state, once)
    return outs


def _weakly(value: Any) -> Any:
    """A parameter as part of a key, which must not keep the jaxprs that it is kept for."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_weakly, value))
    return weakref.ref(value) if hasattr(value, "eqns") else value


@contextlib.contextmanager
def reaping(tag: Hashable) -> Iterator[Harvester]:
    """Operations in the block stand in a `Harvester` over the current trace. It reaps what is sown under `tag`."""
    with _harvesting(carry.Level(carry.Purpose(Listener(tag), reaps=True))) as harvester:
        yield harvester


@contextlib.contextmanager
def reaping_saves() -> Iterator[Harvester]:
    """`reaping` of what is sown in mode `save`, under whatever tag: of all that running passes carry out."""
    with _harvesting(carry.Level(carry.Purpose(None, reaps=True, modes=("save",)))) as harvester:
        yield harvester


@contextlib.contextmanager
def _harvesting(level: carry.Level) -> Iterator[Harvester]:
    harvester = Harvester(trace_context.current_trace(), level)
    try:
        with trace_context.entered(harvester), vmapped_control_flow.harvested():
            yield harvester
    finally:
        harvester.level = None


def _harvest(f: Callable[..., Any], listener: Listener, reaps: bool) -> Callable[..., tuple[Any, dict[Hashable, Any]]]:
    @functools.wraps(f, updated=())
    def harvested(plants: Mapping[Hashable, Any], /, *args: Any, **kwargs: Any) -> tuple[Any, dict[Hashable, Any]]:
        outer, hearing = listeners(), dataclasses.replace(listener, planted=frozenset(_keys(plants, listener)))
        level = carry.Level(carry.Purpose(hearing, reaps, outer), plants=plants)
        with _harvesting(level), listening(hearing):
            out = f(*args, **kwargs)
        if unknown := level.unknown_plants():
            known = ", ".join(carry.in_words(path) for path in level.met) or "nothing"
            raise ReapError(
                f"{', '.join(map(carry.in_words, unknown))} was to be planted, but is not sown under the tag "
                f"{listener.tag!r}; what is sown there: {known}"
            )
        return out, _by_scope({path: value for (_, path), value in level.values().items()})

    return harvested


def _keys(
    plants: Mapping[Hashable, Any], listener: Listener, above: carry.Path = ()
) -> Iterator[tuple[Hashable, carry.Path]]:
    for name, value in plants.items():
        if listener.wants(listener.tag, name):
            yield listener.tag, (*above, name)
        if isinstance(value, Mapping):
            yield from _keys(value, listener, (*above, name))


def _by_scope(values: Mapping[carry.Path, Any]) -> dict[Hashable, Any]:
    tree: dict[Hashable, Any] = {}
    for path, value in values.items():
        scope = tree
        for depth, name in enumerate(path[:-1]):
            if path[: depth + 1] in values:
                raise ReapError(f"{name!r} is both the name of a value and a scope of `nest`: give one another name")
            scope = scope.setdefault(name, {})
        scope[path[-1]] = value
    return tree


def harvest(
    f: Callable[..., Any],
    *,
    tag: Hashable,
    allowlist: Collection[Hashable] | None = None,
    blocklist: Collection[Hashable] = (),
    exclusive: bool = False,
) -> Callable[..., tuple[Any, dict[Hashable, Any]]]:
    """Makes of `f` one that takes values for what is sown in it, and also returns what is sown.

    Args:
        f: any function of JAX arrays.
        tag: which sows it is for. Others pass through, to harvests around it.
        allowlist: the only names that it is for; None for all.
        blocklist: names that it is not for.
        exclusive: whether sows of other tags are dropped in `f`, so that harvests around do not see them.

    Returns:
        A function `(plants, *args, **kwargs) -> (out, reaps)`. `plants` maps names to values (below their scopes, where
        `nest` makes some); a planted value stands in the place of the one that is sown, and is not reaped.

    Raises:
        ReapError: on the call: a name sown twice in strict mode or in control flow that its mode does not allow; a
            planted name that is not sown, or a planted value of another tree, shape or dtype.
    """
    return _harvest(f, Listener.of(tag, allowlist, blocklist, exclusive), reaps=True)


def call_and_reap(
    f: Callable[..., Any],
    *,
    tag: Hashable,
    allowlist: Collection[Hashable] | None = None,
    blocklist: Collection[Hashable] = (),
    exclusive: bool = False,
) -> Callable[..., tuple[Any, dict[Hashable, Any]]]:
    """Makes of `f` one that gives `(out, reaps)`: its result, and by name what is sown in it.

    Arguments and errors are those of `harvest`.
    """
    return _with_plants({}, harvest(f, tag=tag, allowlist=allowlist, blocklist=blocklist, exclusive=exclusive))


def _with_plants(plants: Mapping[Hashable, Any], harvested: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(harvested, updated=())(functools.partial(harvested, plants))


def reap(
    f: Callable[..., Any],
    *,
    tag: Hashable,
    allowlist: Collection[Hashable] | None = None,
    blocklist: Collection[Hashable] = (),
    exclusive: bool = False,
) -> Callable[..., dict[Hashable, Any]]:
    """Makes of `f` one that gives what is sown in it, by name, in the place of its result.

    Arguments and errors are those of `harvest`.
    """
    reaping = call_and_reap(f, tag=tag, allowlist=allowlist, blocklist=blocklist, exclusive=exclusive)

    @functools.wraps(f, updated=())
    def reaped(*args: Any, **kwargs: Any) -> dict[Hashable, Any]:
        return reaping(*args, **kwargs)[1]

    return reaped


def plant(
    f: Callable[..., Any],
    *,
    tag: Hashable,
    allowlist: Collection[Hashable] | None = None,
    blocklist: Collection[Hashable] = (),
    exclusive: bool = False,
) -> Callable[..., Any]:
    """Makes of `f` one that takes values for what is sown in it: `(plants, *args, **kwargs) -> out`.

    Arguments and errors are those of `harvest`. What is not planted goes on to the harvests around.
    """
    planting = _harvest(f, Listener.of(tag, allowlist, blocklist, exclusive), reaps=False)

    @functools.wraps(f, updated=())
    def planted(plants: Mapping[Hashable, Any], /, *args: Any, **kwargs: Any) -> Any:
        return planting(plants, *args, **kwargs)[0]

    return planted

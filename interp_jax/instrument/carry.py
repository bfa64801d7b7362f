"""Carrying sown values through the functions that JAX calls for us: jit, scan, cond and the rest.

A sow inside a jitted function or a scan's body stands in a jaxpr of its own. To get its value out, the equation around
it is bound anew, with a jaxpr that passes the value on. `bind` does that for one primitive; `interpret` for a jaxpr,
equation by equation. One idea carries it: what is sown in the modes that overwrite (clobber, cond_clobber, slot) is
*state*. It goes into every sub-jaxpr and comes out of it: a branch that sows nothing returns it as it was, a scan and a
while loop carry it. What is sown once (strict, append, save) only comes out. What is planted goes in the same way.

```
                    state in   planted in                 `Slot`: what one name holds, known from the jaxpr before
                       |           |                      anything is traced (`sown_in`), so each body is traced once
  args  ------>  [ an equation, bound anew ]  ------> results
                       |           |
                   state out    once out
```

The call itself stays in the program: jit with its shardings and donated arguments, checkpoint with its policy, and so
on.

The rules stand in `crossings.py`, one a primitive.
"""

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import primitives as jex_primitives

from interp_jax.instrument.sow import MODES, Listener, controls, edit_p, is_heard, is_silent, sow_p

__all__ = ["Level", "ReapError", "Slot", "as_varying", "bind", "interpret", "sown_in"]

Path = tuple[Hashable, ...]
Key = tuple[Hashable, Path]  # the tag and the path


class ReapError(ValueError):
    """A sown value cannot be reaped or planted; the message says which one and why."""


def in_words(path: Path) -> str:
    """A path as a user wrote it: the name, below its scopes."""
    return "/".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class _Aval:
    """Shape and dtype, and the manual mesh axes over which the value differs (inside `shard_map`)."""

    shape: tuple[int, ...]
    dtype: Any
    varying: frozenset[Hashable] = frozenset()

    @classmethod
    def of(cls, aval: Any) -> "_Aval":
        return cls(aval.shape, aval.dtype, aval.manual_axis_type.varying)

    def zeros(self) -> jax.Array:
        return as_varying(jax.lax.full(self.shape, 0, self.dtype), self.varying)


def as_varying(value: Any, axes: Iterable[Hashable]) -> Any:
    """The same value, typed as one that may differ over the axes: a carried value must keep its type."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(value).manual_axis_type.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value


@dataclasses.dataclass(frozen=True)
class Slot:
    """What is sown under one name inside an equation, as it is seen outside the equation."""

    mode: str
    tree: Any
    avals: tuple[_Aval, ...]
    pred_shape: tuple[int, ...]
    """The shape of the sow's predicate; () too where it has none."""
    scans: int | None = None
    """How many layer scans stand around the equation, for what is handed out by them alone."""
    fronts: tuple[int, ...] = ()
    """For each leading axis that is a batch's: in front of what so many scans around will stack it belongs."""

    @property
    def is_state(self) -> bool:
        return self.mode in ("clobber", "cond_clobber", "slot", "ask")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [aval.shape for aval in self.avals]

    def stacked(self, *sizes: int) -> "Slot":
        avals = tuple(_Aval((*sizes, *aval.shape), aval.dtype, aval.varying) for aval in self.avals)
        return dataclasses.replace(self, avals=avals)

    def here(self, leaves: Sequence[Any]) -> "Slot":
        """The slot as it is seen inside the equation, where a device of a `shard_map` holds its own part."""
        return dataclasses.replace(self, avals=tuple(_Aval.of(jax.typeof(leaf)) for leaf in leaves))

    def or_other(self, other: "Slot") -> "Slot":
        """The slot where either of the two is sown: it differs from device to device if one of them does."""
        avals = tuple(
            dataclasses.replace(aval, varying=aval.varying | more.varying)
            for aval, more in zip(self.avals, other.avals, strict=False)  # branches that disagree are told elsewhere
        )
        return dataclasses.replace(self, avals=avals) if len(avals) == len(self.avals) else self

    def on_devices(self, sizes: Sequence[int]) -> "Slot":
        """The slot outside a `shard_map`, whose devices have a value each."""
        avals = tuple(_Aval((*sizes, *aval.shape), aval.dtype) for aval in self.avals)
        return dataclasses.replace(self, avals=avals, pred_shape=(*sizes, *self.pred_shape))

    def outside_scan(self, length: int) -> "Slot":
        scans = None if self.scans is None else self.scans - 1
        if self.is_state:
            return dataclasses.replace(self, scans=scans)
        at = self.stack_axis
        avals = tuple(
            dataclasses.replace(aval, shape=(*aval.shape[:at], length, *aval.shape[at:])) for aval in self.avals
        )
        fronts = tuple(count - 1 for count in self.fronts[:at])
        return dataclasses.replace(self, avals=avals, scans=scans, fronts=fronts)

    @property
    def stack_axis(self) -> int:
        """Where a scan around stacks the iterations: in front, but for the axes of vmaps around the scan."""
        return sum(count > 0 for count in self.fronts)

    def zeros(self) -> list[jax.Array]:
        return [aval.zeros() for aval in self.avals]

    def typed(self, leaves: Sequence[Any]) -> list[Any]:
        return [as_varying(leaf, aval.varying) for leaf, aval in zip(leaves, self.avals, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What a jaxpr holds that this module is for, whoever wants it."""

    sown: dict[Key, Slot]
    is_edited: bool
    """Whether a running pass replaced a value in it."""
    edits_custom: bool
    """Whether one was replaced in a function with derivatives of its own."""


# Every jaxpr is looked through once, however often its equation is met.
_known: weakref.WeakKeyDictionary[Any, _Contents] = weakref.WeakKeyDictionary()


def _contents(jaxpr: Any) -> _Contents:
    jaxpr = _open(jaxpr)
    found = _known.get(jaxpr)
    if found is None:
        sown: dict[Key, Slot] = {}
        is_edited = edits_custom = False
        for eqn in jaxpr.eqns:
            if eqn.primitive is sow_p:
                params = eqn.params
                avals = tuple(_Aval.of(var.aval) for var in eqn.outvars)
                pred_shape = eqn.invars[0].aval.shape if params["has_pred"] else ()
                slot = Slot(params["mode"], params["tree"], avals, pred_shape, params["scans"], params["fronts"])
                sown[params["tag"], params["path"]] = slot if params["slots"] is None else slot.stacked(params["slots"])
            elif eqn.primitive is edit_p:
                is_edited = True
            else:
                sown.update(sown_in_equation(eqn.primitive, eqn.params))
                is_edited |= any(_contents(inner).is_edited for inner in jex.jaxprs_in_params(eqn.params))
                edits_custom |= _edits_custom(eqn.primitive, eqn.params)
        found = _known[jaxpr] = _Contents(sown, is_edited, edits_custom)
    return found


def sown_in(jaxpr: Any) -> dict[Key, Slot]:
    """Everything that is sown in a jaxpr, at any depth, in order."""
    return _contents(jaxpr).sown


def _edits_custom(primitive: Any, params: dict[str, Any]) -> bool:
    contents = [_contents(inner) for inner in jex.jaxprs_in_params(params)]
    if primitive in (jex_primitives.custom_jvp_call_p, jex_primitives.custom_vjp_call_p):
        return any(inner.is_edited for inner in contents)
    return any(inner.edits_custom for inner in contents)


def holds_any(params: dict[str, Any]) -> bool:
    """Whether an equation may hold something for a harvest. Asked of every primitive, most of which hold no jaxpr."""
    for inner in jex.jaxprs_in_params(params):
        contents = _contents(inner)
        if contents.sown or contents.is_edited:
            return True
    return False


def concerns(level: "Level", primitive: Any, params: dict[str, Any]) -> bool:
    """Whether an equation cannot be bound as it is."""
    return bool(level.slots(primitive, params)) or _edits_custom(primitive, params)


def sown_in_equation(primitive: Any, params: dict[str, Any]) -> dict[Key, Slot]:
    found: dict[Key, Slot] = {}
    for inner in jex.jaxprs_in_params(params):
        for key, slot in sown_in(inner).items():
            found[key] = found[key].or_other(slot) if key in found else slot
    if not found:
        return found
    if primitive is jex_primitives.scan_p:
        length = params["length"]
        return {key: slot.outside_scan(length) for key, slot in found.items()}
    if primitive.name == "shard_map":
        sizes = [params["mesh"].shape[axis] for axis in manual_axes(params)]
        return {key: slot if slot.mode == "ask" else slot.on_devices(sizes) for key, slot in found.items()}
    return found


def manual_axes(params: dict[str, Any]) -> list[Any]:
    """The axes of the mesh that a `shard_map` splits its operands over."""
    return [axis for axis in params["mesh"].axis_names if axis in params["newly_manual_axes"]]


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _consts(jaxpr: Any) -> Sequence[Any]:
    return getattr(jaxpr, "consts", ())


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What a harvest does with a sow that it meets."""

    listener: Listener | None
    """Which sows it is for; None for all of these `modes`."""
    reaps: bool
    """Whether it keeps them. If not, it only plants, and what it does not plant goes on to the harvests around."""
    outer: tuple[Listener, ...] = ()
    """Who listens around it."""
    notes_writes: bool = False
    """Whether it keeps, beside each value, a boolean that says whether the value was sown at all."""
    modes: tuple[str, ...] = (*MODES, "save")
    """Which modes it is for, where it has no listener."""

    def handles(self, key: Key, mode: str) -> bool:
        tag, path = key
        if self.listener is not None:
            return self.listener.wants(tag, path[-1])
        return mode in self.modes

    def drops(self, key: Key, mode: str) -> bool:
        """Whether a sow that it does not keep ends here."""
        tag, path = key
        if self.handles(key, mode):
            return not is_heard(self.outer, tag, path[-1])
        is_public = mode in MODES
        return is_public and self.listener is not None and self.listener.exclusive and tag != self.listener.tag

    def concerns(self, key: Key, mode: str) -> bool:
        """Whether it must see to a sow."""
        return self.handles(key, mode) or self.drops(key, mode)


def _is_over(mode: str) -> bool:
    """Whether a sow stands in code that runs for its derivative alone: it has had its turn, and ends here.

    What is asked for is still to be planted. Left where it is, the sow would make all results of a vmapped equation
    depend on the batch.
    """
    return is_silent() and mode != "ask"


_WRITTEN = "was it written?"


class Level:
    """What one function (or sub-jaxpr) that is being interpreted has reaped so far, and what is planted in it."""

    def __init__(
        self,
        purpose: Purpose,
        planted: dict[Key, list[Any]] | None = None,
        state: dict[Key, tuple[Slot, list[Any]]] | None = None,
        plants: Mapping[Hashable, Any] | None = None,
    ):
        self.purpose = purpose
        self.planted = planted or {}
        self.reaped = {} if state is None else state
        self.plants = plants or {}
        self.met: dict[Path, None] = {}

    def meet(self, key: Key, slot: Slot) -> None:
        """Notes a name that is sown, and looks up what is to be planted there."""
        path = key[1]
        self.met[path] = None
        value: Any = self.plants
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                return
            value = value[name]
        if key not in self.planted:
            self.planted[key] = _fitting(value, slot, path)

    def unknown_plants(self) -> list[Path]:
        """The paths of values that were to be planted and are not sown."""

        def find(value: Any, path: Path) -> Iterator[Path]:
            if path in self.met:
                return
            if isinstance(value, Mapping):
                for name, inner in value.items():
                    yield from find(inner, (*path, name))
            elif self.purpose.listener is None or self.purpose.listener.wants(self.purpose.listener.tag, path[-1]):
                yield path

        return list(find(self.plants, ()))

    def sow(self, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        """One sow: planted, kept, passed on or dropped."""
        key, mode = (params["tag"], params["path"]), params["mode"]
        leaves = list(operands[controls(params) :])
        pred = operands[0] if params["has_pred"] else None
        if self.purpose.handles(key, mode):
            avals = tuple(_Aval.of(jax.typeof(leaf)) for leaf in leaves)
            slot = Slot(mode, params["tree"], avals, _shape(pred), params["scans"], params["fronts"])
            self.meet(key, slot)
            if key in self.planted:
                planted = self.planted[key]
                return planted if pred is None else [_where(pred, *pair) for pair in zip(planted, leaves, strict=True)]
            if self.purpose.reaps:
                if mode == "slot":
                    self._put(key, slot.stacked(params["slots"]), leaves, operands[controls(params) - 1])
                else:
                    self.write(key, slot, leaves, pred)
                return leaves
        if self.purpose.drops(key, mode) or _is_over(mode):
            return leaves
        return sow_p.bind(*operands, **params)

    def write(self, key: Key, slot: Slot, leaves: list[Any], pred: Any = None) -> None:
        """Keeps a value, in the way of its mode."""
        held, old = self.reaped.get(key, (None, None))
        if held is not None and not ({slot.mode, held.mode} <= {"clobber", "cond_clobber"}):
            if slot.mode == "save":
                raise ReapError(
                    f"{in_words(key[1])!r} was saved more than once in one pass: give each value a name of its own, "
                    'for example f"norm/{layer}"'
                )
            raise ReapError(
                f"Variable has already been reaped: {in_words(key[1])}. Give each value a name of its own, or sow it "
                "with mode='clobber' to keep the last"
            )
        if held is not None and (held.shapes, held.tree) != (slot.shapes, slot.tree):
            raise ReapError(
                f"{in_words(key[1])!r} is sown with two shapes, {held.shapes} and {slot.shapes}: what "
                "overwrites must have the shape of what was there"
            )
        if old is not None:
            leaves = [
                as_varying(leaf, jax.typeof(was).manual_axis_type.varying)
                for leaf, was in zip(leaves, old, strict=True)
            ]
        if pred is not None:
            leaves = [_where(pred, *pair) for pair in zip(leaves, old or slot.zeros(), strict=True)]
        self.reaped[key] = (held or slot, leaves)
        self._note_write(key, slot, pred)

    def _put(self, key: Key, slot: Slot, leaves: list[Any], index: Any) -> None:
        _, old = self.reaped.get(key, (None, None))
        buffers = [
            jax.lax.dynamic_update_index_in_dim(buffer, leaf.astype(buffer.dtype), index, 0)
            for buffer, leaf in zip(old or slot.zeros(), leaves, strict=True)
        ]
        self.reaped[key] = (slot, buffers)

    def _note_write(self, key: Key, slot: Slot, pred: Any) -> None:
        if self.purpose.notes_writes and not _is_note(key) and _is_noted(slot):
            note = _note(slot)
            _, before = self.reaped.get(_note_key(key), (None, note.zeros()))
            now = jnp.ones(note.avals[0].shape, bool) if pred is None else before[0] | pred
            axes = note.avals[0].varying | jax.typeof(before[0]).manual_axis_type.varying
            self.reaped[_note_key(key)] = (note, [as_varying(now, axes)])

    def slots(self, primitive: Any, params: dict[str, Any]) -> dict[Key, Slot]:
        """What this level must see to inside an equation."""
        found = {
            key: slot
            for key, slot in sown_in_equation(primitive, params).items()
            if self.purpose.concerns(key, slot.mode) or _is_over(slot.mode)
        }
        if self.purpose.notes_writes:
            found.update({_note_key(key): _note(slot) for key, slot in found.items() if _is_noted(slot)})
        return found

    def values(self) -> dict[Key, Any]:
        """What was reaped, as it was sown."""
        return {
            key: jax.tree.unflatten(slot.tree, map(_as_array, leaves)) for key, (slot, leaves) in self.reaped.items()
        }

    def sow_again(self) -> None:
        """Sows what was reaped where the caller stands, on the condition that it was sown."""
        for key, (slot, leaves) in self.reaped.items():
            if _is_note(key):
                continue
            written = self.reaped.get(_note_key(key))
            pred = [] if written is None else written[1]
            params = {"tag": key[0], "path": key[1], "mode": slot.mode, "tree": slot.tree, "has_pred": bool(pred)}
            sow_p.bind(*pred, *leaves, **params, slots=None, scans=None, fronts=slot.fronts)


def _fitting(value: Any, slot: Slot, path: Path) -> list[Any]:
    """What is to be planted, as arrays of the tree, shapes and dtypes of what is sown."""
    leaves, tree = jax.tree.flatten(value)
    if tree != slot.tree:
        raise ReapError(f"{in_words(path)!r} is sown as a tree {slot.tree}, but a tree {tree} is planted")
    return [_fitting_leaf(leaf, aval, path) for leaf, aval in zip(leaves, slot.avals, strict=True)]


def _fitting_leaf(leaf: Any, aval: _Aval, path: Path) -> Any:
    shape = jnp.shape(leaf)
    if isinstance(leaf, (bool, int, float)):  # a Python number takes the dtype of what is sown, where that holds it
        if isinstance(leaf, float) and not (leaf.is_integer() or jnp.issubdtype(aval.dtype, jnp.inexact)):
            raise ReapError(f"{in_words(path)!r} is sown with dtype {aval.dtype}, which cannot hold the planted {leaf}")
        leaf = jnp.asarray(leaf, aval.dtype)
    dtype = jnp.result_type(leaf)
    if (shape, dtype) != (aval.shape, aval.dtype):
        raise ReapError(
            f"{in_words(path)!r} is sown with shape {aval.shape} and dtype {aval.dtype}, but shape {shape} and dtype "
            f"{dtype} is planted"
        )
    return as_varying(leaf, aval.varying)


class OutOfReach(Level):
    """The level of code that runs during a harvest, but whose values cannot be kept."""

    def write(self, key: Key, slot: Slot, leaves: list[Any], pred: Any = None) -> None:
        raise ReapError(
            f"{in_words(key[1])!r} is saved or sown in a custom derivative rule, while the harvest is inside grad, jvp "
            "or vjp: put it around them"
        )


def _is_noted(slot: Slot) -> bool:
    """Strict and appended values are sown in every branch or in none."""
    return slot.mode in ("clobber", "cond_clobber", "save")


def _note_key(key: Key) -> Key:
    return (_WRITTEN, key)


def _is_note(key: Key) -> bool:
    return key[0] is _WRITTEN


def _note(slot: Slot) -> Slot:
    aval = _Aval(slot.pred_shape, jnp.dtype(bool), frozenset().union(*(aval.varying for aval in slot.avals)))
    return Slot("clobber", jax.tree.structure(0), (aval,), ())


def _where(pred: Any, new: Any, old: Any) -> Any:
    """`new` where the predicate holds. A scalar takes a `cond`, whose branch that is not taken costs no copy."""
    if not jnp.ndim(pred):
        return jax.lax.cond(pred, lambda: jnp.asarray(new), lambda: jnp.asarray(old, jnp.result_type(new)))
    return jnp.where(jnp.reshape(pred, jnp.shape(pred) + (1,) * (jnp.ndim(new) - jnp.ndim(pred))), new, old)


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _shape(pred: Any) -> tuple[int, ...]:
    return () if pred is None else jnp.shape(pred)


def interpret(jaxpr: Any, args: Sequence[Any], level: Level) -> list[Any]:
    """Runs a jaxpr in the current trace, its sows dealt with by `level`."""
    consts, jaxpr = _consts(jaxpr), _open(jaxpr)
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        names = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
            outs = bind(eqn.primitive, [read(atom) for atom in eqn.invars], eqn.params, level)
        env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(primitive: Any, args: Sequence[Any], params: dict[str, Any], level: Level) -> Any:
    """Binds a primitive in the current trace; what is sown inside it is dealt with by `level`."""
    if primitive is sow_p:
        return level.sow(args, params)
    if not (holds_any(params) and concerns(level, primitive, params)):
        return primitive.bind(*args, **primitive.get_bind_params(params))
    crossing = Crossing(level, level.slots(primitive, params))
    outs, state, once = crossing.bind(
        primitive, params, list(args), crossing.state_in(level), crossing.planted_in(level)
    )
    crossing.leave(level, state, once)
    return outs


Values = list[list[Any]]  # the leaves of several slots


class Crossing:
    """The values that enter and leave one equation beside its own: state, what is planted, what is sown once.

    It holds no value: a custom derivative keeps it for as long as the program that it stands in.
    """

    def __init__(self, level: Level, slots: dict[Key, Slot]):
        self.purpose = level.purpose
        self.slots = slots
        for key, slot in slots.items():
            if level.purpose.handles(key, slot.mode):
                level.meet(key, slot)
        kept = {
            key: slot
            for key, slot in slots.items()
            if level.purpose.reaps and key not in level.planted and level.purpose.concerns(key, slot.mode)
        }
        self.state = {key: slot for key, slot in kept.items() if slot.is_state}
        self.once = {key: slot for key, slot in kept.items() if not slot.is_state}
        self.planted = {key: slot for key, slot in slots.items() if key in level.planted}

    def state_in(self, level: Level) -> Values:
        reaped = level.reaped
        return [list(reaped[key][1]) if key in reaped else slot.zeros() for key, slot in self.state.items()]

    def planted_in(self, level: Level) -> Values:
        return [level.planted[key] for key in self.planted]

    def bind(
        self, primitive: Any, params: dict[str, Any], args: list[Any], state: Values, planted: Values
    ) -> "Results":
        """Binds the equation anew: its results, the state after it, and what it sowed once."""
        rule = rules.get(primitive.name)
        if rule is None and not self.slots:
            return list(primitive.bind(*args, **primitive.get_bind_params(params))), [], []
        if rule is None:
            names = ", ".join(repr(in_words(path)) for _, path in self.slots)
            raise ReapError(
                f"{names} is saved or sown inside `{primitive}`, which cannot pass it on. Return the value from that "
                "function, or run the pass inside it"
            )
        return rule(self, params, args, state, planted)

    def run(self, jaxpr: Any, args: Sequence[Any], state: Values, planted: Values) -> tuple[list[Any], Values, Values]:
        """Interprets a sub-jaxpr: its results, the state after it, and what it sowed once."""
        level = Level(
            self.purpose,
            dict(zip(self.planted, planted, strict=True)),
            {key: (slot.here(leaves), leaves) for (key, slot), leaves in zip(self.state.items(), state, strict=True)},
        )
        outs = interpret(jaxpr, args, level)
        after = [level.reaped[key][1] for key in self.state]
        # A branch of a cond may leave out what another saves.
        once = [
            slot.typed(level.reaped[key][1]) if key in level.reaped else slot.zeros() for key, slot in self.once.items()
        ]
        return outs, after, once

    def leave(self, level: Level, state: Values, once: Values) -> None:
        for (key, slot), leaves in zip(self.state.items(), state, strict=True):
            level.reaped[key] = (slot, list(leaves))
        for (key, slot), leaves in zip(self.once.items(), once, strict=True):
            level.write(key, slot, list(leaves))

    @property
    def keeps_any(self) -> bool:
        return bool(self.state or self.once)

    def names(self, *modes: str) -> list[str]:
        """The names that are sown in one of these modes."""
        return [in_words(path) for (tag, path), slot in self.slots.items() if slot.mode in modes]


Params = dict[str, Any]
Results = tuple[list[Any], Values, Values]
"""The equation's own results, the state after it, what it sowed once."""
Rule = Callable[[Crossing, Params, list[Any], Values, Values], Results]
"""How an equation is bound anew; takes its operands, the state before it, and what is planted in it."""

rules: dict[str, Rule] = {}
"""By the primitive's name; those of `crossings.py`."""

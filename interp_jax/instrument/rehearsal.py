"""The rehearsal of a layer scan: the loop runs over every layer, and what it does is kept as small programs.

A compiled scan has one body for all layers, but the loop has different Python at each. So before the scan is traced,
the loop is run over the sites of all its layers on stand-ins: abstract values of the sites' shapes, one for each site
of each layer, and no operation of the model. What the loop's body computes from them is recorded in one jaxpr, which
is then cut up: the `Fragment` of a site holds the equations that its new value and its saved values depend on, back to
the values of the layer's sites and to values from outside the scan. Thirty-six layers thus cost thirty-six runs of the
loop's body and one run of the model's.

Two fragments are of one class if they compute the same from the same: same equations, literals and parameters, the same
values from outside (by identity; small constants by content). The scan then needs one branch for both.

What bites: a site's fragment may use values of earlier sites of its own layer, and of the iterations around it. A value
of another layer does not exist when the scan's body runs; that is an error which names both sites.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import greenlet
import jax
import jax.extend.core as jex
import numpy as np
from jax.extend import source_info_util
from jax.interpreters import mlir

from interp_jax.instrument import carry, harvest, running_pass
from interp_jax.instrument.sow import SowEffect

__all__ = ["Body", "Fragment", "Occurrence", "Point", "Rehearsal", "Save", "rehearse"]


@dataclasses.dataclass(eq=False)
class Point:
    """A site in the body of a layer scan."""

    name: str
    avals: Any
    """The value's tree of abstract values."""
    is_nested: bool
    """Whether it stands in a function inside the body, under `jit` or `checkpoint`, say."""


@dataclasses.dataclass(eq=False)
class Body:
    """The body of a layer scan: what stands in it, in order."""

    length: int
    first_layer: int
    is_reversed: bool
    is_nested: bool
    """Whether the scan stands in a function inside the body of the scan around it."""
    items: "list[Point | Body]" = dataclasses.field(default_factory=list)

    def iterations(self) -> range:
        """The iterations, in the order in which they run."""
        return range(self.length - 1, -1, -1) if self.is_reversed else range(self.length)

    def occurrences(self, index: int, path: tuple[int, ...]) -> "Iterator[Occurrence]":
        """The sites that one iteration reaches, in order; `index` counts the iterations over the scans around."""
        for item in self.items:
            if isinstance(item, Point):
                yield Occurrence(item, index, self.first_layer + index, path)
            else:
                for inner in item.iterations():
                    yield from item.occurrences(index * item.length + inner, (*path, inner))


@dataclasses.dataclass(frozen=True)
class Occurrence:
    """A point in one iteration."""

    point: Point
    index: int
    """The iteration of the scan whose body the point stands in, counted over the scans around it."""
    layer: int
    path: tuple[int, ...]
    """The iteration of every scan around the point, outermost first."""

    def __str__(self) -> str:
        return running_pass.in_words(self.layer, self.point.name)

    def exists_at(self, other: "Occurrence") -> bool:
        """Whether this site's value is there when `other`'s body runs."""
        return other.path[: len(self.path)] == self.path


@dataclasses.dataclass(frozen=True)
class Save:
    """One value that the loop saves at a site, for its own pass or for one around it."""

    key: carry.Key
    """The pass's tag, and what the value is called there."""
    tree: Any
    avals: tuple[jax.ShapeDtypeStruct, ...]


@dataclasses.dataclass(frozen=True)
class Fragment:
    """What the loop does at one site of one layer."""

    consts: tuple[tuple[Any, Any], ...]
    """Variables of values from outside the scan, with the values."""
    needs: tuple[tuple[Any, Point, int], ...]
    """Variables of the layer's site values, with the point and the number of the leaf."""
    eqns: tuple[Any, ...]
    modified: tuple[Any, ...] | None
    """The leaves of the new value; None if the loop leaves the value alone."""
    saves: tuple[Save, ...]
    saved: tuple[tuple[Any, ...], ...]
    """The leaves of each save."""
    kind: Hashable
    """Equal for fragments that compute the same."""

    @property
    def has_effects(self) -> bool:
        """Whether something happens here that is no value: a print, say."""
        return any(eqn.effects for eqn in self.eqns)

    def run(self, values: Mapping[Point, Sequence[Any]]) -> tuple[list[Any] | None, list[list[Any]]]:
        """Computes the new value's leaves (or None), and the leaves of each save, in the current trace."""
        env = {**dict(self.consts), **{var: values[point][leaf] for var, point, leaf in self.needs}}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for eqn in self.eqns:
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
                outs = eqn.primitive.bind(
                    *[read(atom) for atom in eqn.invars], **eqn.primitive.get_bind_params(eqn.params)
                )
            env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))
        modified = None if self.modified is None else [read(atom) for atom in self.modified]
        return modified, [[read(atom) for atom in leaves] for leaves in self.saved]


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What the loop does in all layers."""

    fragments: dict[Point, dict[int, Fragment]]
    """By point and the iteration's index; a site that the loop leaves alone has none."""
    saves: tuple[tuple[Occurrence, int], ...]
    """In the loop's order: where a value is saved, and which of that fragment's saves it is."""
    effects: tuple[Occurrence, ...]
    left: bool
    """Whether the loop was left before the last layer's end."""


_mark_p = jex.Primitive("rehearsed")
_mark_p.multiple_results = True
_mark_p.def_effectful_abstract_eval(lambda: ([], {SowEffect()}))
mlir.register_lowering(_mark_p, lambda ctx: [])


@dataclasses.dataclass(frozen=True)
class _Record:
    """What the recording says of one site: how its outputs are to be read."""

    is_modified: bool
    saves: tuple[Save, ...]


def rehearse(wanted: Sequence[tuple[Occurrence, running_pass.PassState]]) -> Rehearsal:
    """Runs the loops over these sites, on abstract values.

    Args:
        wanted: the sites in order, each with the pass that it is shown to.

    Returns:
        What the loops did there. If a loop was left, what they did before.

    Raises:
        SiteError: if a loop uses a value of one layer in another.
    """
    records: list[_Record] = []
    left = False

    def record(stand_ins: list[Any]) -> list[Any]:
        nonlocal left
        outputs: list[Any] = []
        new: list[Any] = []
        for (occurrence, state), leaves in zip(wanted, stand_ins, strict=True):
            value = jax.tree.unflatten(jax.tree.structure(occurrence.point.avals), leaves)
            with harvest.reaping_saves() as reaper, state.rehearsed(len(occurrence.path)):
                try:
                    new = jax.tree.leaves(state.visit(value, occurrence.point.name, occurrence.layer))
                except greenlet.GreenletExit:
                    left = True
                saved_here = reaper.take_keyed()
            is_modified = not left and any(one is not other for one, other in zip(new, leaves, strict=True))
            if is_modified:
                outputs.extend(new)
            saves = []
            for key, saved in saved_here.items():
                saved_leaves, tree = jax.tree.flatten(saved)
                avals = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in map(jax.typeof, saved_leaves))
                saves.append(Save(key, tree, avals))
                outputs.extend(saved_leaves)
            records.append(_Record(is_modified, tuple(saves)))
            _mark_p.bind()
            if left:
                break
        return outputs

    closed = jax.make_jaxpr(record)([jax.tree.leaves(occurrence.point.avals) for occurrence, _ in wanted])
    return _cut(closed, wanted, records, left)


def _cut(
    closed: Any, wanted: Sequence[tuple[Occurrence, running_pass.PassState]], records: Sequence[_Record], left: bool
) -> Rehearsal:
    jaxpr = closed.jaxpr
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    invars = iter(jaxpr.invars)
    inputs = {
        next(invars): (occurrence, leaf)
        for occurrence, _ in wanted
        for leaf in range(len(jax.tree.leaves(occurrence.point.avals)))
    }
    producer = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    ends = [number for number, eqn in enumerate(jaxpr.eqns) if eqn.primitive is _mark_p]
    outvars = iter(jaxpr.outvars)
    fragments: dict[Point, dict[int, Fragment]] = {}
    saves: list[tuple[Occurrence, int]] = []
    effects: list[Occurrence] = []
    begin = 0
    for (occurrence, _), record, end in zip(wanted, records, ends, strict=False):
        modified = None
        if record.is_modified:
            modified = tuple(next(outvars) for _ in jax.tree.leaves(occurrence.point.avals))
        saved = tuple(tuple(next(outvars) for _ in save.avals) for save in record.saves)
        roots = [*(modified or ()), *itertools.chain.from_iterable(saved)]
        numbers = [number for number in range(begin, end) if jaxpr.eqns[number].effects]
        begin = end + 1
        if not record.is_modified and not saved and not numbers:
            continue
        eqns, leaves = _needed(jaxpr.eqns, producer, roots, numbers)
        needs = []
        for var in leaves:
            if var in inputs:
                source, leaf = inputs[var]
                _check_exists(source, occurrence, var, eqns)
                needs.append((var, source.point, leaf))
        fragment = Fragment(
            consts=tuple((var, consts[var]) for var in leaves if var in consts),
            needs=tuple(needs),
            eqns=eqns,
            modified=modified,
            saves=record.saves,
            saved=saved,
            kind=_kind(eqns, modified, record.saves, saved, inputs, consts),
        )
        fragments.setdefault(occurrence.point, {})[occurrence.index] = fragment
        saves.extend((occurrence, number) for number in range(len(saved)))
        if fragment.has_effects:
            effects.append(occurrence)
    return Rehearsal(fragments, tuple(saves), tuple(effects), left)


def _needed(
    eqns: Sequence[Any], producer: dict[Any, int], roots: Sequence[Any], numbers: Sequence[int]
) -> tuple[tuple[Any, ...], list[Any]]:
    """The equations that these atoms and these equations depend on, and the variables that nothing produces."""
    needed = set(numbers)
    leaves: dict[Any, None] = {}
    atoms = [*roots, *(atom for number in numbers for atom in eqns[number].invars)]
    while atoms:
        atom = atoms.pop()
        if isinstance(atom, jex.Literal):
            continue
        number = producer.get(atom)
        if number is None:
            leaves[atom] = None
        elif number not in needed:
            needed.add(number)
            atoms.extend(eqns[number].invars)
    return tuple(eqns[number] for number in sorted(needed)), list(leaves)


def _check_exists(source: Occurrence, occurrence: Occurrence, var: Any, eqns: Sequence[Any]) -> None:
    if source.exists_at(occurrence):
        return
    used = next((eqn for eqn in eqns if any(atom is var for atom in eqn.invars)), None)
    where = "" if used is None else f" ({source_info_util.summarize(used.source_info)})"
    raise running_pass.SiteError(
        f"the loop uses the value of {source} at {occurrence}{where}. In a compiled layer_scan the layers share one "
        "body, so a value cannot be kept in a variable from one layer to another: save it with running.save in one "
        "pass and use it in another, or run the pass outside jit and grad"
    )


def _kind(
    eqns: Sequence[Any],
    modified: Sequence[Any] | None,
    saves: Sequence[Save],
    saved: Sequence[Sequence[Any]],
    inputs: dict[Any, tuple[Occurrence, int]],
    consts: dict[Any, Any],
) -> Hashable:
    def of_free(var: Any) -> Hashable:
        if var in inputs:
            source, leaf = inputs[var]
            return "site", source.point, leaf
        return "const", _of_value(consts[var])

    atoms, body = _of_eqns(eqns, of_free)
    return (
        body,
        None if modified is None else tuple(map(atoms, modified)),
        tuple(tuple(map(atoms, leaves)) for leaves in saved),
        tuple((save.key[0], save.tree, tuple((aval.shape, aval.dtype) for aval in save.avals)) for save in saves),
    )


def _of_eqns(eqns: Sequence[Any], of_free: Callable[[Any], Hashable]) -> tuple[Callable[[Any], Hashable], Hashable]:
    """Equations as a value that is equal for equal ones, and what turns an atom into such a value."""
    produced: dict[Any, Hashable] = {}

    def of_atom(atom: Any) -> Hashable:
        if isinstance(atom, jex.Literal):
            return "literal", str(atom.aval), _of_value(np.asarray(atom.val))
        return produced[atom] if atom in produced else of_free(atom)

    body = []
    for number, eqn in enumerate(eqns):
        body.append((eqn.primitive, tuple(map(of_atom, eqn.invars)), _of_param(eqn.params), str(eqn.ctx)))
        produced.update((var, ("eqn", number, place)) for place, var in enumerate(eqn.outvars))
    return of_atom, tuple(body)


def _of_param(param: Any) -> Hashable:
    """A parameter as a value that is equal for equal ones; where that is not known, for the very same only."""
    if isinstance(param, (jex.Jaxpr, jex.ClosedJaxpr)):
        jaxpr = getattr(param, "jaxpr", param)
        inputs = {var: number for number, var in enumerate([*jaxpr.constvars, *jaxpr.invars])}
        of_atom, body = _of_eqns(jaxpr.eqns, lambda var: ("input", inputs[var], str(var.aval)))
        consts = tuple(map(_of_value, getattr(param, "consts", None) or ()))
        return "jaxpr", len(inputs), tuple(map(of_atom, jaxpr.outvars)), body, consts
    if isinstance(param, dict):
        return "dict", tuple((key, _of_param(value)) for key, value in param.items())
    if isinstance(param, (tuple, list)):
        return type(param), tuple(map(_of_param, param))
    if isinstance(param, float):
        return "float", repr(param)  # -0.0 equals 0.0
    if isinstance(param, np.ndarray):
        return _of_value(param)
    try:
        hash(param)
    except TypeError:
        return "object", id(param)
    return type(param), param


def _of_value(value: Any) -> Hashable:
    """A constant: a small array in NumPy's hands counts by content, whatever else by identity."""
    if isinstance(value, np.generic | np.ndarray) and value.nbytes <= 1024 and value.dtype != object:
        return "array", value.shape, str(value.dtype), value.tobytes()
    return "object", id(value)

"""A scan over stacked layers in which the loop sees every layer.

`layer_scan(body, init, xs)` is `jax.lax.scan` for a model whose layers are stacked. Under a running pass each `site` in
the body is shown once for every layer, with the layer as a static int, in the order in which the model runs. With no
pass around it, or where the pass wants nothing of it, it is `jax.lax.scan` itself.

Eagerly (no transformation between the pass and the scan) it runs as a Python loop, so that the values are concrete.
Compiled, it stays one scan, and the model's body is traced twice whatever the number of layers:

1. *Discovery*: the scan is traced abstractly. Its sites are only noted.
2. *Rehearsal* (`rehearsal.py`): the loop runs over the sites of all layers on abstract values. What it does at each
   is recorded as a small program.
3. *Assembly*: the scan is traced with the layer's index. At a site where all layers do the same, that is done in
   line; else there is one `switch` through a table from the layer to its branch, in which all layers that do the same
   share a branch. A site that the loop leaves alone costs nothing.

What is saved by some layers goes into one buffer for each site and shape, with a row for each of them, which the scan
carries and the branch writes in place; what all layers save alike is stacked. Where the site stands in a function
inside the body (under jit, in a scan) the value leaves that function first, as all that is saved does, and goes there
then.

A loop's body may save for a pass around its own, or place sites that a pass around it sees: whatever is saved while it
runs, for whichever pass, is part of what the loop does at that site, and is handed out where the scan stands.

What bites:

* The dispatch stands under `jax.checkpoint`: a differentiated `switch` keeps, for every layer, the residuals of every
  branch.
* After `break` at a layer the scan runs up to the last layer where something was saved. Layers are picked out of the
  stack by index: slices of stacked weights would be copies.
* `xs` that are closed over by the indexing body are residuals of its gradient, a copy for every layer, unless the
  picking is done again in the backward pass. A policy sees to that.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import greenlet
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as jex_primitives

from interp_jax.instrument import harvest, running_pass, trace_context
from interp_jax.instrument.gradients import GradientPass, Place
from interp_jax.instrument.rehearsal import Body, Fragment, Occurrence, Point, Rehearsal, Save, rehearse
from interp_jax.instrument.running_pass import PassState, SiteError
from interp_jax.instrument.sow import sow_value

__all__ = ["in_layer", "layer_scan"]

Carry = TypeVar("Carry")


def layer_scan(
    body: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    first_layer: int = 0,
) -> tuple[Carry, Any]:
    """`jax.lax.scan` over stacked layers, whose sites a running pass sees once for every layer.

    A `site` in `body` takes no `layer=`: it is the iteration, a static int. In a layer_scan inside the body of another
    the iterations are counted through: `outer * length + inner`.

    Args:
        body: as in `jax.lax.scan`: `(carry, x) -> (carry, y)`.
        init: as in `jax.lax.scan`.
        xs: as in `jax.lax.scan`; the stacked parameters of the layers, say.
        length: as in `jax.lax.scan`.
        reverse: as in `jax.lax.scan`; the layer is the place in `xs`, so the last comes first.
        unroll: as in `jax.lax.scan`.
        _split_transpose: as in `jax.lax.scan`.
        first_layer: the number of the first layer, where other layers stand before the scan.

    Returns:
        `(carry, ys)`, as `jax.lax.scan`.

    Raises:
        SiteError: under a running pass, if the loop uses a value of one layer in another while the scan is compiled, or
            a site in the body is given a layer.
    """
    call = _Call(body, init, xs, length, reverse, unroll, _split_transpose, first_layer)
    state = running_pass.innermost_pass()
    if state is None or harvest.is_silent():
        return call.scan(body)
    surrounding = running_pass.surroundings.get()
    if surrounding is None or (surrounding.state is not state and isinstance(surrounding, _Eager)):
        return _outermost(call, state, 0)
    if surrounding.state is not state:
        raise SiteError(
            "a running pass was started in the body of a compiled layer_scan that another pass goes over, and it meets "
            "a layer_scan of its own: run the inner pass outside that scan, or the outer one outside jit and grad"
        )
    assert isinstance(surrounding, _Eager | _Silent | _Discovery | _Assembly)
    return surrounding.scan(call)


@contextlib.contextmanager
def in_layer(number: int) -> Iterator[None]:
    """Gives the sites in the block a layer: for a Python loop over layers whose code may as well be scanned.

    ```python
    for number, block in enumerate(blocks):
        with in_layer(number):
            x = block(x)  # its sites take no layer=, as in the body of a layer_scan
    ```

    A `layer_scan` in the block counts on: `number * length + inner`. Inside the body of a layer_scan, or inside another
    `in_layer`, the outer one tells the layer and this one does nothing.

    Args:
        number: the layer.
    """
    state = running_pass.innermost_pass()
    surrounding = running_pass.surroundings.get()
    if state is None or (surrounding is not None and surrounding.state is state):
        yield
        return
    with _surrounded_by(_Eager(state, running_pass.layer_number(number, "the number of in_layer"), 0)):
        yield


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of `layer_scan`."""

    body: Callable[[Any, Any], tuple[Any, Any]]
    init: Any
    xs: Any
    given_length: int | None
    reverse: bool
    unroll: int | bool
    split_transpose: bool
    first_layer: int

    @property
    def length(self) -> int:
        leaves = jax.tree.leaves(self.xs)
        if self.given_length is not None or not leaves:
            return self.given_length or 0
        return jnp.shape(leaves[0])[0]

    def scan(self, body: Callable[[Any, Any], tuple[Any, Any]], *given: Any) -> tuple[Any, Any]:
        """The plain scan with another body, and perhaps with other `init` and `xs`."""
        init, xs = given or (self.init, self.xs)
        return jax.lax.scan(
            body, init, xs, self.given_length, self.reverse, self.unroll, _split_transpose=self.split_transpose
        )

    def scan_numbered(self, body: Callable[[Any, Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The plain scan with a body that is given the iteration's number, too."""
        numbers = jnp.arange(self.length, dtype=jnp.int32)
        return self.scan(lambda carry, x: body(carry, x[1], x[0]), self.init, (numbers, self.xs))

    def scan_part(
        self,
        body: Callable[[Any, Any, Any], tuple[Any, Any]],
        init: Any,
        part: range,
        policies: Sequence[Callable[..., Any] | None],
    ) -> tuple[Any, Any]:
        """`scan_numbered` over some of the iterations, which picks the layers out of the whole stack.

        `policies` are those of the body's own checkpoints: a policy around a checkpoint overrules the one inside.
        """

        given = [policy or jax.checkpoint_policies.nothing_saveable for policy in policies]
        stacks = {jnp.shape(leaf) for leaf in jax.tree.leaves(self.xs)}

        def keeps(primitive: Any, *avals: Any, **params: Any) -> bool:
            """What is kept for the backward pass: all but the picked layer, which would be a copy of the weights."""
            shape = avals[0].shape if avals else ()
            is_slice = primitive.name == "dynamic_slice" and shape in stacks and params["slice_sizes"][0] == 1
            is_layer = primitive.name == "squeeze" and any(shape == (1, *stack[1:]) for stack in stacks)
            return not (is_slice or is_layer) and all(policy(primitive, *avals, **params) for policy in given)

        @functools.partial(jax.checkpoint, prevent_cse=False, policy=keeps)
        def picking(carry: Any, number: Any) -> tuple[Any, Any]:
            x = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), self.xs)
            return body(carry, x, number)

        numbers = jnp.arange(min(part), max(part) + 1, dtype=jnp.int32)
        return jax.lax.scan(
            picking, init, numbers, None, self.reverse, self.unroll, _split_transpose=self.split_transpose
        )


@contextlib.contextmanager
def _surrounded_by(surrounding: running_pass.Surroundings) -> Iterator[None]:
    reset = running_pass.surroundings.set(surrounding)
    try:
        yield
    finally:
        running_pass.surroundings.reset(reset)


def _outermost(call: _Call, state: PassState, offset: int) -> tuple[Any, Any]:
    """A scan that stands in no other, or in one that runs as a Python loop, `offset` iterations in."""
    is_eager = _is_eager()
    has_filters = all(one.sites is not None or one.layers is not None for one in state.chain())
    if is_eager and not has_filters:
        return _run_eagerly(call, state, offset)
    program = Body(call.length, call.first_layer, call.reverse, False)
    traced = jax.make_jaxpr(lambda init, xs: call.scan(_noting(call, state, program), init, xs))(call.init, call.xs)
    wanted = list(_wanted(program, state, offset))
    if not wanted:
        return call.scan(_in(call, _Silent(state)))
    if is_eager:
        return _run_eagerly(call, state, offset)
    return _run_compiled(call, state, program, wanted, offset, list(_policies(traced.jaxpr)))


def _policies(jaxpr: Any) -> Iterator[Callable[..., Any] | None]:
    """The policies of the checkpoints in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is jex_primitives.remat_p:
            yield eqn.params["policy"]
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _policies(inner)


def _is_eager() -> bool:
    """Whether values are concrete here: nothing but harvests stands between this place and JAX's eager evaluation."""
    trace = trace_context.current_trace()
    while isinstance(trace, harvest.Harvester):
        trace = trace.parent
    with jax.core.eval_context():
        return trace is trace_context.current_trace()


def _wanted(program: Body, state: PassState, offset: int) -> Iterator[tuple[Occurrence, PassState]]:
    """The sites that a pass wants, in order, with the innermost pass that does."""
    states = list(state.chain())
    for iteration in program.iterations():
        for occurrence in program.occurrences(offset + iteration, (iteration,)):
            which = (occurrence.layer, occurrence.point.name)
            for one in states:
                one.seen[which] = None
            wanting = next((one for one in states if one.wants(*which)), None)
            if wanting is not None:
                yield occurrence, wanting


def _in(call: _Call, surrounding: running_pass.Surroundings) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The call's body, run in these surroundings."""

    def run(carry: Any, x: Any) -> tuple[Any, Any]:
        with _surrounded_by(surrounding):
            return call.body(carry, x)

    return run


def _refuse_layer(name: str, layer: int | None) -> None:
    if layer is not None:
        raise SiteError(
            f"site {name!r} in the body of a layer_scan was given layer={layer}: the scan knows the layer, so leave it "
            "out (first_layer= of layer_scan says with which number it begins; in_layer knows it, too)"
        )


@dataclasses.dataclass(frozen=True)
class _Silent:
    """The body of a scan of which no pass wants anything."""

    state: PassState

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        return value

    def scan(self, call: _Call) -> tuple[Any, Any]:
        return call.scan(call.body)


# As a Python loop


@dataclasses.dataclass(frozen=True)
class _Eager:
    """One iteration of a scan that runs as a Python loop, or of a loop over layers that is one."""

    state: PassState
    index: int
    first_layer: int

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        _refuse_layer(name, layer)
        return running_pass.show(self.state.chain(), value, name, self.first_layer + self.index)

    def scan(self, call: _Call) -> tuple[Any, Any]:
        return _outermost(call, self.state, self.index * call.length)


def _run_eagerly(call: _Call, state: PassState, offset: int) -> tuple[Any, Any]:
    if not call.length:
        return call.scan(_in(call, _Silent(state)))
    carry, xs = jax.tree.map(jnp.asarray, (call.init, call.xs))
    ys: dict[int, Any] = {}
    for number in Body(call.length, 0, call.reverse, False).iterations():
        x = jax.tree.map(lambda leaf, number=number: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), xs)
        before = _types(carry)
        carry, ys[number] = _in(call, _Eager(state, offset + number, call.first_layer))(carry, x)
        if _types(carry) != before:
            # Raises what JAX has to say of a carry that changes its type, if it does not mend it.
            jax.eval_shape(lambda init, xs: call.scan(_in(call, _Silent(state)), init, xs), call.init, call.xs)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(ys[number] for number in range(call.length)))


def _types(tree: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """What a carry must keep. Not as a tree: a library's containers may refuse such leaves, or compare oddly."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


# Discovery


@dataclasses.dataclass(frozen=True)
class _Discovery:
    """A body that is traced for the sites that stand in it."""

    state: PassState
    program: Body
    top: jax.core.Trace

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        _refuse_layer(name, layer)
        is_nested = trace_context.current_trace() is not self.top
        self.program.items.append(Point(name, jax.tree.map(jax.typeof, value), is_nested))
        return value

    def scan(self, call: _Call) -> tuple[Any, Any]:
        is_nested = trace_context.current_trace() is not self.top
        inner = Body(call.length, call.first_layer, call.reverse, is_nested)
        self.program.items.append(inner)
        return call.scan(_noting(call, self.state, inner))


def _noting(call: _Call, state: PassState, program: Body) -> Callable[[Any, Any], tuple[Any, Any]]:
    def noting(carry: Any, x: Any) -> tuple[Any, Any]:
        program.items.clear()  # a scan traces its body again where the carry's type has to be promoted
        return _in(call, _Discovery(state, program, trace_context.current_trace()))(carry, x)

    return noting


# Assembly


def _run_compiled(
    call: _Call,
    state: PassState,
    program: Body,
    wanted: Sequence[tuple[Occurrence, PassState]],
    offset: int,
    policies: Sequence[Callable[..., Any] | None],
) -> tuple[Any, Any]:
    taps = [(occurrence, one) for occurrence, one in wanted if isinstance(one, GradientPass)]
    for occurrence, one in taps:
        one.expect(occurrence.layer, occurrence.point.name)
    rehearsal = rehearse([(occurrence, one) for occurrence, one in wanted if not isinstance(one, GradientPass)])
    iterations = program.iterations()
    if rehearsal.left:
        iterations = iterations[: _iterations_needed(program, rehearsal)]
        if not iterations or not _leaves_from_here(rehearsal):
            raise greenlet.GreenletExit
    first_tapped = min((iterations.index(one.path[0]) for one, _ in taps if one.path[0] in iterations), default=0)
    carry, ys = call.init, []
    for part in (iterations[:first_tapped], iterations[first_tapped:]):
        if not part:
            continue
        plan = _Plan(rehearsal, taps, program, part, offset)

        def body(carry: Any, x: Any, number: Any, plan: _Plan = plan) -> tuple[Any, Any]:
            return _assemble(call, _Assembly(state, plan, program, offset + number, {}), carry, x)

        with plan.collecting() as collected:
            carry, y = (
                call.scan_numbered(body) if len(part) == call.length else call.scan_part(body, carry, part, policies)
            )
        ys.append(y)
        plan.hand_out(collected)
    if rehearsal.left:
        raise greenlet.GreenletExit
    if len(ys) == 1:
        return carry, ys[0]
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(reversed(ys) if call.reverse else ys))


def _iterations_needed(program: Body, rehearsal: Rehearsal) -> int:
    """How many iterations must run for what was saved, or printed, before the loop was left."""
    numbers = {number: place for place, number in enumerate(program.iterations())}
    happened = [*(occurrence for occurrence, _ in rehearsal.saves), *rehearsal.effects]
    return max((numbers[occurrence.path[0]] + 1 for occurrence in happened), default=0)


def _leaves_from_here(rehearsal: Rehearsal) -> bool:
    """Whether what is saved here outlives a pass that is being left: a function around the scan would not return it."""
    tops = []
    trace = trace_context.current_trace()
    while isinstance(trace, harvest.Harvester):
        tops.append(trace)
        trace = trace.parent
    keys = [rehearsal.fragments[one.point][one.index].saves[place].key for one, place in rehearsal.saves]
    return not keys or any(top.keeps(key, "save") for key in keys for top in tops)


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """Where a site's saved values go: rows of a buffer, or the iterations of the scan, stacked. It is its own name."""

    point: Point
    place: int
    tree: Any
    avals: tuple[tuple[Any, Any], ...]

    def __str__(self) -> str:
        return f"site {self.point.name!r}"


class _Plan:
    """What the body of one scan does at each of its points."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        taps: Sequence[tuple[Occurrence, GradientPass]],
        program: Body,
        part: range,
        offset: int,
    ):
        self.tag = object()
        self.inner_tag = object()
        """Under it, what is saved in a function inside a body leaves that function."""
        self.depths: dict[Point, int] = {}
        """How many layer scans stand around each point."""
        self.indices: dict[Point, list[int]] = {}
        for number in part:
            for occurrence in program.occurrences(offset + number, (number,)):
                self.indices.setdefault(occurrence.point, []).append(occurrence.index)
                self.depths[occurrence.point] = len(occurrence.path)
        self.fragments: dict[Point, dict[int, Fragment]] = {}
        for point, indices in self.indices.items():
            there = rehearsal.fragments.get(point, {})
            self.fragments[point] = {index: there[index] for index in indices if index in there}
        self.taps: dict[Point, dict[GradientPass, dict[int, int]]] = {}
        """For each pass, the row of each index that is tapped."""
        self.tapped_layers: dict[Point, dict[GradientPass, dict[int | None, int]]] = {}
        for occurrence, state in taps:
            if occurrence.path[0] in part:
                rows = self.taps.setdefault(occurrence.point, {}).setdefault(state, {})
                rows[occurrence.index] = len(rows)
                layers = self.tapped_layers.setdefault(occurrence.point, {}).setdefault(state, {})
                layers[occurrence.layer] = rows[occurrence.index]
        self.last_use: dict[Point, Point] = {}
        """Where the value of a site is needed at a later one: the last such."""
        for point, fragments in self.fragments.items():
            needed = {other for fragment in fragments.values() for _, other, _ in fragment.needs}
            self.last_use.update(dict.fromkeys(needed - {point}, point))
        self.saves: list[tuple[Save, _Buffer, int]] = []
        self.rows: dict[_Buffer, dict[int, int]] = {}
        for occurrence, place in rehearsal.saves:
            if occurrence.index not in self.fragments.get(occurrence.point, {}):
                continue
            save = self.fragments[occurrence.point][occurrence.index].saves[place]
            buffer = self.buffer(occurrence.point, place, save)
            rows = self.rows.setdefault(buffer, {})
            rows[occurrence.index] = len(rows)
            self.saves.append((save, buffer, occurrence.index))
        for buffer, rows in self.rows.items():
            if self.is_uniform(buffer.point):
                rows.update({index: row for row, index in enumerate(sorted(rows))})

    def buffer(self, point: Point, place: int, save: Save) -> _Buffer:
        return _Buffer(point, place, save.tree, tuple((aval.shape, aval.dtype) for aval in save.avals))

    def is_uniform(self, point: Point) -> bool:
        """Whether all layers do the same there."""
        fragments = self.fragments[point]
        return len(fragments) == len(self.indices[point]) and len({one.kind for one in fragments.values()}) == 1

    def asks_for_index(self, program: Body) -> bool:
        """Whether a function inside this body needs the index."""
        return any(
            item.is_nested
            and (isinstance(item, Body) or item in self.taps or (self.fragments[item] and not self.is_uniform(item)))
            for item in program.items
        )

    def apply(
        self, point: Point, index: Callable[[], Any], value: Any, values: Callable[[Point], Sequence[Any]]
    ) -> Any:
        """What the loop does at a point, as operations of the current trace; gives the value to carry on with."""
        fragments = self.fragments[point]
        if not fragments:
            return value
        leaves, tree = jax.tree.flatten(value)
        needed = {other: values(other) if other is not point else leaves for other in self._needed(fragments)}
        if self.is_uniform(point):
            modified = self._run(next(iter(fragments.values())), point, needed, None)
        else:
            modified = self._switch(fragments, point, index(), leaves, needed)
        if modified is None:
            return value
        harvest.mark_edit()
        return jax.tree.unflatten(tree, modified)

    def tap(self, point: Point, index: Callable[[], Any], value: Any) -> Any:
        """Taps a point for every pass that wants its gradient."""
        for state, rows in self.taps.get(point, {}).items():
            layers = self.tapped_layers[point][state]
            row = _looked_up(rows, self.indices[point], index(), -1)
            is_whole = len(rows) == len(self.indices[point])
            place = Place(self.tag, point.name, self.depths[point])
            value = state.visit_rows(value, layers, row, place, is_whole=is_whole)
        return value

    @staticmethod
    def _needed(fragments: dict[int, Fragment]) -> dict[Point, None]:
        return {point: None for fragment in fragments.values() for _, point, _ in fragment.needs}

    def _run(
        self, fragment: Fragment, point: Point, needed: dict[Point, Sequence[Any]], rows: dict[_Buffer, Any] | None
    ) -> list[Any] | None:
        modified, saved = fragment.run(needed)
        for place, (save, leaves) in enumerate(zip(fragment.saves, saved, strict=True)):
            arrays = [jnp.asarray(leaf, aval.dtype) for leaf, aval in zip(leaves, save.avals, strict=True)]
            buffer, value = self.buffer(point, place, save), jax.tree.unflatten(save.tree, arrays)
            if point.is_nested:
                sow_value(value, tag=self.inner_tag, name=buffer, mode="save", scope=())
            else:
                self._keep(buffer, value, None if rows is None else rows[buffer])
        if modified is None:
            return None
        avals = jax.tree.leaves(point.avals)
        return [jnp.asarray(leaf, aval.dtype) for leaf, aval in zip(modified, avals, strict=True)]

    def _keep(self, buffer: _Buffer, value: Any, row: Any) -> None:
        """Puts a saved value into a row of its buffer, or on a stack of all iterations' values."""
        mode: dict[str, Any] = (
            {"mode": "stack"} if row is None else {"mode": "slot", "index": row, "slots": len(self.rows[buffer])}
        )
        sow_value(value, tag=self.tag, name=buffer, scope=(), scans=self.depths[buffer.point], **mode)

    @contextlib.contextmanager
    def keeping(self, index: Any) -> Iterator[None]:
        """Runs a body in the block, and keeps what is saved in the functions inside it."""
        if not any(buffer.point.is_nested for buffer in self.rows):
            yield
            return
        with harvest.reaping(self.inner_tag) as reaper:
            yield
            values: dict[Any, Any] = reaper.take()
        for buffer, value in values.items():
            if self.is_uniform(buffer.point):
                self._keep(buffer, value, None)
            else:
                row = _looked_up(self.rows[buffer], self.indices[buffer.point], index, -1)
                keep = functools.partial(self._keep, buffer)
                jax.lax.cond(row >= 0, keep, lambda value, row: None, value, row)

    def _switch(
        self,
        fragments: dict[int, Fragment],
        point: Point,
        index: Any,
        leaves: Sequence[Any],
        needed: dict[Point, Sequence[Any]],
    ) -> Sequence[Any] | None:
        classes: dict[Hashable, tuple[int, Fragment]] = {}
        numbers = {
            one: classes.setdefault(fragment.kind, (len(classes) + 1, fragment))[0]
            for one, fragment in fragments.items()
        }
        modifies = any(fragment.modified is not None for _, fragment in classes.values())
        buffers = [] if point.is_nested else [buffer for buffer in self.rows if buffer.point is point]

        def branch(fragment: Fragment | None) -> Callable[..., Any]:
            def run(rows: Sequence[Any], leaves: Sequence[Any], operands: Sequence[Any]) -> Any:
                modified = None
                if fragment is not None:
                    given = dict(zip(needed, operands, strict=True))
                    modified = self._run(fragment, point, given, dict(zip(buffers, rows, strict=True)))
                return (modified or list(leaves)) if modifies else ()

            return run

        branches = [branch(None), *(branch(fragment) for _, fragment in classes.values())]
        which = _looked_up(numbers, self.indices[point], index, 0)
        row_numbers = [_looked_up(self.rows[buffer], self.indices[point], index, 0) for buffer in buffers]
        dispatch = jax.checkpoint(
            lambda which, *operands: jax.lax.switch(which, branches, *operands), prevent_cse=False
        )
        new = dispatch(which, row_numbers, list(leaves) if modifies else [], list(needed.values()))
        return new if modifies else None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[dict[Any, Any]]:
        """Gives a dict that has the buffers after the block."""
        collected: dict[Any, Any] = {}
        if not self.saves:
            yield collected
            return
        with harvest.reaping(self.tag) as reaper:
            yield collected
            collected.update(reaper.take())

    def hand_out(self, collected: dict[Any, Any]) -> None:
        """Saves, in the names that the loops gave, what the buffers hold."""
        rows_of: dict[_Buffer, list[Any]] = {}
        for save, buffer, index in self.saves:
            if buffer not in rows_of:
                rows_of[buffer] = self._unstacked(collected[buffer], buffer)
            tag, (*scope, name) = save.key
            sow_value(rows_of[buffer][self.rows[buffer][index]], tag=tag, name=name, scope=tuple(scope))

    def _unstacked(self, stacked: Any, buffer: _Buffer) -> list[Any]:
        count = len(self.rows[buffer])
        axes = self.depths[buffer.point] if self.is_uniform(buffer.point) else 1
        leaves = [
            # The iterations of nested scans are axes of their own.
            [part[0] for part in jax.lax.split(leaf.reshape(count, *leaf.shape[axes:]), [1] * count)]
            for leaf in jax.tree.leaves(stacked)
        ]
        return [jax.tree.unflatten(buffer.tree, [rows[row] for rows in leaves]) for row in range(count)]


def _looked_up(numbers: dict[int, int], indices: Sequence[int], index: Any, default: int) -> Any:
    """The number of a traced index, in the current trace."""
    table = np.full(max(indices) + 1, default, np.int32)
    for one, number in numbers.items():
        table[one] = number
    return jax.lax.dynamic_index_in_dim(jnp.asarray(table), index, keepdims=False)


class _Assembly:
    """A body as the compiled scan will run it."""

    def __init__(self, state: PassState, plan: _Plan, program: Body, index: Any, values: dict[Point, Any]):
        self.state = state
        self.plan = plan
        self.program = program
        self.items = iter(program.items)
        self.index = index
        self.top: jax.core.Trace | None = None
        # Of the sites before, for those after, with the trace they stand in; also of the iterations around this one.
        self.values = values

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        point = next(self.items, None)
        if not isinstance(point, Point) or point.name != name:
            raise _changed(f"site {name!r}", point)
        new = self.plan.apply(point, self.index_here, value, lambda other: self._value(other, name))
        last_use = self.plan.last_use
        self.values = {other: kept for other, kept in self.values.items() if last_use[other] is not point}
        if point in last_use:
            self.values[point] = (trace_context.current_trace(), jax.tree.leaves(value))
        return self.plan.tap(point, self.index_here, new)

    def _value(self, point: Point, name: str) -> list[Any]:
        """The value of an earlier site, for the site of this name."""
        trace, leaves = self.values[point]
        if not _stands_in(trace_context.current_trace(), trace):
            raise SiteError(
                f"at site {name!r} the loop uses the value of site {point.name!r}, which stands in another function "
                "(under jit or checkpoint) that has returned: change the value at the earlier site, or save it"
            )
        return leaves

    def index_here(self) -> Any:
        """The index as a value of the current trace.

        A function inside the body must not close over the body's: JAX's caches would keep it with the function.
        """
        if trace_context.current_trace() is self.top:
            return self.index
        return sow_value(jnp.zeros((), jnp.int32), tag=_INDEX, name=_INDEX, mode="ask", scope=())

    def scan(self, call: _Call) -> tuple[Any, Any]:
        program = next(self.items, None)
        if not isinstance(program, Body) or program.length != call.length:
            raise _changed("a layer_scan", program)
        around = self.index_here()

        def body(carry: Any, x: Any, number: Any) -> tuple[Any, Any]:
            index = around * call.length + number
            return _assemble(call, _Assembly(self.state, self.plan, program, index, dict(self.values)), carry, x)

        return call.scan_numbered(body)


def _stands_in(here: Any, trace: Any) -> bool:
    """Whether a trace is this one, or around it."""
    while here is not None:
        if here is trace:
            return True
        here = getattr(here, "parent", None) or getattr(here, "parent_trace", None)
    return False


def _assemble(call: _Call, assembly: _Assembly, carry: Any, x: Any) -> tuple[Any, Any]:
    """Runs a body as the compiled scan will; functions inside it get the iteration's index where they ask for it."""

    def run(carry: Any, x: Any) -> tuple[Any, Any]:
        assembly.top = trace_context.current_trace()
        return _in(call, assembly)(carry, x)

    # Planted inside what is reaped: the derivative of a reaped value is to be that of the code with its index.
    with assembly.plan.keeping(assembly.index):
        if not assembly.plan.asks_for_index(assembly.program):
            return run(carry, x)
        return harvest.plant(run, tag=_INDEX)({_INDEX: assembly.index}, carry, x)


_INDEX = "the index of a layer_scan's iteration"


def _changed(found: str, expected: Point | Body | None) -> SiteError:
    before = f"site {expected.name!r}" if isinstance(expected, Point) else "a layer_scan" if expected else "no more"
    return SiteError(
        f"the body of a layer_scan was traced twice and reached {found} where it had reached {before} the first time: "
        "which sites it has must not depend on anything but its arguments' shapes"
    )

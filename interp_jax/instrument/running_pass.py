"""The running pass: one forward pass, iterated over in an ordinary `for` loop.

`site(value, name, layer=...)` in model code names a point; `iterate(fn)(*args)` gives a `RunningPass`, and the loop
over it runs `fn` from site to site. The loop's body runs where the site stands: its JAX operations are traced there,
between the model's own.

```python
for layer, name, value in (running := iterate(model)(tokens)):
    if name == "mlp_out" and layer == 6:
        running.modified_value = value.at[:, 17].set(0.0)
    if name == "resid_post":
        running.save(f"norm/{layer}", jnp.linalg.norm(value, axis=-1))
running.retval, running.saved
```

Who holds what. `fn` runs in the body of a `GreenletGenerator` that the `for` statement alone holds, so `break` unwinds
it at once. What body and user share is a `PassState`, which refers to neither. It keeps no value while the model runs
on, only shapes and types: a value of an inner trace that outlived it would be a leak.

What bites:

* While the loop is suspended (a body that was left by `next` by hand, say), the thread's current trace is the model's.
  Hold the iterator in the `for` alone.
* A loop value belongs to the trace in which its site stands. To carry one out of a jitted or checkpointed function use
  `running.save`; a Python variable does not.
"""

import contextlib
import contextvars
import difflib
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.core
import numpy as np

from interp_jax import greenlets
from interp_jax.instrument import carry, harvest, loop_value, trace_context
from interp_jax.instrument.sow import silence

__all__ = ["Activation", "RunningPass", "SiteError", "iterate", "site"]


class SiteError(ValueError):
    """A site was asked for, or given a value, in a way that does not fit the model."""


class Activation(NamedTuple):
    """One step of the loop."""

    layer: int | None
    """The layer that the site stands in, None outside the layers."""
    name: str
    """The site's name, for example `resid_post`."""
    value: Any
    """The activation, with its own shape and dtype; a pytree of arrays where the model says so."""


class _Unset:
    def __repr__(self) -> str:
        return "<not assigned>"


_UNSET = _Unset()


class PassState:
    """What the forward pass and its loop share. Refers to neither the generator nor a value that is in flight."""

    def __init__(self, sites: frozenset[str] | None, layers: frozenset[int | None] | None):
        self.sites = sites
        self.layers = layers
        self.outer: PassState | None = None
        self.yield_: Callable[[Activation], None] | None = None
        self.token = trace_context.CacheToken()
        self.tag = object()  # JAX's caches keep a sow's tag: it must not lead to what was saved
        self.top: jax.core.Trace | None = None
        self.is_nested = False  # the pass itself stands in a nested trace of the pass around it
        self.scans = 0  # layer scans in whose bodies the code that runs will stand, though it is only rehearsed yet
        self.values = loop_value.LoopValues()
        self.seen: dict[tuple[int | None, str], None] = {}
        self.at: str | None = None  # the site that waits, in words
        self.expected: Any = None  # its value's tree of jax.ShapeDtypeStruct
        self.modified: Any = _UNSET
        self.phase = "new"  # new, running, stopped, finished
        self.retval: Any = None
        self.saved: dict[Any, Any] = {}
        self.save_names: dict[Any, None] = {}

    def spoil_token(self) -> None:
        """Notes for JAX's caches that a site stands here."""
        trace = trace_context.staging_trace(self.top) or (self.top if self.is_nested else None)
        if trace is not None:
            self.token.spoil(trace)

    def wants(self, layer: int | None, name: str) -> bool:
        return (self.sites is None or name in self.sites) and (self.layers is None or layer in self.layers)

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        """Shows a site to the loop, and gives the value to carry on with."""
        self.at = in_words(layer, name)
        self.expected = jax.tree.map(_shape_and_type, value)
        self.modified = _UNSET
        assert self.yield_ is not None
        try:
            with self.values.shown(value, self.at, self.top) as shown:
                self.yield_(Activation(layer, name, shown))
            if self.modified is _UNSET:
                return value
            if trace_context.current_trace() is not self.top:
                harvest.mark_edit()
            return jax.tree.map(_typed_as, value, loop_value.unboxed(self.modified))
        finally:
            self.at, self.expected, self.modified = None, None, _UNSET

    def save(self, name: Any, value: Any) -> None:
        """Carries a value of the current trace out of the pass."""
        harvest.sow_value(value, tag=self.tag, name=name, mode="save")
        self.save_names[name] = None

    @contextlib.contextmanager
    def rehearsed(self, scans: int) -> Iterator[None]:
        """In the block, what the loop of this pass does is kept for a body that so many layer scans stand around."""
        around = list(self.chain())[1:]
        for state in around:
            state.scans += scans
        try:
            yield
        finally:
            for state in around:
                state.scans -= scans

    def chain(self) -> Iterator["PassState"]:
        state: PassState | None = self
        while state is not None:
            yield state
            state = state.outer


_innermost: contextvars.ContextVar[PassState | None] = contextvars.ContextVar("innermost running pass", default=None)


def site(value: Any, name: str, *, layer: int | None = None) -> Any:
    """Marks a point of a forward pass where a value can be read or replaced.

    Args:
        value: an array, or a pytree of arrays.
        name: what the value is; DESIGN's names (`resid_post`, `mlp_out`, ...) where one fits.
        layer: the layer's index, None outside the layers.

    Returns:
        The value to carry on with: `value` itself, or what the loop's body put in its place. With nothing
        listening it is `value` and nothing is traced.

    Raises:
        SiteError: under a running pass, if the layer is no number that is known while the model is traced.
    """
    innermost = _innermost.get()
    if innermost is None:
        return value
    if layer is not None and type(layer) is not int:
        layer = layer_number(layer, f"the layer of site {name!r}")
    innermost.spoil_token()
    if harvest.is_silent():
        return value
    surrounding = surroundings.get()
    if surrounding is None:
        return show(innermost.chain(), value, name, layer)
    # A pass that was started in the body of a layer scan sees its own sites first; the others belong to the scan.
    inner = list(itertools.takewhile(lambda state: state is not surrounding.state, innermost.chain()))
    if any(state.wants(layer, name) for state in inner):
        return show(inner, value, name, layer)
    return surrounding.visit(value, name, layer)


def show(states: Iterable[PassState], value: Any, name: str, layer: int | None) -> Any:
    """Shows a site to the first of the passes that wants it, and gives the value to carry on with."""
    states = list(states)
    for state in states:
        state.seen[layer, name] = None
    for state in states:
        if state.wants(layer, name):
            return state.visit(value, name, layer)
    return value


class Surroundings(Protocol):
    """What runs the model's code piece by piece and answers for the sites in it: the body of a layer scan."""

    @property
    def state(self) -> PassState:
        """The innermost pass whose sites these are."""
        ...

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        """What a site does here."""
        ...


surroundings: contextvars.ContextVar[Surroundings | None] = contextvars.ContextVar("surroundings", default=None)


def may_be_shown(*names: str) -> bool:
    """Whether a pass may want a site of one of these names, in some layer: for code that computes them only if so.

    Where not, the code may still mark them, with anything for a value: then they are among the sites that exist.

    Args:
        names: of sites.
    """
    innermost = _innermost.get()
    if innermost is None:
        return False
    innermost.spoil_token()
    return any(state.sites is None or not state.sites.isdisjoint(names) for state in innermost.chain())


def innermost_pass() -> PassState | None:
    """The pass that the code here runs under."""
    return _innermost.get()


def unheard(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of a function one whose sites no pass sees: for code that traces a model for its shapes, say."""

    @functools.wraps(fn, updated=())
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with silence():
            return fn(*args, **kwargs)

    return quiet


def in_words(layer: int | None, name: str) -> str:
    return f"site {name!r}" if layer is None else f"site {name!r} of layer {layer}"


def _shape_and_type(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _typed_as(value: Any, new: Any) -> Any:
    """A new value as it must be inside `shard_map`: where `value` may differ from device to device, so may it."""
    return carry.as_varying(new, jax.typeof(value).manual_axis_type.varying)


class Loop:
    """What the body of a loop is given to assign `modified_value` to, and nothing else: a typing error is told."""

    __slots__ = ("__weakref__",)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(
                f"there is no {name!r} to assign to. Assign to modified_value to replace the activation; to carry a "
                "value out of the pass, .save(name, value)."
            )
        super().__setattr__(name, value)


class RunningPass(Loop):
    """One forward pass, to be looped over once; made by `iterate`."""

    __slots__ = ("_run", "_state")

    def __init__(self, state: PassState, run: Callable[[], Any]):
        self._state = state
        self._run: Callable[[], Any] | None = run

    def __iter__(self) -> Iterator[Activation]:
        """Starts the pass. The loop must be the only holder of what this returns, so that `break` ends the pass."""
        run, self._run = self._run, None
        if run is None:
            raise RuntimeError("a running pass is looped over once: call ij.iterate(fn)(*args) again for another pass")
        state = self._state
        generator = greenlets.GreenletGenerator(_body, state, run)
        state.yield_ = generator.yielder()
        return generator

    @property
    def modified_value(self) -> Any:
        """What was assigned at this site. Assign to it to replace the activation; leave it alone to keep it."""
        if self._state.modified is _UNSET:
            raise AttributeError("modified_value was not assigned at this site; the value itself is what the loop gave")
        return self._state.modified

    @modified_value.setter
    def modified_value(self, new: Any) -> None:
        state = self._state
        if state.at is None:
            raise RuntimeError("modified_value is assigned inside the loop over the running pass, where a site waits")
        state.modified = _checked(new, state.expected, state.at)

    def save(self, name: Any, value: Any) -> None:
        """Carries a value out of the pass, to `saved[name]` after the loop.

        Args:
            name: a name of its own for each value, for example `f"norm/{layer}"`.
            value: an array or a pytree of arrays. It may come from inside `jit`, `checkpoint` or `vmap`; in the last
                case the batch axis comes first.

        Raises:
            interp_jax.instrument.ReapError: from the loop, if a name is saved twice or from inside a primitive that
                save does not cross.
        """
        if self._state.phase != "running":
            raise RuntimeError("save is called inside the loop over the running pass")
        self._state.save(name, value)

    @property
    def retval(self) -> Any:
        """What the function returned. It is there once the loop has run to its end."""
        if self._state.phase != "finished":
            what = {
                "new": "the pass has not been looped over yet",
                "running": "the pass is still running",
                "stopped": "the loop was left before the end, so the function has not returned",
            }[self._state.phase]
            raise RuntimeError(f"retval is not there: {what}")
        return self._state.retval

    @property
    def saved(self) -> dict[Any, Any]:
        """What was saved, by name, in order; after `break`, what had left the functions around its site."""
        if self._state.phase in ("new", "running"):
            raise RuntimeError("saved is there after the loop over the running pass")
        return self._state.saved


def _checked(new: Any, expected: Any, where: str) -> Any:
    """`new` as arrays, if it has the tree, shapes and dtypes of `expected`."""
    if new is None and expected is not None:
        raise SiteError(f"{where}: None was assigned to modified_value; to leave the value alone, do not assign")
    new_tree, expected_tree = jax.tree.structure(new), jax.tree.structure(expected)
    if new_tree != expected_tree:
        raise SiteError(f"{where}: modified_value must be a tree {expected_tree}, but a tree {new_tree} was assigned")

    def check(path: Any, wanted: jax.ShapeDtypeStruct, leaf: Any) -> Any:
        array = leaf if isinstance(leaf, jax.Array) else _as_array(leaf)
        if array is None:
            raise SiteError(
                f"{where}{_path(path)}: modified_value must be an array, but {type(leaf).__name__} was assigned"
            )
        got = _shape_and_type(array)
        if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            raise SiteError(
                f"{where}{_path(path)}: modified_value must have shape {wanted.shape} and dtype {wanted.dtype}, "
                f"but shape {got.shape} and dtype {got.dtype} was assigned{_remedy(got, wanted)}"
            )
        return array

    return jax.tree.map_with_path(check, expected, new)


def _as_array(leaf: Any) -> jax.Array | None:
    try:
        return jax.numpy.asarray(leaf)
    except TypeError:
        return None


def _path(path: Any) -> str:
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def _remedy(got: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> str:
    if got.shape == wanted.shape:
        return f"; use .astype({str(wanted.dtype)!r})"
    return "; use jnp.broadcast_to if one value is meant for all" if got.size <= 1 else ""


@contextlib.contextmanager
def standing(state: PassState) -> Iterator[None]:
    """Makes `state` the innermost pass in the block, and the trace that is current here the pass's own."""
    state.outer = outer = _innermost.get()
    state.is_nested = outer is not None and (outer.is_nested or trace_context.staging_trace(outer.top) is not None)
    reset = _innermost.set(state)
    try:
        with state.token:
            state.top = trace_context.current_trace()
            yield
    finally:
        state.top = None
        _innermost.reset(reset)


def _body(state: PassState, run: Callable[[], Any]) -> None:
    """The forward pass, run in the generator's greenlet with its own context variables."""
    state.phase = "running"
    try:
        with standing(state), harvest.reaping(state.tag) as reaper:
            state.top = reaper
            try:
                retval = run()
            finally:
                # Also on the way out of an error or a break: what was sown at the top level is whole.
                state.saved = reaper.take()
        lost = [name for name in state.save_names if name not in state.saved]
        if lost:
            raise harvest.ReapError(
                f"{', '.join(map(repr, lost))} was saved in a function whose values cannot leave it, as one does not "
                "that is evaluated for its shapes or compiled ahead of time. Run the pass inside that function, or "
                "save at a site outside it"
            )
        check_filters(state)
        state.retval = retval
        state.phase = "finished"
    finally:
        if state.phase != "finished":
            state.phase = "stopped"


def check_filters(state: PassState) -> None:
    """Raises if a name or layer that was asked for never occurred: a typo would else look like 'nothing there'."""
    if state.sites is None and state.layers is None:
        return
    names = {name for _, name in state.seen}
    layers = {layer for layer, _ in state.seen}
    complaints = []
    if state.sites is not None and (unknown := sorted(state.sites - names)):
        close = [match for name in unknown for match in difflib.get_close_matches(name, sorted(names), n=1)]
        hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
        complaints.append(f"no site is named {', '.join(map(repr, unknown))}{hint}")
    if state.layers is not None and (missing := state.layers - layers):
        complaints.append(
            f"no site stands in layer {', '.join(str(layer) for layer in sorted(missing, key=_layer_order))}"
        )
    if not complaints and not any(state.wants(*which) for which in state.seen):
        complaints.append("no site has one of these names in one of these layers")
    if complaints:
        raise SiteError(f"{'; '.join(complaints)}. {describe_sites(state.seen)}")


def describe_sites(seen: Iterable[tuple[int | None, str]]) -> str:
    """The sites that exist, a line a group: layers that have the same sites stand together."""
    by_layer: dict[int | None, list[str]] = {}
    for layer, name in seen:
        by_layer.setdefault(layer, []).append(name)
    if not by_layer:
        return (
            "This function has no sites: mark values with ij.site, or install a patch set before the model is imported"
        )
    groups: dict[tuple[str, ...], list[int | None]] = {}
    for layer in sorted(by_layer, key=_layer_order):
        groups.setdefault(tuple(by_layer[layer]), []).append(layer)
    lines = [f"  {_layers_in_words(layers)}: {', '.join(names)}" for names, layers in groups.items()]
    return "\n".join(["The sites that exist:", *lines])


def layer_number(layer: Any, what: str) -> int:
    """A layer as a plain int, which a NumPy integer may stand for."""
    # An array of JAX's may be traced, so none will do: a model must not work outside jit alone.
    if not isinstance(layer, jax.Array):
        with contextlib.suppress(TypeError):
            return operator.index(layer)
    raise SiteError(
        f"{what} must be a Python or NumPy integer, but {type(layer).__name__} was given. In a loop that JAX traces "
        "once for all layers the number is not known: use ij.layer_scan, whose sites take no layer, or a Python loop"
    )


def _layer_order(layer: int | None) -> tuple[bool, int]:
    return (layer is not None, layer or 0)


def _layers_in_words(layers: list[int | None]) -> str:
    if layers == [None]:
        return "no layer"
    numbers = [str(layer) for layer in layers]
    is_run = (
        len(layers) > 2 and None not in layers and layers == list(range(layers[0] or 0, (layers[0] or 0) + len(layers)))
    )
    return f"layers {numbers[0]} to {numbers[-1]}" if is_run else f"layer {', '.join(numbers)}"


def as_filter(wanted: Any, kind: type | tuple[type, ...]) -> frozenset[Any] | None:
    """A filter argument (None, one, or several) as a set; None lets everything through."""
    if wanted is None:
        return None
    several: Collection[Any] = [wanted] if isinstance(wanted, (kind, np.integer)) else list(wanted)
    if not several:
        raise SiteError("an empty filter matches nothing: give at least one site or layer, or None for all")
    return frozenset(int(one) if isinstance(one, np.integer) else one for one in several)


def iterate(
    fn: Callable[..., Any],
    *,
    sites: str | Collection[str] | None = None,
    layers: int | Collection[int | None] | None = None,
) -> Callable[..., RunningPass]:
    """Makes of a function one whose call is looped over, from site to site.

    Args:
        fn: a forward pass, or any function that reaches `site`.
        sites: the names that the loop sees; None for all. The others run on without a stop.
        layers: the layers that the loop sees; None for all.

    Returns:
        A function of `fn`'s arguments that gives a `RunningPass`. Nothing runs before the loop asks.

    Raises:
        SiteError: from the loop's end, if a name or a layer in the filters does not occur in the pass; it lists those
            that do.
    """
    site_filter, layer_filter = as_filter(sites, str), as_filter(layers, int)

    # `fn` may be a module, which has no __name__ to copy.
    @functools.wraps(fn, updated=())
    def start(*args: Any, **kwargs: Any) -> RunningPass:
        return RunningPass(PassState(site_filter, layer_filter), lambda: fn(*args, **kwargs))

    with contextlib.suppress(AttributeError):
        del start.__wrapped__  # the signatures differ in what they return
    return start

"""Every Flax module's output as a site, with no `site` in the model's code and no patch.

```python
for layer, name, value in (running := ij.iterate(ij.module_sites(model))(x)):             # NNX: called like the model
for layer, name, value in (running := ij.iterate(ij.module_sites(model))(variables, x)):  # linen: like model.apply
```

What a site is called. The path of the module, its parts joined by dots; its first number is the layer and leaves the
name: `blocks.3.mlp` (NNX), `blocks/3/mlp` and `blocks_3/mlp` (linen) are all `(3, "blocks.mlp")`. The root, which has
no path, has its class's name. A module that is called again in the same pass has the number of the call behind its
name: `mlp#2`. So every `(layer, name)` occurs once, and `fetch` and `inject` work.

How. While the function runs, linen's own interceptors see every `__call__`; NNX has none, so the classes of the modules
that the function is given have a hook in place of their `__call__`, and the modules themselves are untouched. The hook
asks a context variable whether a call is part of such a function: the body of the loop, other threads and other models
of the same class pass by. The classes are put back when the last function that needs the hook is done, by whatever way.

What bites:

* Only `__call__` counts, and only outputs that are trees of arrays: `embed.attend(x)` is no site, nor is a module that
  returns None or an object.
* `nnx.jit`, `nnx.remat`, `jax.checkpoint` and the like rebuild the NNX modules that they are given. A rebuilt module is
  recognised if, below the module whose call is running, only one has its structure: the model itself, or a stack of
  layers under a scan. Where several have (one layer of a list, given to `nnx.remat`) its name is that of its class,
  `Block`, `Block#2`, in the order of the calls: never that of another layer.
* A function traced outside such a function is not met in its cache inside it, and the other way round: whether modules
  are sites is part of JAX's cache keys.
"""

import collections
import contextlib
import contextvars
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from interp_jax.instrument import running_pass

__all__ = ["module_sites"]

Path = tuple[str, ...]

_cache_key = jax.make_user_context(None)


def module_sites(model: Any) -> Callable[..., Any]:
    """Makes of a Flax model a function in which every module's output is a site.

    Args:
        model: an NNX module, a linen module, or a function that calls some (linen modules wherever they come from; NNX
            modules among its arguments, or the one whose method it is). Put transformations around what is returned
            rather than inside: `jax.jit(module_sites(model))`.

    Returns:
        A function called as the model is: an NNX module's takes what `model(...)` takes, a linen module's what
        `model.apply(variables, ...)` takes. With nothing listening it computes just what the model does.
    """
    from flax import linen, nnx  # here, since those who mark their own sites need not wait for Flax to load

    is_unbound = isinstance(model, linen.Module) and model.scope is None
    function = model.apply if is_unbound else model

    def with_sites(*args: Any, **kwargs: Any) -> Any:
        given = jax.tree.leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, nnx.Module))
        calls = _Calls([root for root in (model, getattr(model, "__self__", None), *given) if _is_nnx(root)])
        classes = calls.classes()
        with (
            _hooked(classes),
            linen.intercept_methods(calls.of_linen),
            _cache_key(classes),
            _entered(calls),
        ):
            return function(*args, **kwargs)

    with contextlib.suppress(AttributeError):  # a module has no __name__
        with_sites.__name__ = with_sites.__qualname__ = function.__name__
    return with_sites


def _is_nnx(value: Any) -> bool:
    from flax import nnx

    return isinstance(value, nnx.Module)


def _modules(root: Any) -> Iterator[tuple[Path, Any]]:
    from flax import nnx

    for path, module in nnx.iter_modules(root):
        yield tuple(map(str, path)), module


class _Calls:
    """The calls of modules in one run of a function: where each module stands, and what its output is called."""

    def __init__(self, roots: Sequence[Any]):
        self.original = [each for root in roots for each in _modules(root)]
        self.paths: dict[int, Path] = {}  # by the module's id
        self.running: list[Path] = []  # the paths of the NNX modules whose calls are running
        self.times: collections.Counter[tuple[int | None, str]] = collections.Counter()
        for path, module in self.original:
            self.paths.setdefault(id(module), path)

    def classes(self) -> frozenset[type]:
        """The classes of the given modules that can be called."""
        classes = {type(module) for _, module in self.original}
        return frozenset(cls for cls in classes if any("__call__" in vars(base) for base in cls.__mro__))

    def of_nnx(self, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        known = self.paths
        if id(module) not in known:
            self.paths = {**known, **self.rebuilt(module)}
        path = self.paths[id(module)]
        self.running.append(path)
        try:
            output = call(*args, **kwargs)
        finally:
            self.running.pop()
            self.paths = known  # a rebuilt module may go when its call is done, and its id to another
        return self.site(output, path, module)

    def rebuilt(self, module: Any) -> dict[int, Path]:
        """The places of a module that a transformation rebuilt, and of all that is in it."""
        around = self.running[-1] if self.running else ()
        inside = list(_modules(module))
        structure = _structure(inside)
        alike = [
            path
            for path, other in self.original
            if type(other) is type(module)
            and path[: len(around)] == around
            and _structure(_modules(other)) == structure
        ]
        at = alike[0] if len(alike) == 1 else (*around, type(module).__name__)
        return {id(inner): (*at, *path) for path, inner in inside}

    def of_linen(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != "__call__" or _calls.get() is not self:
            return output
        return self.site(output, context.module.path, context.module)

    def site(self, output: Any, path: Path, module: Any) -> Any:
        if not _is_tree_of_arrays(output):
            return output
        layer, name = _layer_and_name(path, type(module).__name__)
        self.times[layer, name] += 1
        times = self.times[layer, name]
        return running_pass.site(output, name if times == 1 else f"{name}#{times}", layer=layer)


def _structure(modules: Iterable[tuple[Path, Any]]) -> list[tuple[Path, type]]:
    return [(path, type(module)) for path, module in modules]


def _is_tree_of_arrays(output: Any) -> bool:
    leaves = jax.tree.leaves(output)
    try:
        for leaf in leaves:
            jax.typeof(leaf)
    except TypeError:
        return False
    return bool(leaves)


def _layer_and_name(path: Path, class_name: str) -> tuple[int | None, str]:
    for index, part in enumerate(path):
        if number := re.fullmatch(r"(?:(.+)_)?(\d+)", part):
            stem = () if number[1] is None else (number[1],)
            return int(number[2]), ".".join((*path[:index], *stem, *path[index + 1 :])) or class_name
    return None, ".".join(path) or class_name


_calls: contextvars.ContextVar[_Calls | None] = contextvars.ContextVar("calls of modules that are sites", default=None)


@contextlib.contextmanager
def _entered(calls: _Calls) -> Iterator[None]:
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)


# How many running functions need the hook on a class: two threads, or two nested passes, may share one.
_needed: collections.Counter[type] = collections.Counter()
_own_call: dict[type, Any] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def _hooked(classes: frozenset[type]) -> Iterator[None]:
    """Stands in for `__call__` on each class in the block."""
    with _lock:
        for cls in classes:
            if not _needed[cls]:
                _own_call[cls] = vars(cls).get("__call__")
                type.__setattr__(cls, "__call__", _hook(cls, _own_call[cls]))
            _needed[cls] += 1
    try:
        yield
    finally:
        with _lock:
            for cls in classes:
                _needed[cls] -= 1
                if not _needed[cls]:
                    del _needed[cls]
                    own = _own_call.pop(cls)
                    if own is None:
                        type.__delattr__(cls, "__call__")
                    else:
                        type.__setattr__(cls, "__call__", own)


def _hook(cls: type, own: Any) -> Callable[..., Any]:
    """A `__call__` for `cls`, which has `own` or else inherits one."""

    def bound(module: Any) -> Callable[..., Any]:
        if own is None:
            return super(cls, module).__call__  # pyright: ignore[reportAttributeAccessIssue]
        return own.__get__(module, cls) if hasattr(own, "__get__") else own

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = _calls.get()
        if calls is None or type(self) is not cls:  # a subclass that calls super() has a hook, and a site, of its own
            return bound(self)(*args, **kwargs)
        return calls.of_nnx(self, bound(self), args, kwargs)

    return __call__

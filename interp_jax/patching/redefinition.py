"""Patches outside function bodies, on a module that has run: decorators, default values, assignments, new methods.

Code of a function can be put into the live function; what a module or a class body does as it runs is over. So the
statements that a patch changed are carried out again, alone, in the module's live globals, and the names that they
bind are bound anew; the old values come back when the patch goes. Two cases:

- A `def` whose decorators are the same keeps its function objects, which get the new default values and annotations:
  every alias sees them, as it sees the new code.
- Anything else binds a *new object*: `from module import f` taken before the patch still is the old one. Patching on
  import has no such limit.

Methods are carried out in a class body that starts with the names of the real class and hands its `__class__` cell to
it, so `super()`, name mangling and `@x.setter` work; `__set_name__` is called as for a new class. Hooks that ran over
the class when it was made (`__init_subclass__`, a class decorator, flax's wrapping of methods) do not run over the new
object. A changed class header is refused, and so are changed fields of dataclasses, named tuples and enumerations,
whose class was made from them.
"""

import abc
import ast
import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Sequence
from typing import Any

from interp_jax.patching.errors import DefinitionError

_MISSING = object()
_NOT_RESULTS = {"__module__", "__qualname__", "__firstlineno__", "__static_attributes__", "__classcell__"}


@dataclasses.dataclass
class Redefinition:
    """What has to change beside code objects."""

    bindings: list[tuple[dict[str, Any] | type, str, Any]] = dataclasses.field(default_factory=list)
    """Namespace or class, name, new value."""
    functions: list[types.FunctionType] = dataclasses.field(default_factory=list)
    """Functions whose defaults and annotations the live functions of the same name and line shall have."""
    codes: list[types.CodeType] = dataclasses.field(default_factory=list)
    """All code that was carried out."""

    def apply(self, live_of: Callable[[types.FunctionType], list[types.FunctionType]]) -> Callable[[], None]:
        """Makes the changes; gives the function that takes them back."""
        undo: list[Callable[[], None]] = []
        for owner, name, value in self.bindings:
            old = (owner if isinstance(owner, dict) else vars(owner)).get(name, _MISSING)
            _bind(owner, name, value)
            undo.append(lambda owner=owner, name=name, old=old: _bind(owner, name, old))
        for model in self.functions:
            for function in live_of(model):
                old = function.__defaults__, function.__kwdefaults__, function.__annotations__
                _specify(function, model.__defaults__, model.__kwdefaults__, model.__annotations__)
                undo.append(lambda function=function, old=old: _specify(function, *old))

        def take_back() -> None:
            for step in reversed(undo):
                step()

        return take_back


def _specify(function: types.FunctionType, defaults: Any, keyword_defaults: Any, annotations: Any) -> None:
    function.__defaults__, function.__kwdefaults__, function.__annotations__ = defaults, keyword_defaults, annotations


def _bind(owner: dict[str, Any] | type, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        if value is _MISSING:
            owner.pop(name, None)
        else:
            owner[name] = value
    elif value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
        if hasattr(type(value), "__set_name__"):
            type(value).__set_name__(value, owner, name)


def redefine(old: ast.Module, new: ast.Module, namespace: dict[str, Any], filename: str) -> Redefinition:
    """Carries out the statements outside function bodies in which two versions of a module differ.

    Args:
        old: the module as it ran.
        new: as it shall be, with the line numbers that its code shall have.
        namespace: the module's globals, which are read and not changed.
        filename: the file name that code shall carry.

    Returns:
        What to bind and to set.

    Raises:
        DefinitionError: the difference is in a class header or in a compound statement.
    """
    future = [s for s in new.body if isinstance(s, ast.ImportFrom) and s.module == "__future__"]
    result = Redefinition()
    _Scope(result, namespace, filename, future).compare(old.body, new.body, [])
    return result


class _Scope:
    def __init__(self, result: Redefinition, namespace: dict[str, Any], filename: str, future: list[ast.ImportFrom]):
        self._result, self._namespace, self._filename, self._future = result, namespace, filename, future
        self._new_globals: dict[str, Any] = {}

    def compare(self, old: Sequence[ast.stmt], new: Sequence[ast.stmt], classes: list[type]) -> None:
        left = [_skeleton(statement) for statement in old]
        changed: list[ast.stmt] = []
        for statement in new:
            skeleton = _skeleton(statement)
            if skeleton in left:
                left.remove(skeleton)
            else:
                changed.append(statement)
        names = {name for statement in old for name in _bound_names(statement)}
        for name in names - {name for statement in new for name in _bound_names(statement)}:
            owner = classes[-1] if classes else self._namespace
            self._result.bindings.append((owner, name, _MISSING))
        for statement in changed:
            self._carry_out(statement, old, classes)
        by_name = {s.name: s for s in old if isinstance(s, ast.ClassDef)}
        for statement in new:
            if isinstance(statement, ast.ClassDef) and statement not in changed:
                before = by_name[statement.name]
                if [_skeleton(s) for s in before.body] != [_skeleton(s) for s in statement.body] or any(
                    isinstance(s, ast.ClassDef) for s in statement.body
                ):
                    holder = vars(classes[-1]) if classes else self._namespace
                    real = holder.get(statement.name)
                    if isinstance(real, type):
                        self.compare(before.body, statement.body, [*classes, real])

    def _carry_out(self, statement: ast.stmt, old: Sequence[ast.stmt], classes: list[type]) -> None:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [ast.dump(decorator) for decorator in statement.decorator_list]
            same_name = [s for s in old if isinstance(s, type(statement)) and s.name == statement.name]
            if any([ast.dump(decorator) for decorator in s.decorator_list] == decorators for s in same_name):
                bare = copy.copy(statement)
                bare.decorator_list = []
                function = self._execute(bare, classes)[statement.name]
                # The live function's first line is its first decorator's.
                first = min([statement.lineno, *(d.lineno for d in statement.decorator_list)])
                function.__code__ = function.__code__.replace(co_firstlineno=first)
                self._result.functions.append(function)
                return
        elif classes and _made_a_field(statement, classes[-1]):
            raise DefinitionError(
                f"{self._filename}:{statement.lineno}: a patch changes a field of {classes[-1].__qualname__}, which "
                "was made from its fields as the module ran. Patch it with install_on_import() before it is imported."
            )
        elif isinstance(statement, ast.ClassDef) or hasattr(statement, "body"):
            raise DefinitionError(
                f"{self._filename}:{statement.lineno}: a patch changes a class header or a compound statement outside "
                "functions, and the module has run already. Patch it with install_on_import() before it is imported."
            )
        owner = classes[-1] if classes else self._namespace
        for name, value in self._execute(statement, classes).items():
            self._result.bindings.append((owner, name, _as_in_a_class(name, value) if classes else value))

    def _execute(self, statement: ast.stmt, classes: list[type]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        body: list[ast.stmt] = [statement]
        # A statement sees what those above it bound anew.
        around: dict[str, Any] = dict(self._new_globals)
        for depth in reversed(range(len(classes))):
            maker = f"_interp_jax_maker_{depth}"
            shell = ast.parse(f"class Shell(metaclass={maker}): pass").body[0]
            assert isinstance(shell, ast.ClassDef)
            shell.name, shell.body = classes[depth].__name__, body
            body = [ast.copy_location(shell, statement)]
            real = classes[depth]
            anew = {name: value for owner, name, value in self._result.bindings if owner is real}
            scope = {**around, **_type_parameters(real), **vars(real), **anew}
            around[maker] = _maker(real, scope, results if depth == len(classes) - 1 else {})
        module = ast.Module([*self._future, *body], [])
        code = compile(ast.fix_missing_locations(module), self._filename, "exec", dont_inherit=True)
        self._result.codes.append(code)
        if not classes and "__annotations__" in self._namespace:
            around = {"__annotations__": self._namespace["__annotations__"], **around}
        names = _to_run_on(around)
        exec(code, self._namespace, names)
        if classes:
            return results
        future = {alias.asname or alias.name for node in self._future for alias in node.names}
        own = {name: value for name, value in _changed(around, names).items() if name not in future}
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) or statement.decorator_list:
            self._new_globals.update(own)
        return own


def _made_a_field(statement: ast.stmt, real: type) -> bool:
    """Whether the class read what a statement of its body binds as it was made, and would not read it again."""
    if isinstance(real, enum.EnumMeta) or (issubclass(real, tuple) and hasattr(real, "_fields")):
        return isinstance(statement, ast.Assign | ast.AnnAssign)
    plain = type(real) in (type, abc.ABCMeta) and not dataclasses.is_dataclass(real)
    return isinstance(statement, ast.AnnAssign) and not plain


def _maker(real: type, scope: dict[str, Any], results: dict[str, Any]) -> Any:
    """A metaclass that runs a class body over the names of a real class and makes no class."""

    def make(name: str, bases: tuple[type, ...], names: dict[str, Any]) -> type:
        cell = names.pop("__classcell__", None)
        if cell is not None:
            cell.cell_contents = real
        results.update(_changed(scope, names))
        return real

    make.__prepare__ = lambda name, bases: _to_run_on(scope)  # pyright: ignore[reportFunctionMemberAccess]
    return make


def _type_parameters(real: type) -> dict[str, Any]:
    return {parameter.__name__: parameter for parameter in getattr(real, "__type_params__", ())}


def _to_run_on(scope: dict[str, Any]) -> dict[str, Any]:
    """A copy for a body to run on, which adds to its annotations in place."""
    names = dict(scope)
    if "__annotations__" in names:
        names["__annotations__"] = dict(names["__annotations__"])
    return names


def _changed(scope: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """What a body bound that ran on a copy of `scope`."""
    changed = {key for key, value in names.items() if scope.get(key, _MISSING) is not value} - _NOT_RESULTS
    if names.get("__annotations__") == scope.get("__annotations__", {}):
        changed.discard("__annotations__")
    return {key: names[key] for key in names if key in changed}


def _as_in_a_class(name: str, value: Any) -> Any:
    """A class makes some of its functions class and static methods without being asked."""
    if isinstance(value, types.FunctionType):
        if name in ("__init_subclass__", "__class_getitem__"):
            return classmethod(value)
        if name == "__new__":
            return staticmethod(value)
    return value


class _Stripper(ast.NodeTransformer):
    def visit_FunctionDef(self, node: Any) -> Any:
        node.body = []
        self.generic_visit(node)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        node.body = ast.Constant(None)
        self.generic_visit(node)
        return node


def _skeleton(statement: ast.stmt) -> str:
    """A statement without what runs only later: the bodies of functions, and those of a class, which is its own
    scope."""
    bare = copy.deepcopy(statement)
    if isinstance(bare, ast.ClassDef):
        bare.body = []
    return ast.dump(_Stripper().visit(bare))


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Import | ast.ImportFrom):
        names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return names | {a.asname or a.name.split(".")[0] for a in getattr(statement, "names", [])}
    return set()

"""One module and all that is patched in it.

The state is a list of *requests* (one a patcher), and everything else follows from it: the edits of all requests are
found in the original source, made together, compiled once, and the code objects that differ from those now running are
put into the live functions. So patches never match each other's output, patchers may be taken back in any order, and
with none left every function has the very code object that it was imported with.

Everything that can fail is done before the first function is touched.
"""

import ast
import builtins
import copy
import dataclasses
import importlib
import importlib.machinery
import itertools
import linecache
import symtable
import sys
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from interp_jax.patching.code_objects import (
    Key,
    body_signature,
    clear_result_caches,
    codes_by_key,
    is_a_definition_s,
    is_function,
    is_written_in_c,
    live_functions,
)
from interp_jax.patching.errors import ConflictError, DefinitionError, MemberError, PatchError, SourceError
from interp_jax.patching.layout import Layout, lay_out
from interp_jax.patching.matching import equal
from interp_jax.patching.pair import ParsedPair
from interp_jax.patching.redefinition import Redefinition, redefine
from interp_jax.patching.retrace import patches_changed
from interp_jax.patching.rewriting import TextRewriter, TreeRewriter, check_conflicts
from interp_jax.patching.source_text import SourceText, home_of

lock = threading.RLock()
"""Held while anything is patched or taken back."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What one patcher wants of one module."""

    pairs: tuple[ParsedPair, ...]
    imports: tuple[str, ...]
    """Import statements whose names the new code uses."""
    versions: object
    """Prints what is known about versions, for errors."""
    whole: "Request | None" = None
    """What this is a part of, where a patcher's members are defined in several modules."""
    number: int = dataclasses.field(default_factory=itertools.count().__next__)
    """Its parts' as well, and nobody else's ever: what JAX traced under one is never taken for another's."""

    def belongs_to(self, request: "Request") -> bool:
        """Whether this is the request or a part of it."""
        return self is request or self.whole is request


class PatchedModule:
    """The patches on one module, which need not be imported yet."""

    def __init__(self, name: str, source: SourceText, namespace: dict[str, Any] | None):
        self.name = name
        self.source = source
        self.requests: list[Request] = []
        self._run_with: tuple[Request, ...] = ()
        self._namespace = namespace
        self._pristine = _compile(source.tree, source.filename)
        self._now = self._pristine
        # For code that was running before the first patch: our compilation is equal to it and not identical.
        self._imported: dict[Key, types.CodeType] = {}
        self._key_of: dict[int, Key] = {}
        self._keep_alive: list[types.CodeType] = []
        self._injected: dict[str, Any] = {}
        # What the module's and the classes' bodies did when they ran; redefinitions are in comparison with it.
        self._ran: ast.Module | None = None if namespace is None else source.tree
        self._redefinition: Redefinition | None = None
        self._take_back_definitions: Callable[[], None] = _nothing
        self._linecache_before: Any = None
        self._shown: list[str] | None = None

    # -------------------------------------------------------------- the two ways to patch

    def set_requests(self, requests: Sequence[Request]) -> None:
        """Makes these and no others the patches of a module that has run.

        Args:
            requests: all that shall be active, in order.

        Raises:
            PatchError: they cannot all be made. Nothing has changed then.
        """
        namespace = self._namespace
        assert namespace is not None
        assert self._ran is not None
        layout = self.rewritten(requests)
        tree = self.source.tree if layout is None else layout.parse(self.source.filename)
        code = self._pristine if layout is None else _compile(tree, self.source.filename)
        injected = self._imports(requests, namespace)
        before = _changes()
        self._take_back_definitions()
        added = {name: value for name, value in injected.items() if name not in namespace}
        namespace.update(added)
        try:
            redefinition = redefine(self._ran, tree, namespace, self.source.filename) if self._redefines(code) else None
            self._remember_redefined(redefinition, codes_by_key(code))
            live = live_functions(namespace)
            if any(request not in self.requests for request in requests):
                self._check_in_use(requests, codes_by_key(code), live)
            models = [f for each in (redefinition, self._redefinition) if each for f in each.functions]
            swaps = self._swaps(tree, code, injected, [function for function in live if function not in models])
            self._check_shadowing(injected, [new for _, new in swaps])
        except BaseException:
            for name in added:
                namespace.pop(name, None)
            self._take_back_definitions = self._redo_definitions()
            raise

        for name in self._injected.keys() - injected.keys():
            namespace.pop(name, None)
        namespace.update(injected)
        for function, new in swaps:
            function.__code__ = new
        clear_result_caches(function for function, _ in swaps)
        self._now, self._injected, self.requests = code, injected, list(requests)
        self._redefinition = redefinition
        self._take_back_definitions = self._redo_definitions()
        self._show(layout)
        patches_changed(before, _changes())

    @property
    def changes(self) -> set[int]:
        """The requests that have come or gone since the module ran: nobody has called it without those it ran with."""
        return {request.number for request in self.requests} ^ {request.number for request in self._run_with}

    def without(self, request: Request) -> list[Request]:
        """The active requests but for one and its parts."""
        return [each for each in self.requests if not each.belongs_to(request)]

    def run_patched(self, module: types.ModuleType, requests: Sequence[Request]) -> None:
        """Runs the module for the first time, patched.

        Args:
            module: the new, empty module.
            requests: the patches.

        Raises:
            PatchError: they cannot all be made. The module has not run then.
        """
        layout = self.rewritten(requests)
        code = self._pristine if layout is None else _compile(layout.parse(self.source.filename), self.source.filename)
        injected = self._imports(requests, {})
        own = _names_bound_by(self.source)
        for name in injected.keys() & own:
            raise _name_taken(name, self.name)
        self._check_shadowing(injected, [c for k, c in codes_by_key(code).items() if self._differs(k, c)])
        namespace = vars(module)
        namespace.update(injected)
        self._show(layout)
        self._namespace = namespace
        try:
            exec(code, namespace)
            self._check_not_replaced_in_c(requests)
        except BaseException:
            self._show(None)
            raise
        self._now, self._injected, self.requests = code, injected, list(requests)
        self._run_with = tuple(requests)
        self._ran = self.source.tree if layout is None else layout.parse(self.source.filename)
        self._remember(code)

    # -------------------------------------------------------------- planning

    def rewritten(self, requests: Sequence[Request]) -> Layout | None:
        """The module's text with these patches, or None where they patch nothing.

        Raises:
            PatchError: they cannot all be made.
        """
        source = self.source
        edits = []
        for request in requests:
            for pair in request.pairs:
                if not source.definitions(pair.member):
                    raise MemberError(missing_member(source, pair.member) + f"\n{request.versions}")
                edits += pair.edits(source, request.versions)
        if not edits:
            return None
        check_conflicts(source, edits)
        origins = ", ".join(sorted({str(edit.after.origin) for edit in edits}))
        try:
            layout = lay_out(source, TextRewriter(source, edits).render(0, len(source.text)))
            tree = layout.parse(source.filename)
            # Some faults (a nonlocal without its variable) are the compiler's to find.
            _compile(tree, source.filename)
        except SyntaxError as error:
            raise PatchError(
                f"{source.filename}:{error.lineno}: with the patches at {origins} the module is no longer Python: "
                f"{error.msg}\n    {(error.text or '').rstrip()}\nA replacement must fit the place that its "
                f"pattern matches."
            ) from None
        expected = TreeRewriter(edits).rebuild(source.tree)
        if not equal(_without_pass(expected), _without_pass(tree)):
            raise PatchError(
                f"{source.filename}: the patches at {origins} could not be written out as text faithfully. This "
                f"is a fault of "
                "interp_jax.patching; please report it with the pairs."
            )
        return layout

    def _differs(self, key: Key, code: types.CodeType) -> bool:
        return codes_by_key(self._pristine).get(key) != code

    def _redefines(self, code: types.CodeType) -> bool:
        """Whether the module or a class in it would do something else as it runs than it did."""
        assert self._ran is not None
        ran, new = codes_by_key(_compile(self._ran, self.source.filename)), codes_by_key(code)
        bodies = {key for key in {*ran, *new} if not is_function(ran.get(key) or new[key])}
        return any(
            key not in ran or key not in new or body_signature(ran[key]) != body_signature(new[key]) for key in bodies
        )

    def _remember_redefined(self, redefinition: Redefinition | None, new: dict[Key, types.CodeType]) -> None:
        """Keeps code that was carried out again from being taken for code that the module was imported with."""
        if redefinition is None:
            return
        codes = [c for code in redefinition.codes for c in codes_by_key(code).values()]
        for code in [*codes, *(function.__code__ for function in redefinition.functions)]:
            key = next((k for k, c in new.items() if _same_place(c, code)), None)
            if key is not None:
                self._key_of[id(code)] = key
                self._keep_alive.append(code)

    def _redo_definitions(self) -> Callable[[], None]:
        if self._redefinition is None:
            return _nothing
        assert self._namespace is not None
        functions = live_functions(self._namespace)

        def live_of(model: types.FunctionType) -> list[types.FunctionType]:
            name, line = model.__code__.co_qualname, model.__code__.co_firstlineno
            return [
                f
                for f in functions
                if f.__code__.co_qualname == name and f.__code__.co_firstlineno == line and f is not model
            ]

        return self._redefinition.apply(live_of)

    def _swaps(
        self,
        tree: ast.Module,
        code: types.CodeType,
        injected: dict[str, Any],
        live: Sequence[types.FunctionType],
    ) -> list[tuple[types.FunctionType, types.CodeType]]:
        """Which live function gets which code."""
        now, new = codes_by_key(self._now), codes_by_key(code)
        swaps: list[tuple[types.FunctionType, types.CodeType]] = []
        counts = _count_by_name(now), _count_by_name(new)
        pristine = codes_by_key(self._pristine)
        for function in live:
            key = self._key(function.__code__, now)
            if key is None or key not in new or counts[0].get(key[0]) != counts[1].get(key[0]):
                continue
            wanted = new[key]
            if wanted == pristine.get(key):
                wanted = self._imported.get(key, wanted)
            if wanted == function.__code__ and wanted.co_filename == function.__code__.co_filename:
                continue
            swaps.append((function, self._with_closure(tree, function, wanted, injected)))
        return swaps

    def _check_in_use(
        self, requests: Sequence[Request], new: dict[Key, types.CodeType], live: Sequence[types.FunctionType]
    ) -> None:
        """Refuses patches that nothing would run."""
        self._check_not_replaced_in_c(requests)
        now = codes_by_key(self._now)
        used = {self._key(function.__code__, now) for function in live}
        changed = [k for k, c in now.items() if is_a_definition_s(k, c) and k in new and new[k] != c]
        for name in dict.fromkeys(name for name, _ in changed):
            keys = [key for key in changed if key[0] == name]
            if used.intersection(keys):
                continue
            place = f"{self.source.filename}:{now[keys[0]].co_firstlineno}"
            elsewhere = [f.__code__ for f in live if f.__code__.co_qualname == name]
            lines = [
                c.co_firstlineno
                for c in elsewhere
                if self._key(c, now) is None and c.co_filename == self.source.filename
            ]
            if lines:
                raise SourceError(
                    f"{place}: the {name} that is running was on line {lines[0]} of this file, which has changed since "
                    f"{self.name} was imported. Restart the process."
                )
            raise DefinitionError(
                f"{place}: no function runs the code of this {name}, so a patch of it would do nothing: it was "
                "replaced or removed, or is in a branch that was not taken, or ran while the module was imported. "
                "Patch it with install_on_import(), or patch what runs instead."
            )

    def _check_not_replaced_in_c(self, requests: Sequence[Request]) -> None:
        for pair in (pair for request in requests for pair in request.pairs):
            found: Any = (self._namespace or {}).get(pair.member.split(".")[0])
            for name in pair.member.split(".")[1:]:
                found = vars(found).get(name) if isinstance(found, type) else None
            definitions = [s for s in self.source.definitions(pair.member) if hasattr(s, "body")]
            if definitions and is_written_in_c(found):
                raise MemberError(
                    f"{self.name}.{pair.member} is written in C ({found!r}): it has taken the place of what "
                    f"{self.source.filename}:{definitions[0].lineno} defines, and cannot be patched."
                )

    def _key(self, code: types.CodeType, now: dict[Key, types.CodeType]) -> Key | None:
        known = self._key_of.get(id(code))
        if known is not None:
            return known
        same_name = [k for k in now if k[0] == code.co_qualname]
        at_line = [k for k in same_name if now[k].co_firstlineno == code.co_firstlineno]
        exact = [k for k in at_line if now[k].co_code == code.co_code and now[k].co_consts == code.co_consts]
        found = exact if len(exact) == 1 else at_line
        if len(found) != 1 or code.co_name == "<module>":
            return None
        key = found[0]
        self._key_of[id(code)] = key
        self._keep_alive.append(code)
        self._imported.setdefault(key, code)
        return key

    def _remember(self, code: types.CodeType) -> None:
        for key, each in codes_by_key(code).items():
            self._key_of[id(each)] = key
            self._keep_alive.append(each)

    def _with_closure(
        self, tree: ast.Module, function: types.FunctionType, code: types.CodeType, injected: dict[str, Any]
    ) -> types.CodeType:
        """The code with exactly the free variables that the live function has cells for."""
        has, wants = set(function.__code__.co_freevars), set(code.co_freevars)
        if wants - has == {"__class__"}:
            # The first zero-argument super() of the method: it has no cell for it, and cannot be given one.
            name, real = self._class_of(code)
            injected[name], injected[_SUPER] = real, super
            tree = ast.fix_missing_locations(_NameTheClass(code, name).visit(copy.deepcopy(tree)))
            code = next(
                c for k, c in codes_by_key(_compile(tree, self.source.filename)).items() if _same_place(c, code)
            )
            wants = set(code.co_freevars)
        if wants - has:
            names = ", ".join(sorted(wants - has))
            raise DefinitionError(
                f"{self.source.filename}:{code.co_firstlineno}: the patched {code.co_qualname} uses {names} "
                f"from the scope around "
                "it, which the running function does not hold. Patch it with install_on_import() before it is imported."
            )
        if has - wants:
            tree = ast.fix_missing_locations(_KeepNames(code, sorted(has)).visit(copy.deepcopy(tree)))
            code = next(c for c in codes_by_key(_compile(tree, self.source.filename)).values() if _same_place(c, code))
        self._key_of[id(code)] = self._key_of[id(function.__code__)]
        self._keep_alive.append(code)
        return code

    def _class_of(self, method: types.CodeType) -> tuple[str, type]:
        """The class that defines a method, and a global name for it that nobody else uses."""
        path = method.co_qualname.split(".")[:-1]
        found: Any = (self._namespace or {}).get(path[0]) if path else None
        for name in path[1:]:
            found = vars(found).get(name) if isinstance(found, type) else None
        if not isinstance(found, type):
            raise DefinitionError(
                f"{self.source.filename}:{method.co_firstlineno}: the patched {method.co_qualname} calls super(), "
                "which it did not before, and its class cannot be found by name. Patch it with install_on_import()."
            )
        return "_interp_jax_class_" + "_".join(path), found

    # -------------------------------------------------------------- names

    def _imports(self, requests: Sequence[Request], namespace: dict[str, Any]) -> dict[str, Any]:
        injected: dict[str, Any] = {}
        for statement in dict.fromkeys(s for request in requests for s in request.imports):
            for name, value in imported_names(statement).items():
                if injected.get(name, value) is not value:
                    raise ConflictError(
                        f"{self.name}: two patches import different things as {name!r}; rename one with `as`."
                    )
                if name in namespace and name not in self._injected:
                    raise _name_taken(name, self.name)
                injected[name] = value
        return injected

    def _check_shadowing(self, injected: dict[str, Any], codes: Sequence[types.CodeType]) -> None:
        for code in codes:
            for name in injected.keys() & {*code.co_varnames, *code.co_cellvars, *code.co_freevars}:
                raise ConflictError(
                    f"{self.source.filename}:{code.co_firstlineno}: {code.co_qualname} has a variable {name!r} "
                    f"of its own, and a "
                    f"patch imports that name. Import it as another one: `from ... import {name} as ij_{name}`."
                )

    # -------------------------------------------------------------- what tools see

    def _show(self, layout: Layout | None) -> None:
        filename = self.source.filename
        entry = linecache.cache.get(filename)
        if self._shown is None:
            self._linecache_before = entry
        elif entry is None or entry[2] is not self._shown:  # pyright: ignore[reportGeneralTypeIssues]
            self._linecache_before = None
        if layout is None:
            if self._shown is not None:
                if self._linecache_before is None:
                    linecache.cache.pop(filename, None)
                else:
                    linecache.cache[filename] = self._linecache_before
            self._shown = None
            return
        lines = [line for line in layout.entries if line]
        # No modification time: linecache takes it for text that is not from a disk, and does not drop it for the file.
        linecache.cache[filename] = (len(layout.text), None, lines, filename)
        self._shown = lines


def _compile(tree: ast.Module, filename: str) -> types.CodeType:
    return compile(tree, filename, "exec", dont_inherit=True)


def _count_by_name(codes: dict[Key, types.CodeType]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, _ in codes:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _nothing() -> None:
    """Takes back no redefinition."""


def _same_place(a: types.CodeType, b: types.CodeType) -> bool:
    return (a.co_qualname, a.co_firstlineno) == (b.co_qualname, b.co_firstlineno)


def _stands_at(node: Any, code: types.CodeType) -> bool:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first == code.co_firstlineno and node.name == code.co_name


def _without_pass(tree: ast.Module) -> ast.Module:
    """`pass` stands where a removal left nothing; it is no part of the program."""
    for node in ast.walk(tree):
        for _, block in ast.iter_fields(node):
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                block[:] = [statement for statement in block if not isinstance(statement, ast.Pass)]
    return tree


class _KeepNames(ast.NodeTransformer):
    """Mentions names in a function, at no cost, so that they stay its free variables."""

    def __init__(self, code: types.CodeType, names: Sequence[str]):
        self._code, self._names = code, names

    def visit_FunctionDef(self, node: Any) -> Any:
        self.generic_visit(node)
        if _stands_at(node, self._code):
            last = node.body[-1]
            mention = ast.Tuple([ast.Name(name, ast.Load()) for name in self._names], ast.Load())
            dead = ast.If(ast.Constant(False), [ast.Expr(mention)], [])
            node.body.append(ast.copy_location(dead, last))
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


_SUPER = "_interp_jax_super"


class _NameTheClass(ast.NodeTransformer):
    """Writes a method's zero-argument `super()` out, with the class under a global name."""

    def __init__(self, code: types.CodeType, name: str):
        self._code, self._name = code, name
        self._first: str | None = None

    def visit_FunctionDef(self, node: Any) -> Any:
        outer = self._first
        if _stands_at(node, self._code):
            parameters = [*node.args.posonlyargs, *node.args.args]
            self._first = parameters[0].arg if parameters else None
        self.generic_visit(node)
        self._first = outer
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if self._first and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            node.args = [ast.Name(self._name, ast.Load()), ast.Name(self._first, ast.Load())]
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        # Under the name of `super`, with or without arguments, the compiler asks for the cell.
        names = {"__class__": self._name, "super": _SUPER} if self._first else {}
        return ast.copy_location(ast.Name(names.get(node.id, node.id), node.ctx), node)


def imported_names(statement: str) -> dict[str, Any]:
    """Carries out one import statement.

    Args:
        statement: `import a.b`, `import a.b as c` or `from a import b as c`.

    Returns:
        The names that it binds, and what to.

    Raises:
        PatchError: it is no import statement, or the import fails.
    """
    try:
        body = ast.parse(statement.strip()).body
    except SyntaxError:
        body = []
    if len(body) != 1 or not isinstance(body[0], ast.Import | ast.ImportFrom) or getattr(body[0], "level", 0):
        raise PatchError(
            f"{statement!r} is not one absolute import statement, such as 'from interp_jax.instrument import site'."
        )
    node = body[0]
    names: dict[str, Any] = {}
    try:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                if not hasattr(module, alias.name):
                    submodule = f"{node.module}.{alias.name}"
                    try:
                        importlib.import_module(submodule)
                    except ModuleNotFoundError as error:
                        if error.name != submodule:
                            raise
                        raise ImportError(f"{node.module} has no {alias.name!r}") from error
                names[alias.asname or alias.name] = getattr(module, alias.name)
            else:
                module = importlib.import_module(alias.name)
                top = alias.name.split(".")[0]
                names[alias.asname or top] = module if alias.asname else importlib.import_module(top)
    except ImportError as error:
        raise PatchError(f"The import that a patch needs fails: {statement.strip()}: {error}") from error
    return names


def import_needed(requests: Iterable[Request]) -> None:
    """Imports what the new code uses, for a caller that does not hold `lock`.

    An import takes locks of its own. Another thread may hold one of them and wait for `lock`: one that imports a module
    that is patched on import.

    Raises:
        PatchError: an import fails.
    """
    for statement in dict.fromkeys(statement for request in requests for statement in request.imports):
        imported_names(statement)


def missing_member(source: SourceText, member: str) -> str:
    """Says that a module does not define a member, and what it does define that is similar."""
    import difflib

    names = source.member_names()
    parts = member.split(".")
    similar = (
        difflib.get_close_matches(member, names, n=4, cutoff=0.5)
        or [name for name in names if name.split(".")[-1] == parts[-1]][:4]
    )
    hint = f"Similar: {', '.join(similar)}." if similar else f"It defines: {', '.join(names[:20]) or 'nothing'}."
    text = f"{source.filename} defines no member {member!r}. {hint}"
    if len(parts) > 1 and source.definitions(".".join(parts[:-1])):
        text += f" If {parts[-1]} is inherited, patch the class that defines it."
    return text


def _names_bound_by(source: SourceText) -> set[str]:
    table = symtable.symtable(source.text, source.filename, "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}


def _name_taken(name: str, module: str) -> ConflictError:
    return ConflictError(
        f"A patch imports {name!r} into {module}, which has that name already. Import it as another one: "
        f"`from ... import {name} as ij_{name}`."
    )


def find_source(name: str, module: types.ModuleType | None, loader: Any) -> SourceText:
    """Finds a module's source text.

    Args:
        name: the module's name.
        module: the module, if it has been imported.
        loader: its loader, if it has one.

    Returns:
        The text and the file name that its code carries.

    Raises:
        SourceError: there is none: the module is built in, frozen, compiled or was typed in.
    """
    filename = getattr(module, "__file__", None) or getattr(loader, "path", None)
    text: str | None = None
    if hasattr(loader, "get_source"):
        try:
            text = loader.get_source(name)
        except ImportError:
            text = None
        if filename is None and text is not None and hasattr(loader, "get_filename"):
            filename = loader.get_filename(name)
    if text is None and filename is not None and not filename.endswith((".so", ".pyd")):
        text = "".join(linecache.getlines(filename)) or None
    if name in sys.builtin_module_names or text is None or filename is None:
        raise SourceError(
            f"The source of module {name!r} cannot be found: {_why_no_source(name, loader, filename)}. Only what is "
            "written in Python, in a file, can be patched."
        )
    return SourceText(text, filename)


def _why_no_source(name: str, loader: Any, filename: str | None) -> str:
    if name in sys.builtin_module_names:
        return "it is built in, in C"
    if loader is importlib.machinery.FrozenImporter:
        return "it is frozen into the interpreter"
    if filename is not None and filename.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        return f"it is written in C, {filename}"
    if filename is not None and filename.endswith(".pyc"):
        return f"only its compiled code is there, {filename}"
    if filename is None or filename.startswith("<"):
        return "it was typed in or made by a program, and is in no file"
    return f"{getattr(loader, '__name__', type(loader).__name__)} gives none for {filename}"


_modules: dict[str, PatchedModule] = {}


def _changes() -> frozenset[tuple[str, int]]:
    return frozenset((module.name, number) for module in _modules.values() for number in module.changes)


def patched_modules() -> list[PatchedModule]:
    """All modules that have been patched."""
    return list(_modules.values())


def by_module(
    request: Request, name: str, source: SourceText, source_of: Callable[[str], SourceText]
) -> dict[str, Request]:
    """Splits a request by the modules that define its members: a package often only passes on what a submodule defines.

    Args:
        request: what a patcher wants.
        name: the module that it names.
        source: that module's source.
        source_of: gives other modules' source.

    Returns:
        Module name to its part of the request.

    Raises:
        SourceError: a module that defines a member has no source.
    """
    parts: dict[str, list[ParsedPair]] = {name: []}
    for pair in request.pairs:
        module, member = home_of(pair.member, name, source, source_of) or (name, pair.member)
        parts.setdefault(module, []).append(dataclasses.replace(pair, member=member))
    if len(parts) == 1:
        return {name: request}
    return {
        module: dataclasses.replace(request, pairs=tuple(pairs), whole=request.whole or request)
        for module, pairs in parts.items()
    }


def patched_module_of(module: types.ModuleType) -> PatchedModule:
    """The patches on an imported module; none yet is fine.

    Raises:
        SourceError: its source cannot be found.
    """
    name = module.__name__
    state = _modules.get(name)
    if state is None or state._namespace is not vars(module):  # pyright: ignore[reportPrivateUsage]
        if module is builtins:
            raise SourceError("The module 'builtins' is written in C and cannot be patched.")
        loader = getattr(getattr(module, "__spec__", None), "loader", None) or getattr(module, "__loader__", None)
        state = _modules[name] = PatchedModule(name, find_source(name, module, loader), vars(module))
    return state


def register(state: PatchedModule) -> None:
    """Remembers the patches on a module that was patched as it was imported."""
    _modules[state.name] = state

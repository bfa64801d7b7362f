"""A module's source text beside its tree: where a node stands in the text, and where a member is defined.

The tree counts columns in UTF-8 bytes and lines by `\\n` alone; the text here is indexed by character. All such
arithmetic is in this file.
"""

import ast
import bisect
import functools
import io
import tokenize
from collections.abc import Callable, Iterator

from interp_jax.patching.errors import SourceError

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceText:
    """The text of one module, its lines and its tree."""

    def __init__(self, text: str, filename: str):
        self.text = text
        self.filename = filename
        self.tree = ast.parse(text, filename)
        self.lines = text.split("\n")
        """Without their ends. The last one is empty where the text ends in a newline."""
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def offset(self, line: int, column: int) -> int:
        """The index in the text of a tree's (line, column in bytes)."""
        text = self.lines[line - 1]
        characters = column if text.isascii() else len(text.encode()[:column].decode())
        return self._starts[line - 1] + characters

    def line_at(self, offset: int) -> int:
        """The line on which a character of the text stands, counted from 1."""
        return bisect.bisect_right(self._starts, offset)

    def line_start(self, offset: int) -> int:
        """The index of the first character of the line on which a character stands."""
        return self._starts[self.line_at(offset) - 1]

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node stands in the text, decorators included."""
        start = self.offset(node.lineno, node.col_offset)  # pyright: ignore[reportAttributeAccessIssue]
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        if decorators:
            first = self.offset(decorators[0].lineno, decorators[0].col_offset)
            start = self.text.rindex("@", 0, first)
        return start, self.offset(node.end_lineno, node.end_col_offset)  # pyright: ignore[reportAttributeAccessIssue]

    @functools.cached_property
    def _tokens(self) -> list[tuple[int, int, str]]:
        """Start, end and text of each token that is not blank or a comment."""
        skipped = (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
            # The text of an f-string, a token of its own since Python 3.12: "(" in it is no parenthesis.
            getattr(tokenize, "FSTRING_MIDDLE", None),
        )
        return [
            (self._starts[t.start[0] - 1] + t.start[1], self._starts[t.end[0] - 1] + t.end[1], t.string)
            for t in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if t.type not in skipped
        ]

    @functools.cached_property
    def _parentheses(self) -> list[tuple[int, int]]:
        """Where parentheses stand that are no part of a string, and +1 or -1."""
        return [(start, 1 if text == "(" else -1) for start, _, text in self._tokens if text in ("(", ")")]

    def between_brackets(self, start: int, end: int) -> tuple[int, int]:
        """A stretch of parameters, made longer by the stars, slashes and commas around it, which are no nodes.

        It reaches to the parentheses of a `def`, comments included, or to a lambda's colon.
        """
        start, end = self.balanced(start, end)
        before = [token for token in self._tokens if token[0] < start]
        while before and before[-1][2] in ("*", "**", ","):
            start = before.pop()[0]
        after = iter([token for token in self._tokens if token[0] >= end])
        closing = next(token for token in after if token[2] not in (",", "/"))
        if before and before[-1][2] == "(":
            return before[-1][1], closing[0]
        return start, closing[0]

    def balanced(self, start: int, end: int) -> tuple[int, int]:
        """A stretch of text, made longer until it holds its parentheses in pairs: a node's own span leaves them out.

        `(a), (b)` as two nodes begins at `a` and ends at `b`.
        """
        depth = lowest = 0
        for at, step in self._parentheses:
            if start <= at < end:
                depth += step
                lowest = min(lowest, depth)
        for _ in range(-lowest):
            start = max(at for at, step in self._parentheses if at < start and step > 0)
        for _ in range(depth - lowest):
            end = min(at for at, step in self._parentheses if at >= end and step < 0) + 1
        return start, end

    @functools.cached_property
    def lines_inside_strings(self) -> frozenset[int]:
        """Lines that begin inside a string literal: their leading blanks are data."""
        return lines_inside_strings(self.tree)

    def is_first_on_line(self, offset: int) -> bool:
        """Whether nothing but blanks stands before this character on its line."""
        return not self.text[self.line_start(offset) : offset].strip()

    def definitions(self, member: str) -> list[ast.stmt]:
        """All statements that define a member.

        Args:
            member: dotted: `f`, `Class.method`, `Outer.Inner.method`, `function.inner`.

        Returns:
            The definitions in the order of the source: several for a property's accessors, overloads or the branches of
            an `if`; none where the source does not define it.
        """
        scopes: list[ast.AST] = [self.tree]
        around: list[ast.AST] = []
        found: list[ast.stmt] = []
        names = member.split(".")
        for depth, name in enumerate(names):
            last = depth == len(names) - 1
            found = [s for scope in scopes for s in _statements_of(scope) if _defines(s, name, assignments=last)]
            around, scopes = scopes, list(found)
        if found and not any(isinstance(statement, _Definition) for statement in found):
            # `f = jit(g)`: the code of f is g's.
            used = {n.id for s in found for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            inner = [s for scope in [*around, self.tree] for s in _statements_of(scope) if isinstance(s, _Function)]
            found += list(dict.fromkeys(s for s in inner if s.name in used))
        return found

    def is_class(self, member: str) -> bool:
        """Whether a member is a class."""
        return any(isinstance(statement, ast.ClassDef) for statement in self.definitions(member))

    def imported_from(self, member: str, module: str) -> tuple[str, str] | None:
        """Where a member comes from that the source only imports.

        Args:
            member: dotted.
            module: the name of the module that this is the source of.

        Returns:
            The name of the other module and the member there, or None if no `from ... import` binds it.
        """
        name, dot, rest = member.partition(".")
        for origin, alias in self._from_imports(module):
            if (alias.asname or alias.name) == name:
                return origin, alias.name + dot + rest
        return None

    def all_imported_from(self, module: str) -> list[str]:
        """The modules that the source takes everything from, `from ... import *`; the last one wins.

        Args:
            module: the name of the module that this is the source of.
        """
        return [origin for origin, alias in self._from_imports(module) if alias.name == "*"]

    def _from_imports(self, module: str) -> Iterator[tuple[str, ast.alias]]:
        package = module if self.filename.endswith("__init__.py") else module.rpartition(".")[0]
        for statement in _statements_of(self.tree):
            if isinstance(statement, ast.ImportFrom):
                base = package.rsplit(".", statement.level - 1)[0] if statement.level else ""
                for alias in statement.names:
                    yield ".".join(part for part in (base, statement.module) if part), alias

    def member_names(self) -> list[str]:
        """The dotted names of everything that can be patched, for messages."""
        names: list[str] = []

        def walk(scope: ast.AST, prefix: str) -> None:
            for statement in _statements_of(scope):
                if isinstance(statement, _Definition):
                    names.append(prefix + statement.name)
                    if isinstance(statement, ast.ClassDef):
                        walk(statement, prefix + statement.name + ".")

        walk(self.tree, "")
        return names


def home_of(
    member: str,
    module: str,
    source: SourceText,
    source_of: Callable[[str], SourceText],
    seen: frozenset[tuple[str, str]] = frozenset(),
) -> tuple[str, str] | None:
    """The module that defines a member which another one has, and the member's name there.

    A package often only passes on what a submodule of a subpackage defines: `from ... import` is followed, to the end.

    Args:
        member: dotted.
        module: the name of a module that has it.
        source: that module's source.
        source_of: gives other modules' source.
        seen: modules and members that the trail has passed; modules may import from each other.

    Returns:
        Module and member; where the trail ends without a definition, its end; None if there is no trail.

    Raises:
        SourceError: a module on the way has no source.
    """
    if source.definitions(member):
        return module, member
    if (module, member) in seen:
        return None
    seen |= {(module, member)}
    origin = source.imported_from(member, module)
    if origin is not None and origin[0] != module:
        return home_of(origin[1], origin[0], source_of(origin[0]), source_of, seen) or origin
    for other in reversed(source.all_imported_from(module)):
        try:
            home = home_of(member, other, source_of(other), source_of, seen)
        except (SourceError, ImportError):  # It may be one of several that a `try` chooses from.
            continue
        if home is not None:
            return home
    return None


def _statements_of(scope: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run in a scope itself: inside its `if`, `try` and `with`, and not inside its definitions."""
    for _, value in ast.iter_fields(scope):
        for item in value if isinstance(value, list) else []:
            if isinstance(item, ast.stmt):
                yield item
                if not isinstance(item, _Definition):
                    yield from _statements_of(item)
            elif isinstance(item, ast.ExceptHandler | ast.match_case):
                yield from _statements_of(item)


def _defines(statement: ast.stmt, name: str, *, assignments: bool) -> bool:
    if isinstance(statement, _Definition):
        return statement.name == name
    if assignments and isinstance(statement, ast.Assign):
        bound = (node for target in statement.targets for node in ast.walk(target))
        return any(isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id == name for n in bound)
    if assignments and isinstance(statement, ast.AnnAssign):
        return isinstance(statement.target, ast.Name) and statement.target.id == name
    return False


def lines_inside_strings(tree: ast.AST) -> frozenset[int]:
    """Lines of a tree's source that begin inside a string literal."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)):
            inside.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    return frozenset(inside)

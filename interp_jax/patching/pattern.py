"""Patterns: Python source with metavariables, as syntax trees that remember where they were written.

`$x` stands for one expression (or one identifier: `def $f(...)`, `self.$name`), `$...xs` for a run of arguments, of
elements or of statements. Neither is Python, so before parsing `$x` becomes an identifier with an odd first letter and
`$...xs` a starred expression of it, both of *the same length*: columns in errors and in the tree need no translation.
`$` inside string literals and comments is left alone.

A starred expression is legal in exactly the places where a run can stand: among call arguments (after keyword
arguments, too), list elements, parameters, base classes, and, for the parser, as a statement of its own.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator

from interp_jax.patching.errors import PatternSyntaxError

_MARK = "ʘ"  # A letter to Python, unchanged by identifier normalisation, and in nobody's code.
_RUN_MARK = _MARK * 3

_TOKENS = re.compile(
    r"""(?P<skip>'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|\#[^\n]*)"""
    r"""|\$(?P<run>\.\.\.)?(?P<name>[^\W\d]\w*)""",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a piece of patch text was written."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    def below(self, lines: int) -> "Origin":
        """The place so many lines further down."""
        return Origin(self.path, self.line + lines)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One `before` or `after`, parsed."""

    text: str
    """As written, dedented, without blank lines around it."""
    python: str
    """The same with metavariables turned into identifiers; equal in length, character for character."""
    body: tuple[ast.stmt, ...]
    origin: Origin

    @property
    def expression(self) -> ast.expr | None:
        """The expression, if the pattern is nothing but one."""
        if len(self.body) == 1 and isinstance(self.body[0], ast.Expr):
            value = self.body[0].value
            return None if isinstance(value, ast.Starred) else value
        return None

    def metavariables(self) -> set[str]:
        """The names of all metavariables in it, as they are bound: `x` or `...x`."""
        return {("..." if m["run"] else "") + m["name"] for m in _TOKENS.finditer(self.text) if m["name"]}


def parse_pattern(text: str, origin: Origin) -> Pattern:
    """Parses one `before` or `after`.

    Args:
        text: Python source with metavariables; may be indented as a whole, may be empty.
        origin: where the text's first line was written.

    Returns:
        The pattern.

    Raises:
        PatternSyntaxError: the text is not Python; names file and line and shows the place with a caret.
    """
    clean, skipped = _dedented(text)
    origin = origin.below(skipped)
    if _MARK in clean:
        raise PatternSyntaxError(
            f"{origin}: the letter {_MARK!r} is reserved for metavariables; spell the name otherwise."
        )
    python = _TOKENS.sub(_encode, clean)
    try:
        tree = ast.parse(python)
    except SyntaxError as error:
        line, column = error.lineno or 1, error.offset or 1
        shown = clean.split("\n")
        source = shown[min(line, len(shown)) - 1]
        raise PatternSyntaxError(
            f"{origin.below(line - 1)}: the pattern is not Python: {error.msg}\n    {source}\n    {' ' * (column - 1)}^"
        ) from None
    return Pattern(clean, python, tuple(tree.body), origin)


def _dedented(text: str) -> tuple[str, int]:
    """A text without blank lines around it and without the indentation that its lines share, and how many lines went
    above it. What is inside string literals stays as it is."""
    inside = {
        line
        for found in _TOKENS.finditer(text)
        for line in range(text.count("\n", 0, found.start()) + 1, text.count("\n", 0, found.end()) + 1)
    }
    lines = text.split("\n")
    code = {i: line.lstrip() for i, line in enumerate(lines) if i not in inside}
    depth = {i: len(lines[i][: len(lines[i]) - len(rest)].expandtabs()) for i, rest in code.items() if rest}
    margin = min(depth.values(), default=0)
    for i, rest in code.items():
        lines[i] = " " * (depth[i] - margin) + rest if rest else ""
    filled = [i for i, line in enumerate(lines) if line.strip()]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    return "\n".join(lines[first:last]), first


def _encode(found: re.Match[str]) -> str:
    if found["name"] is None:
        return found[0]
    return ("*" + _RUN_MARK if found["run"] else _MARK) + found["name"]


def as_metavariable(name: str) -> str:
    """The identifier that stands for `$name` in a pattern's tree."""
    return _MARK + name


def metavariable(node: object) -> str | None:
    """The name that a pattern node binds (`x` for `$x`), or None for an ordinary node. An identifier is a node, too."""
    name = node.id if isinstance(node, ast.Name) else node
    if isinstance(name, str) and name.startswith(_MARK) and not name.startswith(_RUN_MARK):
        return name.removeprefix(_MARK)
    return None


def run_metavariable(node: object) -> str | None:
    """The name that a run binds (`...xs` for `$...xs`), or None."""
    if isinstance(node, ast.Expr):
        node = node.value
    if isinstance(node, ast.Starred) and isinstance(node.value, ast.Name) and node.value.id.startswith(_RUN_MARK):
        return "..." + node.value.id.removeprefix(_RUN_MARK)
    if isinstance(node, ast.arg) and node.arg.startswith(_RUN_MARK):
        return "..." + node.arg.removeprefix(_RUN_MARK)
    return None


def placeholders(python: str) -> Iterator[tuple[int, int, str]]:
    """Where metavariables stand in a pattern's `python` text: (start, end, name as bound), in order."""
    # Strings and comments may hold the mark only if the user wrote it, which parse_pattern refuses.
    for found in re.finditer(rf"(\*{_RUN_MARK}|{_MARK})(\w+)", python):
        # \w+ is greedy and the mark is a letter, so a run is always taken by the first alternative.
        yield found.start(), found.end(), ("..." if found[1].startswith("*") else "") + found[2]

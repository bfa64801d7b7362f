"""Matching patterns on syntax trees.

Two nodes match if they are of one kind and their parts match; layout, comments, quotes and the load/store distinction
do not count, so a pattern that is a target in one place and a value in another matches both. The arguments of a call
are one sequence in the order in which they are written, keyword arguments included, so `f($...before, dtype=$t,
$...after)` says what it seems to say.

A metavariable that occurs twice must bind equal code both times. Runs are tried shortest first.
"""

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from interp_jax.patching.pattern import Pattern, metavariable, run_metavariable

Bindings = dict[str, Any]
"""Metavariable name to the node, the identifier or (a run) the list of nodes that it stands for."""

# Nothing a program does depends on these.
_IGNORED = frozenset({"ctx", "type_comment", "type_ignores", "kind"})


@dataclasses.dataclass(frozen=True)
class Match:
    """One place where a pattern fits."""

    nodes: tuple[ast.AST, ...]
    """One expression, or contiguous statements of one block."""
    bindings: Bindings


def find(pattern: Pattern, roots: Sequence[ast.AST], *, as_expression: bool) -> list[Match]:
    """Finds all places where a pattern fits, in the order of the source.

    Args:
        pattern: what to look for.
        roots: the trees to look in, themselves included.
        as_expression: match the pattern's expression anywhere an expression stands, and not as a statement.

    Returns:
        The matches. Those of statements do not overlap one another; an expression may match inside another match.
    """
    found: list[Match] = []
    for root in roots:
        if as_expression:
            expression = pattern.expression
            assert expression is not None
            for node in _expressions(root):
                for bindings in _match(expression, node, {}):
                    found.append(Match((node,), bindings))
                    break
        else:
            found += _find_statements(pattern.body, root)
    found.sort(key=lambda match: _position(match.nodes[0]))
    return found


def _is_expression(node: Any) -> bool:
    return isinstance(node, ast.expr) and not isinstance(node, ast.Starred | ast.FormattedValue)


def _expressions(root: ast.AST) -> Iterator[ast.expr]:
    """All expressions that stand in an expression's place, which the parts of an f-string are not: only what is in
    its braces."""
    if isinstance(root, ast.expr):
        yield root
    for field, value in ast.iter_fields(root):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(root, ast.JoinedStr) and isinstance(child, ast.Constant):
                continue
            if isinstance(child, ast.AST):
                inside = _expressions(child)
                is_part = isinstance(root, ast.JoinedStr) or field == "format_spec"
                yield from (node for node in inside if not (is_part and node is child))


def _find_statements(body: Sequence[ast.stmt], root: ast.AST) -> Iterator[Match]:
    blocks: list[list[ast.stmt]] = [[root]] if isinstance(root, ast.stmt) else []
    for node in ast.walk(root):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                blocks.append(value)
    for block in blocks:
        start = 0
        while start < len(block):
            for bindings, end in _match_run(body, block, start, {}):
                if end > start:
                    yield Match(tuple(block[start:end]), bindings)
                    start = end - 1
                    break
            start += 1


def _match_run(
    patterns: Sequence[ast.AST], nodes: Sequence[ast.AST], start: int, bindings: Bindings
) -> Iterator[tuple[Bindings, int]]:
    """Matches all `patterns` against `nodes[start:end]` for any end; yields the bindings and the end."""
    if not patterns:
        yield bindings, start
        return
    run = run_metavariable(patterns[0])
    if run is None:
        if start < len(nodes):
            for bound in _match(patterns[0], nodes[start], bindings):
                yield from _match_run(patterns[1:], nodes, start + 1, bound)
        return
    # A run at the very end of a statement pattern takes all that is left in the block: the shortest would be nothing.
    ends = range(start, len(nodes) + 1) if len(patterns) > 1 else [len(nodes)]
    for end in ends:
        for bound in _bind(run, list(nodes[start:end]), bindings):
            yield from _match_run(patterns[1:], nodes, end, bound)


def _match_all(patterns: Sequence[Any], nodes: Sequence[Any], bindings: Bindings) -> Iterator[Bindings]:
    for bound, end in _match_run(patterns, nodes, 0, bindings):
        if end == len(nodes):
            yield bound


def _match(pattern: Any, node: Any, bindings: Bindings) -> Iterator[Bindings]:
    if isinstance(pattern, ast.Name | str):
        name = metavariable(pattern)
        if name is not None:
            if isinstance(node, str) if isinstance(pattern, str) else _is_expression(node):
                yield from _bind(name, node, bindings)
            return
    if isinstance(pattern, list):
        if isinstance(node, list):
            yield from _match_all(pattern, node, bindings)
        return
    if not isinstance(pattern, ast.AST):
        # 1, 1.0 and True are equal and not the same; nan is the same and not equal.
        is_number = isinstance(pattern, float | complex)
        if type(pattern) is type(node) and (repr(pattern) == repr(node) if is_number else pattern == node):
            yield bindings
        return
    if type(pattern) is not type(node):
        return
    if isinstance(pattern, ast.Constant) and type(pattern.value) is not type(node.value):
        return
    if isinstance(pattern, ast.arguments) and _only_run(pattern) is not None:
        yield from _bind(_only_run(pattern) or "", node, bindings)
        return
    yield from _match_fields(list(_parts(pattern)), list(_parts(node)), bindings)


def _match_fields(patterns: list[Any], nodes: list[Any], bindings: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bindings
        return
    for bound in _match(patterns[0], nodes[0], bindings):
        yield from _match_fields(patterns[1:], nodes[1:], bound)


def _parts(node: ast.AST) -> Iterator[Any]:
    if isinstance(node, ast.Call):
        yield node.func
        yield arguments_in_order(node)
    elif isinstance(node, ast.ClassDef):
        yield node.name
        yield arguments_in_order(node)
        yield node.decorator_list
        yield node.body
    else:
        for field in node._fields:
            if field not in _IGNORED:
                yield getattr(node, field, None)


def arguments_in_order(node: ast.Call | ast.ClassDef) -> list[ast.AST]:
    """The positional and keyword arguments of a call (or bases of a class) in the order in which they are written."""
    positional = node.args if isinstance(node, ast.Call) else node.bases
    return sorted([*positional, *node.keywords], key=_position)


def _only_run(arguments: ast.arguments) -> str | None:
    """`def f($...params)`: the run that stands for the whole parameter list."""
    alone = not (arguments.posonlyargs or arguments.args or arguments.kwonlyargs or arguments.kwarg)
    return run_metavariable(arguments.vararg) if alone and arguments.vararg else None


def _bind(name: str, value: Any, bindings: Bindings) -> Iterator[Bindings]:
    if name not in bindings:
        yield {**bindings, name: value}
    elif equal(bindings[name], value):
        yield bindings


def equal(a: Any, b: Any) -> bool:
    """Whether two trees (or lists of trees) are the same code, position, layout and load/store aside."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, ast.AST) and type(a) is type(b):
        fields = [field for field in a._fields if field not in _IGNORED]
        return all(equal(getattr(a, field, None), getattr(b, field, None)) for field in fields)
    return type(a) is type(b) and repr(a) == repr(b)


def _position(node: ast.AST) -> tuple[int, int]:
    return (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))

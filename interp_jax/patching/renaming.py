"""Matching up to a rename: the code that a pattern would match if some identifiers were called otherwise.

Every identifier of the pattern becomes a metavariable, so that the ordinary matcher tells what each is called in the
source. Of the places found, the one that needs the fewest new names is the answer, provided that there is one such and
that most names are what they were: with all of them free, `self.mlp(x)` is any method call.
"""

import ast
import copy
import dataclasses
import io
import tokenize
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from interp_jax.patching.matching import Match, find
from interp_jax.patching.pattern import Pattern, as_metavariable, metavariable, run_metavariable

# Where identifiers stand in the tree, and what kind of name each is. The same letters may be an attribute here and a
# variable there; only one of them may have been renamed.
_FIELDS: dict[type[ast.AST], dict[str, str]] = {
    ast.Name: {"id": "name"},
    ast.Attribute: {"attr": "attribute"},
    ast.keyword: {"arg": "keyword"},
    ast.arg: {"arg": "parameter"},
    ast.FunctionDef: {"name": "definition"},
    ast.AsyncFunctionDef: {"name": "definition"},
    ast.ClassDef: {"name": "definition"},
}
_SEPARATOR = "ʘ"  # Between kind and name; a user's own metavariables cannot hold it.


@dataclasses.dataclass(frozen=True)
class Renaming:
    """What identifiers are called in the source, by kind: variables, attributes, keywords."""

    variables: Mapping[str, str]
    attributes: Mapping[str, str]
    keywords: Mapping[str, str]

    def apply(self, pattern: Pattern) -> str:
        """The pattern's text with the source's names."""
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(pattern.python).readline) if t.string.strip()]
        starts = [0]
        for line in pattern.python.split("\n"):
            starts.append(starts[-1] + len(line) + 1)
        text, depth = pattern.text, 0
        changes: list[tuple[int, int, str]] = []
        for i, token in enumerate(tokens):
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token.string, 0)
            if token.type != tokenize.NAME:
                continue
            before = tokens[i - 1].string if i else ""
            after = tokens[i + 1].string if i + 1 < len(tokens) else ""
            kind = self.attributes if before == "." else self.keywords if depth and after == "=" else self.variables
            start = starts[token.start[0] - 1] + token.start[1]
            changes.append((start, start + len(token.string), kind.get(token.string, token.string)))
        for start, end, name in reversed(changes):
            if pattern.python[start:end] != name:
                text = text[:start] + name + text[end:]
        return text

    def __str__(self) -> str:
        keywords = {old: new for old, new in self.keywords.items() if self.variables.get(old) != new}
        kinds = (("", self.variables), (".", self.attributes), ("", keywords))
        return ", ".join(f"{dot}{old} is now {dot}{new}" for dot, names in kinds for old, new in names.items())


def find_renamed(
    pattern: Pattern, roots: Sequence[ast.AST], count: int, taken: Collection[ast.AST], *, as_expression: bool
) -> tuple[list[Match], Renaming] | None:
    """Finds where a pattern fits up to a rename, if that is clear.

    Args:
        pattern: what to look for.
        roots: the trees to look in.
        count: how many places it must fit with one and the same renaming.
        taken: nodes that others have matched as they are, which nobody has renamed.
        as_expression: as for `find`.

    Returns:
        The places and the renaming, or None: nowhere, or in several ways with as few new names.
    """
    free = _with_free_names(pattern)
    found: dict[tuple[tuple[str, str], ...], list[Match]] = {}
    for match in find(free, roots, as_expression=as_expression):
        if any(node in taken for node in match.nodes):
            continue
        names = _names(match.bindings)
        if names is not None:
            found.setdefault(tuple(sorted(names.items())), []).append(match)
    best = sorted((_changed(names), names) for names, matches in found.items() if len(matches) == count)
    if not best or (len(best) > 1 and best[1][0] == best[0][0]):
        return None
    changed, names = best[0]
    if not 0 < changed <= max(1, len(names) // 2):
        return None
    by_kind: dict[str, dict[str, str]] = {"name": {}, "attribute": {}, "keyword": {}}
    for key, new in names:
        kind, old = key.split(_SEPARATOR, 1)
        if old != new:
            target = by_kind[kind if kind in by_kind else "name"]
            if target.setdefault(old, new) != new:
                return None
    return found[names], Renaming(by_kind["name"], by_kind["attribute"], by_kind["keyword"])


def _with_free_names(pattern: Pattern) -> Pattern:
    body = copy.deepcopy(pattern.body)
    for statement in body:
        for node in ast.walk(statement):
            for field, kind in _FIELDS.get(type(node), {}).items():
                name = getattr(node, field)
                if name is not None and metavariable(name) is None and run_metavariable(_as_node(node, name)) is None:
                    setattr(node, field, as_metavariable(kind + _SEPARATOR + name))
    return dataclasses.replace(pattern, body=body)


def _as_node(node: ast.AST, name: str) -> ast.AST:
    return node if isinstance(node, ast.arg) else ast.Starred(ast.Name(name))


def _names(bindings: Mapping[str, Any]) -> dict[str, str] | None:
    """What the identifiers are called in the source; None where one of them is not an identifier there."""
    names: dict[str, str] = {}
    for key, value in bindings.items():
        if _SEPARATOR not in key:
            continue
        name = value.id if isinstance(value, ast.Name) else value
        if not isinstance(name, str):
            return None
        names[key] = name
    kinds = [(key.split(_SEPARATOR, 1)[0], new) for key, new in names.items()]
    return names if len(set(kinds)) == len(kinds) else None


def _changed(names: Sequence[tuple[str, str]]) -> int:
    return sum(key.split(_SEPARATOR, 1)[1] != new for key, new in names)

"""Matching up to a rename: the code that a pattern would match if some identifiers were called otherwise.

Every identifier of the pattern becomes a metavariable, so that the ordinary matcher tells what each is called in the
source. Of the places found, the one that needs the fewest new names is the answer, provided that there is one such and
that it is a rename beyond doubt, as a wrong proposal is worse than none:

- as many names are what they were as are new, `self` aside, or the new ones resemble the old: with its names free,
  `self.embed(x)` is any method call;
- no new name is one that the pattern has already: `k = self.k(x)` above `v = self.v(x)`, the other way round, is no
  rename of `k` to `v`, though it looks like one;
- the pair's new text, read again, is the old one with other names. Text inside f-strings, for one, is not renamed.
"""

import ast
import copy
import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from interp_jax.patching.errors import PatternSyntaxError
from interp_jax.patching.matching import Match, equal, find
from interp_jax.patching.pattern import Pattern, as_metavariable, metavariable, parse_pattern, run_metavariable
from interp_jax.patching.source_text import SourceText

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

    def apply(self, pattern: Pattern) -> str | None:
        """The pattern's text with the source's names.

        None where it cannot be written, or has one of the new names for something of its own.
        """
        kinds = {"name": self.variables, "parameter": self.variables, "definition": self.variables}
        kinds |= {"attribute": self.attributes, "keyword": self.keywords}
        source = SourceText(pattern.python, pattern.origin.path)
        body = copy.deepcopy(list(pattern.body))
        changes: list[tuple[int, int, str]] = []
        for node, field, kind in _identifiers(body):
            old = getattr(node, field)
            new = kinds[kind].get(old, old)
            if old == new and old in kinds[kind].values():
                return None
            if old != new:
                setattr(node, field, new)
                start = _place(source, node, old)
                changes.append((start, start + len(old), new))
        text = pattern.text
        for start, end, new in sorted(changes, reverse=True):
            text = text[:start] + new + text[end:]
        try:
            written = parse_pattern(text, pattern.origin).body
        except PatternSyntaxError:
            return None
        return text if equal(body, list(written)) else None

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
    names = best[0][1]
    if not _is_beyond_doubt(names):
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
    for node, field, kind in _identifiers(body):
        setattr(node, field, as_metavariable(kind + _SEPARATOR + getattr(node, field)))
    return dataclasses.replace(pattern, body=body)


def _identifiers(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.AST, str, str]]:
    """Node, field and kind of each identifier that is no metavariable."""
    for statement in body:
        for node in ast.walk(statement):
            for field, kind in _FIELDS.get(type(node), {}).items():
                name = getattr(node, field)
                if name is not None and metavariable(name) is None and run_metavariable(_as_node(node, name)) is None:
                    yield node, field, kind


def _place(source: SourceText, node: Any, name: str) -> int:
    start, end = source.span(node)
    if isinstance(node, ast.Attribute):
        return end - len(name)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        keyword = re.compile(r"(async\s+def|def|class)\s+").match(
            source.text, source.offset(node.lineno, node.col_offset)
        )
        return keyword.end() if keyword else start
    return start


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


def _is_beyond_doubt(names: Sequence[tuple[str, str]]) -> bool:
    pairs = [(*key.split(_SEPARATOR, 1), new) for key, new in names]
    changed = [(kind, old, new) for kind, old, new in pairs if old != new]
    already = {(kind, old) for kind, old, _ in pairs}
    if not changed or any((kind, new) in already for kind, _, new in changed):
        return False
    kept = [old for _, old, new in pairs if old == new and old not in ("self", "cls")]
    return len(changed) <= len(kept) or all(_resemble(old, new) for _, old, new in changed)


def _resemble(old: str, new: str) -> bool:
    return difflib.SequenceMatcher(None, old, new, autojunk=False).ratio() > 0.6


def _changed(names: Sequence[tuple[str, str]]) -> int:
    return sum(key.split(_SEPARATOR, 1)[1] != new for key, new in names)

"""Rewriting source text: matched code out, the replacement in, everything else untouched.

The work is done on the *text*, so what is not replaced keeps its comments and its layout to the letter; and once more
on the *tree*, by plain substitution of nodes. Both must come to the same program (`rewrite` compares them), so a
missing pair of parentheses or a lost indentation can never change a meaning silently.

Text travels as pieces that remember where they came from: the place in the module's source, or the line of the patch.
The layout (layout.py) needs this to give every kept line its old number.
"""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from interp_jax.patching.errors import ConflictError, PatternSyntaxError
from interp_jax.patching.matching import Match, arguments_in_order
from interp_jax.patching.pattern import Origin, Pattern, metavariable, placeholders, run_metavariable
from interp_jax.patching.source_text import SourceText, lines_inside_strings

_ATOMS = (
    ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.List, ast.Dict, ast.Set,
    ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Edit:
    """One match and what stands there instead."""

    match: Match
    after: Pattern
    is_expression: bool
    label: str
    """Which pair this is, for messages."""
    start: int
    """Where the matched text starts, in characters of the module's source."""
    end: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of new text that is all from one place."""

    text: str
    source: int | None
    """Index in the module's source, or None."""
    origin: Origin | None
    """Line of the patch that the text starts on, or None."""


def make_edit(source: SourceText, match: Match, after: Pattern, *, is_expression: bool, label: str) -> Edit:
    """Says where in the text a match stands."""
    return Edit(match, after, is_expression, label, source.span(match.nodes[0])[0], source.span(match.nodes[-1])[1])


def check_conflicts(source: SourceText, edits: Sequence[Edit]) -> None:
    """Refuses edits that overlap, unless one lies wholly inside code that the other carries over.

    Raises:
        ConflictError: names both pairs and the line.
    """
    ordered = sorted(edits, key=lambda edit: (edit.start, -edit.end))
    for i, outer in enumerate(ordered):
        for inner in ordered[i + 1 :]:
            if inner.start >= outer.end:
                break
            if not any(start <= inner.start and inner.end <= end for start, end in _carried_over(source, outer)):
                line = source.line_at(inner.start)
                raise ConflictError(
                    f"{source.filename}:{line}: two patches rewrite the same code: {outer.label} and {inner.label}. "
                    "Join them in one pair, or match less with one of them."
                )


def _carried_over(source: SourceText, edit: Edit) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for name in edit.after.metavariables():
        span = _bound_span(source, edit.match.bindings.get(name))
        if span is not None:
            spans.append(span)
    return spans


def _bound_span(source: SourceText, bound: Any) -> tuple[int, int] | None:
    if isinstance(bound, ast.arguments):
        return _parameters_span(source, bound)
    if isinstance(bound, list) and bound:
        return source.balanced(source.span(bound[0])[0], source.span(bound[-1])[1])
    return source.span(bound) if isinstance(bound, ast.AST) else None


def _parameters_span(source: SourceText, bound: ast.arguments) -> tuple[int, int] | None:
    """The text between a definition's parentheses: stars and slashes are no nodes."""
    spans = sorted(source.span(node) for node in ast.iter_child_nodes(bound))
    return source.between_brackets(spans[0][0], max(end for _, end in spans)) if spans else None


# ------------------------------------------------------------------ text


class TextRewriter:
    """Renders the module's new text as pieces."""

    def __init__(self, source: SourceText, edits: Sequence[Edit]):
        self.source = source
        self._edits = sorted(edits, key=lambda edit: (edit.start, -edit.end))
        self._parents = {child: parent for parent in ast.walk(source.tree) for child in ast.iter_child_nodes(parent)}
        self._removed = {node for edit in edits if not edit.after.body for node in edit.match.nodes}
        self._under_way: list[Edit] = []

    def render(self, start: int, end: int) -> list[Piece]:
        """The text from `start` to `end` with all edits in it made."""
        pieces: list[Piece] = []
        at = start
        for edit in self._edits:
            # What an edit carries over may start or end where the edit itself does.
            if edit in self._under_way or edit.start < at or edit.end > end:
                continue
            pieces += self._kept(at, edit.start)
            self._under_way.append(edit)
            pieces += self._replacement(edit)
            self._under_way.pop()
            at = edit.end
        return pieces + self._kept(at, end)

    def _kept(self, start: int, end: int) -> list[Piece]:
        return [Piece(self.source.text[start:end], start, None)] if end > start else []

    def _replacement(self, edit: Edit) -> list[Piece]:
        if edit.is_expression:
            line = self.source.lines[self.source.line_at(edit.start) - 1]
            pieces = self._template(edit, indent=line[: len(line) - len(line.lstrip())])
            in_braces = isinstance(self._parents.get(edit.match.nodes[0]), ast.FormattedValue)
            doubled = in_braces and pieces[0].text.startswith("{")  # Two braces in an f-string are a brace.
            needed = doubled or self._needs_parentheses(edit) or not _is_closed(pieces)
            return _parenthesised(pieces) if needed else pieces
        return self._statements(edit)

    def _needs_parentheses(self, edit: Edit) -> bool:
        node = edit.match.nodes[0]
        expression = edit.after.expression
        if isinstance(node, ast.GeneratorExp) and self.source.text[edit.start] == "(":
            parent = self._parents.get(node)
            if isinstance(parent, ast.Call) and self.source.span(parent)[1] == edit.end:
                return True  # A lone generator argument's parentheses are the call's.
        if isinstance(expression, ast.Name) and metavariable(expression):
            expression = edit.match.bindings.get(metavariable(expression) or "")
        if isinstance(expression, (*_ATOMS, ast.Constant)) and not isinstance(expression, ast.GeneratorExp):
            is_number = isinstance(expression, ast.Constant) and not isinstance(expression.value, str)
            return is_number and isinstance(self._parents.get(node), ast.Attribute)
        if isinstance(expression, ast.GeneratorExp):
            return False
        parent = self._parents.get(node)
        return "\n" in edit.after.text or expression is None or not _stands_alone(expression, node, parent)

    def _statements(self, edit: Edit) -> list[Piece]:
        source = self.source
        line_start = source.line_start(edit.start)
        alone = source.is_first_on_line(edit.start) and not self._shares_its_end(edit)
        indent = source.text[line_start : edit.start] if source.is_first_on_line(edit.start) else None
        if not edit.after.body:
            if source.text.startswith("elif", edit.start):
                return [Piece("else: pass", None, edit.after.origin)]
            if not alone or self._empties_block(edit):
                return [Piece("pass", None, edit.after.origin)]
            return []
        if not alone:
            compound = any(hasattr(statement, "body") for statement in edit.after.body)
            runs = any(run_metavariable(statement) for statement in edit.after.body)
            if compound or runs or any(statement.lineno != statement.end_lineno for statement in edit.after.body):
                if self._is_all_after_a_colon(edit):
                    deeper = self._indentation_of_parent(edit) + "    "
                    return [Piece("\n" + deeper, None, None), *self._template(edit, indent=deeper)]
                raise ConflictError(
                    f"{source.filename}:{source.line_at(edit.start)}: {edit.label} matches a statement that "
                    f"shares its line "
                    "with others, and its replacement does not fit on one line. Match the statement around it."
                )
            pieces = self._template(edit, indent="")
            return [Piece("; ", None, None) if piece.text == "\n" else piece for piece in pieces]
        assert indent is not None
        if source.text.startswith("elif", edit.start):
            deeper = indent + "    "
            return [Piece("else:\n" + deeper, None, edit.after.origin), *self._template(edit, indent=deeper)]
        return self._template(edit, indent=indent)

    def _shares_its_end(self, edit: Edit) -> bool:
        source = self.source
        return source.text[edit.end :].lstrip(" \t").startswith(";")

    def _is_all_after_a_colon(self, edit: Edit) -> bool:
        """Whether it is the whole block of `if x: y`."""
        return self.source.text[: edit.start].rstrip(" \t").endswith(":") and not self._shares_its_end(edit)

    def _indentation_of_parent(self, edit: Edit) -> str:
        parent = self._parents[edit.match.nodes[0]]
        at = self.source.span(parent)[0] if hasattr(parent, "lineno") else edit.start  # A `case` has no place.
        line = self.source.lines[self.source.line_at(at) - 1]
        return line[: len(line) - len(line.lstrip())]

    def _empties_block(self, edit: Edit) -> bool:
        parent = self._parents.get(edit.match.nodes[0])
        for _, block in ast.iter_fields(parent) if parent else []:
            if isinstance(block, list) and block and block[0] is edit.match.nodes[0]:
                return all(statement in self._removed for statement in block)
        return False

    def _template(self, edit: Edit, indent: str | None) -> list[Piece]:
        """The replacement's text with what was bound put in; `indent` goes before every line but the first."""
        after = edit.after
        inside_strings = lines_inside_strings(ast.Module(list(after.body), []))
        parents = {c: p for s in after.body for p in ast.walk(s) for c in ast.iter_child_nodes(p)}
        names = {_offset(after.python, n): n for n in parents if isinstance(n, ast.Name | ast.Starred)}
        pieces: list[Piece] = []
        at = 0
        line = 0

        def literal(text: str) -> None:
            nonlocal line
            parts = text.split("\n")
            for i, part in enumerate(parts):
                if i:
                    line += 1
                    pad = indent if indent and line + 1 not in inside_strings and (part or i == len(parts) - 1) else ""
                    pieces.append(Piece("\n" + (pad or ""), None, None))
                if part:
                    pieces.append(Piece(part, None, after.origin.below(line)))

        for start, end, name in placeholders(after.python):
            bound = edit.match.bindings[name]
            line_start = after.python.rfind("\n", 0, start) + 1
            lead = after.python[line_start:start]
            if isinstance(bound, list) and (not bound or isinstance(bound[0], ast.stmt)):
                parent = parents[names[start]] if start in names else None
                if isinstance(parent, ast.Expr):
                    own = lead[: len(lead) - len(lead.lstrip())]
                    literal(after.python[at:start].rstrip(" ") if lead.strip() else after.python[at:start])
                    if lead.strip():  # `for x in y: $...body`
                        own += "    "
                        pieces.append(Piece("\n" + (indent or "") + own, None, None))
                    pieces += self._block(edit, bound, (indent or "") + own, after)
                    at = end
                    continue
            literal(after.python[at:start])
            at = end
            if isinstance(bound, str):
                pieces.append(Piece(bound, None, after.origin.below(line)))
            elif name.startswith("..."):
                if not bound:
                    # Nothing was bound: the comma goes as well.
                    rest = after.python[end:]
                    stripped = rest.lstrip()
                    if stripped.startswith(","):
                        at = end + len(rest) - len(stripped) + 1
                        while at < len(after.python) and after.python[at] == " ":
                            at += 1
                    else:
                        _drop_trailing_comma(pieces)
                    continue
                span = _bound_span(self.source, bound)
                if span is not None:
                    pieces += self.render(*span)
            else:
                expression: ast.expr = bound  # pyright: ignore[reportAssignmentType]
                rendered = self.render(*self.source.span(expression))
                whole = after.expression is not None and isinstance(after.expression, ast.Name)
                if start in names and isinstance(around := parents.get(names[start]), ast.Subscript):
                    whole = whole or (
                        names[start] is around.slice and not isinstance(expression, ast.Yield | ast.YieldFrom)
                    )
                bare = isinstance(expression, _ATOMS) or (isinstance(expression, ast.Constant) and lead[-1:] != ".")
                number = isinstance(expression, ast.Constant) and after.python[end : end + 1] == "."
                if start in names and "\n" not in self.source.text[slice(*self.source.span(expression))]:
                    bare = bare or _stands_alone(expression, names[start], parents.get(names[start]))
                fits = whole or (bare and not number and _is_closed(rendered))
                pieces += rendered if fits else _parenthesised(rendered)
        literal(after.python[at:])
        return pieces

    def _block(self, edit: Edit, bound: list[ast.stmt], indent: str, after: Pattern) -> list[Piece]:
        """Statements that a run bound, moved to another indentation where need be."""
        if not bound:
            return [Piece("pass", None, after.origin)]
        source = self.source
        start, end = source.span(bound[0])[0], source.span(bound[-1])[1]
        if not source.is_first_on_line(start):
            return self.render(start, end)
        old = source.text[source.line_start(start) : start]
        # Comments right above the first statement belong to it.
        first_line = source.line_at(start)
        while source.line_start(start) > edit.start and source.lines[first_line - 2].strip().startswith("#"):
            first_line -= 1
            start = source.offset(first_line, 0)
        start += len(source.text[start:end]) - len(source.text[start:end].lstrip())
        rendered = self.render(start, end)
        if isinstance(bound[0], ast.If) and rendered[0].source == start and rendered[0].text.startswith("elif"):
            rendered[0] = Piece(rendered[0].text[2:], start + 2, None)
        return rendered if old == indent else self._reindented(rendered, old, indent)

    def _reindented(self, pieces: list[Piece], old: str, new: str) -> list[Piece]:
        moved: list[Piece] = []
        fresh_line = False
        for piece in pieces:
            at = 0
            for i, part in enumerate(piece.text.split("\n")):
                if i:
                    moved.append(Piece("\n", None if piece.source is None else piece.source + at - 1, None))
                    fresh_line = True
                text, source = part, None if piece.source is None else piece.source + at
                if fresh_line and part:
                    in_string = source is not None and self.source.line_at(source) in self.source.lines_inside_strings
                    if not in_string and part.startswith(old):
                        moved.append(Piece(new, None, None))
                        text = part[len(old) :]
                        source = None if source is None else source + len(old)
                    fresh_line = False
                if text:
                    moved.append(Piece(text, source, piece.origin))
                at += len(part) + 1
        return moved


def _offset(text: str, node: ast.expr) -> int:
    lines = text.split("\n")
    column = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
    return sum(len(line) + 1 for line in lines[: node.lineno - 1]) + column


def _stands_alone(expression: ast.expr, place: ast.AST, parent: ast.AST | None) -> bool:
    """Whether an expression needs no parentheses in a place, whatever its operators are: between commas, after `=`."""
    if isinstance(expression, ast.Tuple | ast.Yield | ast.YieldFrom | ast.NamedExpr | ast.Starred):
        return False
    alone = (ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.keyword, ast.List, ast.Set, ast.Call)
    return isinstance(parent, alone) and place is not getattr(parent, "func", None)


def _is_closed(pieces: list[Piece]) -> bool:
    """Whether all line ends of an expression are inside brackets or strings of its own."""
    text = "".join(piece.text for piece in pieces)
    if "\n" not in text:
        return True
    try:
        ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    return True


def _parenthesised(pieces: list[Piece]) -> list[Piece]:
    origin = next((piece.origin for piece in pieces if piece.origin), None)
    return [Piece("(", None, origin), *pieces, Piece(")", None, origin)]


def _drop_trailing_comma(pieces: list[Piece]) -> None:
    if pieces and pieces[-1].origin and pieces[-1].text.rstrip().endswith(","):
        pieces[-1] = dataclasses.replace(pieces[-1], text=pieces[-1].text.rstrip()[:-1])


# ------------------------------------------------------------------ tree


class TreeRewriter:
    """Makes the same edits by substituting nodes: the program that the new text must be."""

    def __init__(self, edits: Sequence[Edit]):
        self._edits: dict[int, list[Edit]] = {}
        for edit in sorted(edits, key=lambda edit: (edit.start, -edit.end)):
            self._edits.setdefault(id(edit.match.nodes[0]), []).append(edit)
        self._under_way: list[Edit] = []

    def _edit_at(self, node: Any) -> Edit | None:
        return next((edit for edit in self._edits.get(id(node), []) if edit not in self._under_way), None)

    def _made(self, edit: Edit) -> Any:
        self._under_way.append(edit)
        after = edit.after.expression if edit.is_expression else list(edit.after.body)
        made = self.rebuild(after, edit.match.bindings)
        self._under_way.pop()
        return made

    def rebuild(self, node: Any, bindings: dict[str, Any] | None = None) -> Any:
        """A copy of a tree with all edits made; `bindings` are put in where the tree is a pattern."""
        if isinstance(node, list):
            return self._rebuild_list(node, bindings)
        if bindings is not None and isinstance(node, str | ast.Name):
            name = metavariable(node)
            if name is not None:
                return self.rebuild(bindings[name])
        if not isinstance(node, ast.AST):
            return node
        edit = self._edit_at(node) if bindings is None else None
        if edit is not None and edit.is_expression:
            return self._made(edit)
        if bindings is not None and isinstance(node, ast.arguments) and node.vararg:
            run = run_metavariable(node.vararg)
            if run is not None and isinstance(bindings.get(run), ast.arguments):
                return self.rebuild(bindings[run])
        copy = type(node)(**{field: self.rebuild(getattr(node, field, None), bindings) for field in node._fields})
        if isinstance(copy, ast.Call) and isinstance(node, ast.Call) and bindings is not None:
            arguments = self._rebuild_list(arguments_in_order(node), bindings)
            copy.args = [a for a in arguments if not isinstance(a, ast.keyword)]
            copy.keywords = [a for a in arguments if isinstance(a, ast.keyword)]
        return copy

    def _rebuild_list(self, nodes: list[Any], bindings: dict[str, Any] | None) -> list[Any]:
        rebuilt: list[Any] = []
        at = 0
        while at < len(nodes):
            node = nodes[at]
            run = run_metavariable(node) if bindings is not None else None
            edit = self._edit_at(node) if bindings is None else None
            if run is not None and bindings is not None:
                rebuilt += self._rebuild_list(bindings[run], None)
            elif edit is not None and not edit.is_expression:
                rebuilt += self._made(edit)
                at += len(edit.match.nodes) - 1
            else:
                rebuilt.append(self.rebuild(node, bindings))
            at += 1
        return rebuilt


def check_bindings(after: Pattern, before: Pattern) -> None:
    """Refuses a replacement that uses a metavariable which the pattern does not bind.

    Raises:
        PatternSyntaxError: names it, and those that are bound.
    """
    unbound = after.metavariables() - before.metavariables()
    if unbound:
        bound = ", ".join(sorted(f"${name}" for name in before.metavariables())) or "none"
        names = ", ".join(sorted(f"${name}" for name in unbound))
        raise PatternSyntaxError(
            f"{after.origin}: {names} is not bound by the pattern at {before.origin} (bound: {bound})."
        )

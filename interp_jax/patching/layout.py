"""Laying out new text so that every line that was kept has the number that it had.

A function's code object has one file name and one run of line numbers; tools read the text by that name and number (the
`linecache` module). So the patched text must have exactly as many lines as the source, with each kept line in its old
place: then a traceback, a breakpoint, `inspect.getsource` of a function, of its class or of the whole module and an
editor that opens the file all agree. Where a replacement is shorter than what it replaces, blank lines fill the gap.
Where it is longer, in this order:

1. blank lines next to it give way;
2. simple statements share a line: `a = f(x); a = site(a)`;
3. what still does not fit (a statement before a `for`, say) is *folded*: linecache holds a list of lines, and one entry
   of
   it may hold several. `inspect`, `pdb` and `traceback` show all of them. The one thing that this breaks is
   `inspect.getsource` of a *class* further down in the same file before Python 3.13, which counts lines in the joined
   text.

A code object cannot name two files, so what comes from a patch says so in a comment at its end: file and line of the
patch.
"""

import ast
import dataclasses
import io
import itertools
import tokenize
from collections.abc import Sequence

from interp_jax.patching.pattern import Origin
from interp_jax.patching.rewriting import Piece
from interp_jax.patching.source_text import SourceText


@dataclasses.dataclass
class _Line:
    text: str
    number: int | None
    """The line of the source that this must stay, None for a line that may stand anywhere between its neighbours."""
    origins: list[Origin]
    may_go: bool = False
    may_be_commented: bool = True
    """Not inside a string, nor before a backslash."""
    """A blank line of the source, outside any string."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The new text, entry by entry."""

    entries: tuple[str, ...]
    """One for each line of the source, each with its newline; a folded one holds several."""

    @property
    def text(self) -> str:
        """All of it as one string."""
        return "".join(self.entries)

    def parse(self, filename: str) -> ast.Module:
        """The syntax tree of the text, its lines numbered by entry."""
        tree = ast.parse(self.text, filename)
        heights = [entry.removesuffix("\n").count("\n") + 1 for entry in self.entries]
        if max(heights) == 1:
            return tree
        numbers = [0]
        folded: set[int] = set()
        for number, height in enumerate(heights, 1):
            numbers += [number] * height
            if height > 1:
                folded.add(number)
        for node in ast.walk(tree):
            if hasattr(node, "lineno"):
                node.lineno = numbers[node.lineno]  # pyright: ignore[reportAttributeAccessIssue]
                node.end_lineno = numbers[node.end_lineno]  # pyright: ignore[reportAttributeAccessIssue]
                if node.lineno in folded:  # pyright: ignore[reportAttributeAccessIssue]
                    # Columns count from the start of a real line; here carets would point anywhere.
                    node.end_lineno, node.col_offset, node.end_col_offset = node.lineno, -1, -1  # pyright: ignore
        return tree


def lay_out(source: SourceText, pieces: Sequence[Piece]) -> Layout:
    """Lays out rewritten text on the lines of its source.

    Args:
        source: the module as it was.
        pieces: its new text, all of it.

    Returns:
        As many entries as the source has lines.
    """
    count = len(source.lines)
    lines = _without_blank_lines_in_the_way(_where_they_can_stay(_lines(source, pieces), source), count)
    return Layout(tuple(_entries(_with_places_for_comments(lines), count)))


def _lines(source: SourceText, pieces: Sequence[Piece]) -> list[_Line]:
    lines: list[_Line] = []
    number: int | None = None
    text, origins, all_kept, first = "", [], True, None
    for piece in [*pieces, Piece("\n", len(source.text), None)]:
        at = 0
        for i, part in enumerate(piece.text.split("\n")):
            if i:
                blank = not text.strip()
                if all_kept and number is None and first is not None:
                    number = source.line_at(first)
                may_go = blank and all_kept and number is not None and number not in source.lines_inside_strings
                lines.append(_Line(text, number, origins, may_go))
                text, origins, number, all_kept, first = "", [], None, True, None
            if first is None and piece.source is not None:
                first = piece.source + at
            if part:
                text += part
                all_kept = all_kept and piece.source is not None
                if piece.source is not None and number is None and part.strip():
                    number = source.line_at(piece.source + at)
                if piece.origin and part.strip() and piece.origin not in origins:
                    origins.append(piece.origin)
            at += len(part) + 1
    return lines


def _where_they_can_stay(lines: list[_Line], source: SourceText) -> list[_Line]:
    """Code that a patch moved up or wrote twice cannot keep its number; nor can what goes on with a string that begins
    further up than it did, as no line may come between."""
    last = 0
    before: int | None = 0
    for line in lines:
        number = line.number
        if number is not None:
            is_torn_off = number in source.lines_inside_strings and before != number - 1
            if number <= last or is_torn_off:
                line.number, line.may_go = None, False
            else:
                last = number
        before = line.number
    return lines


def _with_places_for_comments(lines: list[_Line]) -> list[_Line]:
    """Finds the lines that cannot end in a comment."""
    text = "\n".join(line.text for line in lines) + "\n"
    ends = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in (tokenize.NEWLINE, tokenize.NL)
    }
    for number, line in enumerate(lines, 1):
        line.may_be_commented = number in ends
    return lines


def _without_blank_lines_in_the_way(lines: list[_Line], count: int) -> list[_Line]:
    lines = list(lines)
    at = 0
    while at < len(lines):
        if lines[at].number is not None:
            at += 1
            continue
        end = at
        while end < len(lines) and lines[end].number is None:
            end += 1
        while end - at > _room(lines, at - 1, end, count):
            if end < len(lines) and lines[end].may_go:
                del lines[end]
                while end < len(lines) and lines[end].number is None:
                    end += 1
            elif at > 0 and lines[at - 1].may_go:
                at, end = at - 1, end - 1
                del lines[at]
            else:
                break
        at = end
    return lines


def _room(lines: list[_Line], before: int, after: int, count: int) -> int:
    """How many lines the source has between two kept ones."""
    low = (lines[before].number or 0) if before >= 0 else 0
    high = (lines[after].number or 0) if after < len(lines) else count + 1
    return high - low - 1


class _Cell:
    """What will stand in one entry: real lines, each one or more statements in a row."""

    def __init__(self, index: int, line: _Line):
        self.rows = [[line]]
        self.first = self.last = index

    def join(self, other: "_Cell") -> None:
        self.rows[-1] += other.rows[0]
        self.rows += other.rows[1:]
        self.last = other.last

    def fold(self, other: "_Cell") -> None:
        self.rows += other.rows
        self.last = other.last

    def written(self) -> str:
        return "".join(self._row(row) + "\n" for row in self.rows)

    def _row(self, row: list[_Line]) -> str:
        text = "; ".join([row[0].text, *(line.text.strip() for line in row[1:])])
        origins = list(dict.fromkeys(origin for line in row for origin in line.origins))
        if not origins or not text.strip() or not row[-1].may_be_commented:
            return text
        shown = [str(origins[0]), *(str(o.line) if o.path == origins[0].path else str(o) for o in origins[1:])]
        return f"{text}  # {', '.join(shown)}"


def _entries(lines: list[_Line], count: int) -> list[str]:
    joinable = _joinable(lines)
    cells = [_Cell(i, line) for i, line in enumerate(lines)]
    entries = [""] * (count + 1)
    at = 0
    before: _Cell | None = None
    while at < len(cells):
        free: list[_Cell] = []
        start = at
        while at < len(cells) and lines[at].number is None:
            free.append(cells[at])
            at += 1
        after = cells[at] if at < len(cells) else None
        room = _room(lines, start - 1, at, count)
        while len(free) > room and _join_one(before, free, after, joinable):
            pass
        if len(free) > room:
            _fold(before, free, after, room)
        low = (lines[start - 1].number or 0) if start else 0
        if before is not None:
            entries[low] = before.written()
        for slot in range(room):
            entries[low + 1 + slot] = free[slot].written() if slot < len(free) else "\n"
        before = after
        at += 1
        if after is not None and at == len(cells):
            entries[lines[at - 1].number or 0] = after.written()
    # The last line of the source ended in no newline.
    entries[-1] = entries[-1].removesuffix("\n")
    return entries[1:]


def _join_one(before: _Cell | None, free: list[_Cell], after: _Cell | None, joinable: frozenset[int]) -> bool:
    """Puts two neighbouring simple statements on one line; False where none are left that can."""
    for left, right in itertools.pairwise(free):
        if left.last in joinable:
            left.join(right)
            free.remove(right)
            return True
    if before is not None and free and before.last in joinable:
        before.join(free.pop(0))
        return True
    if after is not None and free and free[-1].last in joinable:
        left = free.pop()
        left.join(after)
        after.rows, after.first = left.rows, left.first
        return True
    return False


def _fold(before: _Cell | None, free: list[_Cell], after: _Cell | None, room: int) -> None:
    if room:
        while len(free) > room:
            free[-2].fold(free.pop())
        return
    whole = free[0]
    for cell in free[1:]:
        whole.fold(cell)
    free.clear()
    first = whole.rows[0][0].text
    begins_definition = first.lstrip().startswith(_DEFINITION)
    if after is not None and not begins_definition:
        # With what follows, if that is in the same block: what stands before may be the line of a `def`, and `inspect`
        # takes a function to end where something follows that on its own line.
        next_line = after.rows[0][0].text
        follows = bool(next_line.strip()) and _indentation(next_line) >= _indentation(first)
        into_next = before is None or (follows and not next_line.lstrip().startswith(_DEFINITION))
    else:
        into_next = after is not None
    if into_next and after is not None:
        whole.fold(after)
        after.rows, after.first = whole.rows, whole.first
    elif before is not None:
        before.fold(whole)


_DEFINITION = ("@", "def ", "class ", "async def ")


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _joinable(lines: list[_Line]) -> frozenset[int]:
    """Indices of lines that may share one with the next: both are whole simple statements of the same block."""
    text = "\n".join(line.text for line in lines) + "\n"
    tree = ast.parse(text)
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    found: set[int] = set()
    for node in ast.walk(tree):
        for _, block in ast.iter_fields(node):
            if not isinstance(block, list) or not block or not isinstance(block[0], ast.stmt):
                continue
            for first, second in itertools.pairwise(block):
                end = first.end_lineno
                apart = end in commented or second.lineno != end + 1 or not (_is_simple(first) and _is_simple(second))
                if not apart and not lines[end - 1].text.rstrip().endswith(";"):
                    found.add(end - 1)
    return frozenset(found)


def _is_simple(statement: ast.stmt) -> bool:
    return not (hasattr(statement, "body") or isinstance(statement, ast.Match))

"""A pair: what to look for in a member, and what to put there."""

import ast
import dataclasses
import re
import sys
import unicodedata
from collections.abc import Sequence

from interp_jax.patching.errors import MatchError
from interp_jax.patching.matching import Match, find
from interp_jax.patching.nearest import nearest_as_diff
from interp_jax.patching.pattern import Origin, Pattern, parse_pattern
from interp_jax.patching.rewriting import Edit, check_bindings, make_edit
from interp_jax.patching.source_text import SourceText


@dataclasses.dataclass(frozen=True)
class Pair:
    """One replacement within a member."""

    before: str
    """Python with metavariables: an expression, or contiguous statements."""
    after: str
    """What stands there instead; empty removes."""
    count: int = 1
    """How many places `before` must match; all of them are replaced."""
    note: str = ""
    """What the pair is for."""
    before_at: Origin | None = None
    """Where `before` is written. None: the call that made the patcher."""
    after_at: Origin | None = None
    """Where `after` is written. None: the call that made the patcher."""


@dataclasses.dataclass(frozen=True)
class ParsedPair:
    """A pair whose patterns are trees."""

    member: str
    before: Pattern
    after: Pattern
    count: int

    @property
    def is_expression(self) -> bool:
        """Whether expressions are replaced by expressions, anywhere in a statement."""
        return self.before.expression is not None and self.after.expression is not None

    @property
    def label(self) -> str:
        """Which pair this is, in messages."""
        return f"the pair for {self.member} at {self.before.origin}"

    def edits(self, source: SourceText, versions: object) -> list[Edit]:
        """Finds the places to edit.

        Args:
            source: the module.
            versions: prints what is known about versions, for the error.

        Returns:
            One edit for each place; there are `count`.

        Raises:
            MatchError: there are more or fewer places.
        """
        roots = source.definitions(self.member)
        matches = find(self.before, roots, as_expression=self.is_expression)
        if len(matches) == self.count:
            self._refuse_f_strings(source, roots, matches)
            return [
                make_edit(source, match, self.after, is_expression=self.is_expression, label=self.label)
                for match in matches
            ]
        head = (
            f"{self.before.origin}: the pattern matches {len(matches)} places in {self.member} ({source.filename}), "
            f"and {self.count} was expected.\n{_indented(self.before.text)}\n"
        )
        if matches:
            places = [source.span(match.nodes[0])[0] for match in matches]
            head += "It matches at:\n" + "\n".join(
                f"    line {source.line_at(at)}: {source.lines[source.line_at(at) - 1].strip()}" for at in places
            )
            head += "\nMake the pattern longer, or state count=.\n"
        if len(matches) < self.count:
            nearest = nearest_as_diff(source, roots, self.before, is_expression=self.is_expression)
            head += f"The nearest there (- the pattern, + the source):\n{_indented(nearest)}\n"
        raise MatchError(f"{head}{versions}")

    def _refuse_f_strings(self, source: SourceText, roots: Sequence[ast.stmt], matches: Sequence[Match]) -> None:
        """Before Python 3.12 the tree does not know where in the text the code inside an f-string stands."""
        if sys.version_info >= (3, 12):
            self._refuse_self_documenting(source, roots, matches)
            return
        strings = [node for root in roots for node in ast.walk(root) if isinstance(node, ast.JoinedStr)]
        inside = {node for string in strings for node in ast.walk(string) if node is not string}
        for match in matches:
            if match.nodes[0] in inside:
                line = match.nodes[0].lineno  # pyright: ignore[reportAttributeAccessIssue]
                raise MatchError(
                    f"{self.before.origin}: the pattern matches inside an f-string ({source.filename}:{line}), where "
                    "Python before 3.12 tells no positions. Match the whole f-string, or the statement around it."
                )

    def _refuse_self_documenting(self, source: SourceText, roots: Sequence[ast.stmt], matches: Sequence[Match]) -> None:
        """`f"{x=}"` holds its code once more as text, which the tree has made into another constant."""
        values = [n.value for root in roots for n in ast.walk(root) if isinstance(n, ast.FormattedValue)]
        said = [v for v in values if re.match(r"[\s)]*=", source.text[source.span(v)[1] :])]
        inside = {node for value in said for node in ast.walk(value)}
        for match in matches:
            if match.nodes[0] in inside:
                line = source.line_at(source.span(match.nodes[0])[0])
                raise MatchError(
                    f"{self.before.origin}: the pattern matches inside an f-string's {{...=}} ({source.filename}:"
                    f"{line}), which shows its code as text. Match the whole f-string, or the statement around it."
                )


def parse_pair(member: str, pair: Pair, made_at: Origin) -> ParsedPair:
    """Parses a pair's patterns.

    Raises:
        PatternSyntaxError: one of them is not Python, or the replacement uses what the pattern does not bind.
    """
    before = parse_pattern(pair.before, pair.before_at or made_at)
    after = parse_pattern(pair.after, pair.after_at or made_at)
    if not before.body:
        raise MatchError(f"{before.origin}: the pattern for {member} is empty; it must say where to patch.")
    check_bindings(after, before)
    # As Python reads identifiers.
    return ParsedPair(unicodedata.normalize("NFKC", member), before, after, pair.count)


def pairs_of(given: Sequence[str | Pair | tuple[str, str]], member: str) -> list[Pair]:
    """Reads the forms in which pairs may be given: `before, after, ...`, `(before, after), ...`, `Pair(...), ...`.

    Raises:
        TypeError: they are given otherwise.
    """
    if isinstance(given, str):
        raise TypeError(f"The patches of {member} are a string; give a list: {member}=[before, after].")
    pairs: list[Pair] = []
    rest = list(given)
    while rest:
        first = rest.pop(0)
        if isinstance(first, Pair):
            pairs.append(first)
        elif isinstance(first, str) and rest and isinstance(second := rest[0], str):
            pairs.append(Pair(first, second))
            del rest[0]
        elif isinstance(first, tuple) and len(first) == 2:
            pairs.append(Pair(*first))
        else:
            raise TypeError(
                f"The patches of {member} must be [before, after, before, after, ...], [(before, after), ...] or "
                f"[Pair(...), ...]; {first!r} is none of these or lacks its other half."
            )
    return pairs


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.split("\n"))

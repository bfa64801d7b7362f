"""Does a patch set fit the library that is installed, and if not, what has become of the code that it patches?

For use when upstream moves. Nothing of the library is imported or run: its source is read. Each pair is

- *matched*: it patches what it names;
- *moved*: the same code stands elsewhere (in another member, class or module), or stands there with some identifiers
  renamed, and there is one such place only; then a new pair is proposed, to be read before it is taken;
- *missing*: neither; then the nearest code is shown as a diff.

What a renamed class, function or module is called now is found from all pairs for it together: the member that most of
them match.
"""

import ast
import collections
import dataclasses
import json
import textwrap
from collections.abc import Collection, Sequence
from typing import Literal

from interp_jax.patching.errors import PatchError, SourceError
from interp_jax.patching.installed_source import installed_source, installed_version, modules_of
from interp_jax.patching.matching import find
from interp_jax.patching.nearest import nearest_as_diff
from interp_jax.patching.pair import Pair, ParsedPair, parse_pair
from interp_jax.patching.patch_set import PatchSet, SetPair
from interp_jax.patching.patched_module import PatchedModule, Request, by_module, missing_member
from interp_jax.patching.pattern import Origin
from interp_jax.patching.renaming import find_renamed
from interp_jax.patching.source_text import SourceText, home_of

_STATUSES = ("matched", "moved", "missing")


@dataclasses.dataclass(frozen=True)
class PairReport:
    """What has become of the code that one pair patches."""

    module: str
    """The module that the pair names."""
    pair: SetPair
    """The pair."""
    status: Literal["matched", "moved", "missing"]
    """See the module."""
    where: str
    """File and line of the place, the first of several; empty where there is none."""
    explanation: str = ""
    """What has changed, and the nearest code as a diff; empty where it matched."""
    proposal: str = ""
    """A new pair as TOML, where it moved."""


@dataclasses.dataclass(frozen=True)
class SetReport:
    """How a patch set fits what is installed."""

    patch_set: PatchSet
    """The set."""
    installed: str | None
    """The library's version; None where it is not installed, and then no pair was looked for."""
    pairs: tuple[PairReport, ...]
    """In the order of the file."""
    faults: tuple[str, ...] = ()
    """Why pairs that match one by one cannot be made together."""

    @property
    def fits(self) -> bool:
        """Whether the set can be installed."""
        return self.installed is not None and not self.faults and all(p.status == "matched" for p in self.pairs)

    @property
    def is_known_version(self) -> bool:
        """Whether the set says that it is known to match the installed version."""
        from packaging.specifiers import InvalidSpecifier, SpecifierSet  # Half of this package's import time otherwise.

        try:
            return self.installed is not None and SpecifierSet(self.patch_set.versions, prereleases=True).contains(
                self.installed
            )
        except InvalidSpecifier:
            return False

    def __str__(self) -> str:
        name, distribution = self.patch_set.name, self.patch_set.distribution
        if self.installed is None:
            return f"{name}: {distribution} is not installed."
        counts = collections.Counter(pair.status for pair in self.pairs)
        counted = ", ".join(f"{counts[status]} {status}" for status in _STATUSES if counts[status])
        known = "known" if self.is_known_version else "NOT KNOWN"
        lines = [f"{name}: {distribution} {self.installed} ({known}: {self.patch_set.versions}): {counted}"]
        width = max((len(pair.pair.member) for pair in self.pairs), default=0)
        module = explanation = None
        for each in self.pairs:
            if each.module != module:
                module, explanation = each.module, None
                lines.append(f"  {module}")
            sites = ", ".join(each.pair.sites) or textwrap.shorten(each.pair.pair.note, 72, placeholder=" ...")
            lines.append(f"    {each.status:8} {each.pair.member:{width}}  {sites}".rstrip())
            if each.explanation and each.explanation != explanation:
                lines.append(_indented(f"{each.pair.pair.before_at}: {each.explanation}", 13))
                explanation = each.explanation
            if each.proposal:
                lines += [" " * 13 + "proposed instead, to be read before it is taken:", _indented(each.proposal, 15)]
        lines += [_indented(f"cannot be made together: {fault}", 4) for fault in self.faults]
        if self.fits and not self.is_known_version:
            lines.append(
                f"  Every pair matches {self.installed}, which the set does not know. Run a model of it, compare the "
                f"logits with the unpatched library's, then widen `versions` in {self.patch_set.path}."
            )
        return "\n".join(lines)


def check(patch_set: PatchSet) -> SetReport:
    """Looks for every pair of a set in the library that is installed.

    Args:
        patch_set: from `load`.

    Returns:
        What was found; print it.

    Raises:
        PatternSyntaxError: a pattern of the set is not Python.
    """
    parsed = {module: [_parsed(each, patch_set) for each in pairs] for module, pairs in patch_set.modules.items()}
    version = installed_version(patch_set.distribution)
    if version is None:
        return SetReport(patch_set, None, ())
    reports: list[PairReport] = []
    faults: list[str] = []
    for module, pairs in patch_set.modules.items():
        try:
            found = _check_module(patch_set, module, list(zip(pairs, parsed[module], strict=True)))
        except SourceError as error:
            found = [PairReport(module, each, "missing", "", str(error)) for each in pairs]
        reports += found
        if all(each.status == "matched" for each in found):
            try:
                _texts(module, parsed[module])
            except PatchError as error:
                faults.append(str(error))
    return SetReport(patch_set, version, tuple(reports), tuple(faults))


def patched_texts(patch_set: PatchSet) -> dict[str, tuple[SourceText, str]]:
    """The library's modules as the set patches them.

    Args:
        patch_set: from `load`.

    Returns:
        Module name to its source and its text as patched.

    Raises:
        SourceError: a module does not exist; `check` tells more.
        PatchError: a pair does not match, or they cannot be made together.
    """
    texts: dict[str, tuple[SourceText, str]] = {}
    for module, pairs in patch_set.modules.items():
        texts |= _texts(module, [_parsed(each, patch_set) for each in pairs])
    return texts


def _parsed(each: SetPair, patch_set: PatchSet) -> ParsedPair:
    return parse_pair(each.member, each.pair, Origin(str(patch_set.path), 0))


def _texts(module: str, pairs: Sequence[ParsedPair]) -> dict[str, tuple[SourceText, str]]:
    texts: dict[str, tuple[SourceText, str]] = {}
    source = installed_source(module)
    for name, part in by_module(Request(tuple(pairs), (), ""), module, source, installed_source).items():
        if not part.pairs:
            continue
        own = source if name == module else installed_source(name)
        layout = PatchedModule(name, own, None).rewritten([part])
        texts[name] = own, own.text if layout is None else layout.text
    return texts


@dataclasses.dataclass(frozen=True)
class _Home:
    """Where the pairs of one member are looked for."""

    module: str
    member: str
    source: SourceText

    @property
    def roots(self) -> list[ast.stmt]:
        return self.source.definitions(self.member)


def _check_module(patch_set: PatchSet, module: str, pairs: Sequence[tuple[SetPair, ParsedPair]]) -> list[PairReport]:
    name, source = _module_now(patch_set, module, [parsed for _, parsed in pairs])
    by_member: dict[str, list[ParsedPair]] = {}
    for _, parsed in pairs:
        by_member.setdefault(parsed.member, []).append(parsed)
    homes = {member: _home_of(member, each, name, source, by_member.keys()) for member, each in by_member.items()}
    # First all that match as they are: what one pair has, another's renamed code is not.
    nodes: dict[int, list[ast.AST]] = {}
    for i, (_, parsed) in enumerate(pairs):
        home = homes[parsed.member]
        matches = find(parsed.before, home.roots, as_expression=parsed.is_expression) if home else []
        if len(matches) == parsed.count:
            nodes[i] = [node for match in matches for node in match.nodes]
    taken = {node for each in nodes.values() for node in each}
    reports: list[PairReport] = []
    for i, (each, parsed) in enumerate(pairs):
        home = homes[parsed.member]
        if home is None:
            reports.append(PairReport(module, each, "missing", "", missing_member(source, parsed.member)))
        elif i in nodes:
            reports.append(_matched(module, each, parsed, home, nodes[i]))
        else:
            reports.append(_not_matched(module, each, parsed, home, taken))
    return reports


def _matched(module: str, each: SetPair, parsed: ParsedPair, home: _Home, nodes: Sequence[ast.AST]) -> PairReport:
    where = _place(home.source, nodes[0])
    # A package that only passes on what a submodule defines is patched there without being asked: nothing has moved.
    if home.member == parsed.member and (home.module == module or _passes_on(module, parsed.member, home.module)):
        return PairReport(module, each, "matched", where)
    explanation = f"{module}: {parsed.member} is now {home.module}: {home.member}"
    return PairReport(module, each, "moved", where, explanation, _proposal(each, home, None, module))


def _not_matched(module: str, each: SetPair, parsed: ParsedPair, home: _Home, taken: set[ast.AST]) -> PairReport:
    nearest = nearest_as_diff(home.source, home.roots, parsed.before, is_expression=parsed.is_expression)
    elsewhere = _elsewhere(parsed, home, taken)
    if elsewhere is not None:
        other, node = elsewhere
        explanation = f"what stood in {parsed.member} now stands in {other.member}"
        return PairReport(
            module, each, "moved", _place(other.source, node), explanation, _proposal(each, other, None, module)
        )
    renamed = find_renamed(parsed.before, home.roots, parsed.count, taken, as_expression=parsed.is_expression)
    if renamed is not None:
        matches, renaming = renamed
        before, after = renaming.apply(parsed.before), renaming.apply(parsed.after)
        if before is not None and after is not None:
            return PairReport(
                module, each, "moved", _place(home.source, matches[0].nodes[0]), f"{renaming}\n{_indented(nearest, 2)}",
                _proposal(each, home, (before, after), module),
            )  # fmt: skip
    count = len(find(parsed.before, home.roots, as_expression=parsed.is_expression))
    explanation = (
        f"matches {count} places in {home.member}, and {parsed.count} was expected; the nearest there (- the pattern, "
        f"+ the source):\n{_indented(nearest, 2)}"
    )
    return PairReport(module, each, "missing", "", explanation)


def _elsewhere(parsed: ParsedPair, home: _Home, taken: set[ast.AST]) -> tuple[_Home, ast.AST] | None:
    """The one other method of the same class, or function of the module, that the pattern fits as it is and that the
    member uses: its code went there, and did not stand there all along."""
    around = home.member.rpartition(".")[0]
    nodes = [node for root in home.roots for node in ast.walk(root)]
    used = {n.attr if isinstance(n, ast.Attribute) else n.id for n in nodes if isinstance(n, ast.Attribute | ast.Name)}
    found: list[tuple[_Home, ast.AST]] = []
    for name in home.source.member_names():
        if name == home.member or name.rpartition(".")[0] != around or home.source.is_class(name):
            continue
        if name.rpartition(".")[2] not in used:
            continue
        matches = find(parsed.before, home.source.definitions(name), as_expression=parsed.is_expression)
        if len(matches) == parsed.count and not any(node in taken for match in matches for node in match.nodes):
            found.append((dataclasses.replace(home, member=name), matches[0].nodes[0]))
    return found[0] if len(found) == 1 else None


def _home_of(
    member: str, pairs: Sequence[ParsedPair], module: str, source: SourceText, others: Collection[str]
) -> _Home | None:
    """Where a member is now: under its name, passed on from another module, or under another name."""
    try:
        found = home_of(member, module, source, installed_source)
    except SourceError:
        return None
    if found is not None:
        home = _Home(*found, source if found[0] == module else installed_source(found[0]))
        if home.roots:
            return home
    scores = {
        name: sum(
            len(find(pair.before, source.definitions(name), as_expression=pair.is_expression)) == pair.count
            for pair in pairs
        )
        for name in source.member_names()
        if not any(f"{other}.".startswith(f"{name}.") for other in others)
    }
    # A class matches where its method does: the longer name is the more exact.
    ranked = sorted((score, name.count("."), name) for name, score in scores.items() if score)
    is_most = bool(ranked) and 2 * ranked[-1][0] > len(pairs)
    if not is_most or (len(ranked) > 1 and ranked[-2][:2] == ranked[-1][:2]):
        return None
    return _Home(module, ranked[-1][2], source)


def _module_now(patch_set: PatchSet, module: str, pairs: Sequence[ParsedPair]) -> tuple[str, SourceText]:
    """A module under its name, or the one module of the distribution that defines the most of its members."""
    try:
        return module, installed_source(module)
    except SourceError:
        members = {pair.member for pair in pairs}
        tops = {member.split(".")[0] for member in members}
        scores = {
            name: sum(f"class {top}" in text or f"def {top}(" in text for top in tops)
            for name, text in modules_of(patch_set.distribution)
        }
        best = max(scores.values(), default=0)
        names = [name for name, score in scores.items() if score == best]
        if not best or len(names) > 1:
            raise
        return names[0], installed_source(names[0])


def _passes_on(module: str, member: str, home: str) -> bool:
    try:
        found = home_of(member, module, installed_source(module), installed_source)
    except SourceError:
        return False
    return found is not None and found[0] == home


def _place(source: SourceText, node: ast.AST) -> str:
    return f"{source.filename}:{source.line_at(source.span(node)[0])}"


def _proposal(each: SetPair, home: _Home, renamed: tuple[str, str] | None, module: str) -> str:
    before, after = renamed or (each.pair.before, each.pair.after)
    lines = [] if home.module == module else [f"# under the module {home.module}"]
    lines += ["[[modules.pairs]]", f'member = "{home.member}"']
    if each.sites:
        lines.append(f"sites = {json.dumps(list(each.sites))}")
    lines += [f"before = {_toml_string(before)}", f"after = {_toml_string(after)}"]
    if each.pair.count != Pair("", "").count:
        lines.append(f"count = {each.pair.count}")
    return "\n".join(lines)


def _toml_string(text: str) -> str:
    text = text.strip("\n")
    if "\n" not in text and "'" not in text:
        return f"'{text}'"
    return f"'''\n{text}\n'''" if "'''" not in text else json.dumps(text)


def _indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.split("\n"))

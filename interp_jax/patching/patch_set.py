"""Patch sets: the pairs for one library as a TOML file.

```toml
distribution = "transformers"
versions = "==4.57.6"                       # known to match
imports = ["from interp_jax.instrument import site"]

[[modules]]
name = "transformers.models.llama.modeling_flax_llama"

[[modules.pairs]]
member = "FlaxLlamaModule.__call__"
sites = ["embed"]                           # the sites that the pair makes; absent where it mends something
note = "Token embeddings."
before = 'self.embed_tokens(input_ids.astype("i4"))'
after = 'site(self.embed_tokens(input_ids.astype("i4")), "embed")'
```

Files are looked for in this order, and the first of a name is taken:

1. the folders that the environment variable `INTERP_JAX_PATCHES` lists, for a user's own sets, also in place of ours;
2. the checkout's `patches/`, which in the wheel is `interp_jax/patches/`;
3. other distributions' packages that are named by entry points of the group `interp_jax.patches`: the files in the
package's
   folder, which is not imported for it.

A path that ends in `.toml` is a name as well.

Reading a set parses its patterns, so a fault in one is found there, with its line. A set holds code that will run in
the library's modules: install only sets that you would import.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import sys
import tomllib
from typing import Any

from interp_jax.patching.errors import PatchSetError, UnknownPatchSetError
from interp_jax.patching.installed_source import find_spec
from interp_jax.patching.pair import Pair
from interp_jax.patching.patched_module import lock
from interp_jax.patching.patcher import Patcher
from interp_jax.patching.pattern import Origin

FOLDERS_VARIABLE = "INTERP_JAX_PATCHES"
"""The environment variable that lists a user's own folders of patch sets."""
ENTRY_POINTS = "interp_jax.patches"
"""The entry points by which other distributions name packages that hold patch sets."""

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_OWN_FOLDERS = (_PACKAGE.parent / "patches", _PACKAGE / "patches")

_installed: dict[pathlib.Path, "PatchSet"] = {}


@dataclasses.dataclass(frozen=True)
class SetPair:
    """A pair of a set, with the member it is for and the sites it makes."""

    member: str
    """Dotted name in the module."""
    sites: tuple[str, ...]
    """The sites that the pair makes; none where it mends something."""
    pair: Pair
    """The replacement."""


@dataclasses.dataclass(frozen=True)
class PatchSet:
    """Everything that is patched in one library."""

    name: str
    """The file's name without `.toml`."""
    path: pathlib.Path
    """The file."""
    distribution: str
    """The name under which the library is installed."""
    versions: str
    """Its versions that the pairs are known to match."""
    imports: tuple[str, ...]
    """Import statements whose names the replacements use."""
    modules: dict[str, tuple[SetPair, ...]]
    """Module name to pairs, in the order of the file."""

    def patchers(self) -> list[Patcher]:
        """A new patcher for each module."""
        made: list[Patcher] = []
        for module, pairs in self.modules.items():
            members: dict[str, list[Pair]] = {}
            for each in pairs:
                members.setdefault(each.member, []).append(each.pair)
            known = f"{self.distribution} {self.versions} (interp-jax patches check {self.name} tells more)"
            made.append(Patcher(module, members, imports=self.imports, known_versions=known))
        return made


def known() -> dict[str, pathlib.Path]:
    """The patch sets that there are: name to file, by name."""
    files: dict[str, pathlib.Path] = {}
    for folder in _folders():
        if folder.is_dir():
            for path in folder.glob("*.toml"):
                files.setdefault(path.stem, path)
    return dict(sorted(files.items()))


def load(name: str | os.PathLike[str]) -> PatchSet:
    """Reads a patch set.

    Args:
        name: its name, such as `"transformers"`, or the path of a file that ends in `.toml`.

    Returns:
        The set, with file and line of every pattern.

    Raises:
        UnknownPatchSetError: there is none of that name; lists those that exist and where they were looked for.
        PatchSetError: the file is not a patch set.
    """
    if os.fspath(name).endswith(".toml"):
        path = pathlib.Path(name).resolve()
        if not path.is_file():
            raise UnknownPatchSetError(f"There is no file {path}.")
        return _read(path)
    files = known()
    if name not in files:
        raise UnknownPatchSetError(
            f"There is no patch set {name!r}. Known: {', '.join(files) or 'none'} "
            f"(looked for in {', '.join(str(folder) for folder in _folders())}). Your own can be given by its path, "
            f"or lie in a folder that {FOLDERS_VARIABLE} names."
        )
    return _read(files[os.fspath(name)])


def install(name: str | os.PathLike[str]) -> PatchSet:
    """Installs a patch set: modules not yet imported are patched on import, the others in place.

    A second call for the same set does nothing.

    Args:
        name: its name, such as `"transformers"`, or the path of a file that ends in `.toml`.

    Returns:
        The set.

    Raises:
        UnknownPatchSetError: there is none of that name.
        PatchError: a module that has been imported cannot be patched; then no module is. For the others, their import
            raises it.
    """
    patch_set = load(name)
    patchers = patch_set.patchers()
    for patcher in patchers:
        if patcher.module_name in sys.modules:
            patcher.import_needed()
    with lock:
        if patch_set.path in _installed:
            return _installed[patch_set.path]
        done: list[Patcher] = []
        try:
            for patcher in patchers:
                if patcher.module_name in sys.modules:
                    patcher.install()
                else:
                    patcher.install_on_import()
                done.append(patcher)
        except BaseException:
            for patcher in reversed(done):
                patcher.uninstall()
            raise
        _installed[patch_set.path] = patch_set
        return patch_set


def _folders() -> list[pathlib.Path]:
    own = [pathlib.Path(each).expanduser() for each in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if each]
    specs = [find_spec(each.module) for each in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    others = [pathlib.Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
    return [*own, *_OWN_FOLDERS, *others]


def _read(path: pathlib.Path) -> PatchSet:
    text = path.read_text(encoding="utf-8")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PatchSetError(f"{path}: not TOML: {error}") from None
    _check(path, "the file", data, {"distribution": str, "versions": str, "modules": list}, {"imports": list})
    befores, afters = _string_lines(text, "before"), _string_lines(text, "after")
    modules: dict[str, tuple[SetPair, ...]] = {}
    number = 0
    for module in data["modules"]:
        _check(path, "an entry of modules", module, {"name": str, "pairs": list}, {})
        pairs: list[SetPair] = []
        for entry in module["pairs"]:
            where = f"pair {number + 1} ({entry.get('member', 'of no member')})"
            _check(
                path, where, entry,
                {"member": str, "before": str, "after": str}, {"sites": list, "note": str, "count": int},
            )  # fmt: skip
            before_at = Origin(str(path), befores[number] if number < len(befores) else 0)
            after_at = Origin(str(path), afters[number] if number < len(afters) else 0)
            pair = Pair(
                entry["before"], entry["after"], entry.get("count", 1), entry.get("note", ""), before_at, after_at
            )
            pairs.append(SetPair(entry["member"], tuple(entry.get("sites", ())), pair))
            number += 1
        modules[module["name"]] = tuple(pairs)
    return PatchSet(path.stem, path, data["distribution"], data["versions"], tuple(data.get("imports", ())), modules)


def _check(path: pathlib.Path, where: str, table: Any, needed: dict[str, type], allowed: dict[str, type]) -> None:
    types = {**needed, **allowed}
    for key in needed.keys() - table.keys():
        raise PatchSetError(f"{path}: {where} lacks {key!r}.")
    for key, value in table.items():
        if key not in types:
            raise PatchSetError(
                f"{path}: {where} has {key!r}, which means nothing there. Meant are: {', '.join(types)}."
            )
        if not isinstance(value, types[key]):
            raise PatchSetError(f"{path}: {key!r} of {where} is {value!r}; it must be a {types[key].__name__}.")


_STRINGS = re.compile(
    r"""(?m)(?:^[ \t]*(?P<key>[\w-]+)[ \t]*=[ \t]*)?"""
    r"""(?P<string>'{3}(?:.|\n)*?'{3}|"{3}(?:\\.|[^\\])*?"{3}|'[^'\n]*'|"(?:\\.|[^"\\\n])*"|\#[^\n]*)"""
)


def _string_lines(text: str, key: str) -> list[int]:
    """The lines on which the string values of a key begin, in order. TOML readers do not tell."""
    lines: list[int] = []
    for found in _STRINGS.finditer(text):
        if found["key"] == key:
            # A newline right after the opening quotes is not part of the string.
            first = 4 if re.match(r"('{3}|\"{3})\n", found["string"]) else 0
            lines.append(text.count("\n", 0, found.start("string") + first) + 1)
    return lines

"""Patcher: before/after pairs for the members of one module."""

import ast
import dataclasses
import importlib
import importlib.metadata
import linecache
import sys
import types
from collections.abc import Mapping, Sequence

from interp_jax.patching.errors import PatchError
from interp_jax.patching.import_hook import stop_waiting, wait_for
from interp_jax.patching.pair import Pair, pairs_of, parse_pair
from interp_jax.patching.patched_module import (
    PatchedModule,
    Request,
    by_module,
    import_needed,
    lock,
    patched_module_of,
    patched_modules,
)
from interp_jax.patching.pattern import Origin
from interp_jax.patching.source_text import SourceText

Pairs = Sequence[str | Pair | tuple[str, str]]


class Patcher:
    """Replaces code in the members of one module.

    ```python
    with Patcher(module, {"Block.__call__": ["$y = self.mlp($x)", "$y = site(self.mlp($x), 'mlp_out')"]},
                 imports=["from interp_jax.instrument import site"]):
        ...
    ```

    The patches hold inside the `with`, or from `install()` to `uninstall()`, for the whole process and all threads.
    Entering or installing again while it is active only counts; the last exit takes the patches back.
    """

    def __init__(
        self,
        module: types.ModuleType | str,
        members: Mapping[str, Pairs] | None = None,
        /,
        *,
        imports: Sequence[str] = (),
        known_versions: str = "",
        **more_members: Pairs,
    ):
        """Parses the pairs; touches nothing.

        Args:
            module: the module or its name.
            members: dotted member names (`"Outer.Inner.method"`) to pairs.
            imports: import statements whose names the replacements use. They become globals of the module.
            known_versions: the versions of the library that the pairs are known to match, for errors.
            **more_members: the same as `members`, where the name is an identifier.

        Raises:
            PatternSyntaxError: a pattern is not Python.
        """
        self.module_name = module if isinstance(module, str) else module.__name__
        self._module = None if isinstance(module, str) else module
        given = {**(members or {}), **more_members}
        frame = sys._getframe(1)
        pairs = [
            parse_pair(member, _located(pair, frame), Origin(frame.f_code.co_filename, frame.f_lineno))
            for member, each in given.items()
            for pair in pairs_of(each, member)
        ]
        self._request = Request(tuple(pairs), tuple(imports), Versions(self.module_name, known_versions))
        self._depth = 0

    def __repr__(self) -> str:
        return f"Patcher({self.module_name!r}, {len(self._request.pairs)} pairs, {'active' if self._depth else 'idle'})"

    def __enter__(self) -> "Patcher":
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()

    def install(self) -> None:
        """Patches the module in place, importing it if need be.

        Raises:
            PatchError: a pair does not match, or the change cannot be made. Nothing has changed then.
        """
        module = self._module or importlib.import_module(self.module_name)
        self.import_needed()
        with lock:
            if not self._depth:
                named = patched_module_of(module)
                done: list[PatchedModule] = []
                try:
                    parts = by_module(self._request, self.module_name, named.source, _source_of)
                    for name, part in parts.items():
                        state = named if name == self.module_name else patched_module_of(importlib.import_module(name))
                        if part.pairs:
                            state.set_requests([*state.requests, part])
                            done.append(state)
                except BaseException:
                    for state in reversed(done):
                        state.set_requests(state.without(self._request))
                    raise
            self._depth += 1

    def import_needed(self) -> None:
        """Imports what the new code uses; `install` does, too, and this need not hold the lock.

        Raises:
            PatchError: an import fails.
        """
        import_needed([self._request])

    def uninstall(self) -> None:
        """Takes the patches back, however they were made.

        Raises:
            PatchError: they are not installed, or were made on import and cannot be taken back.
        """
        with lock:
            if not self._depth:
                raise PatchError(f"{self!r} is not installed.")
            if self._depth == 1:
                stop_waiting(self._request)
                for state in patched_modules():
                    left = state.without(self._request)
                    if len(left) < len(state.requests):
                        state.set_requests(left)
            self._depth -= 1

    def install_on_import(self) -> None:
        """Patches the module as it is executed for the first time.

        Raises:
            AlreadyImportedError: the module has been imported.
        """
        with lock:
            if not self._depth:
                wait_for(self.module_name, self._request)
            self._depth += 1


def _source_of(name: str) -> SourceText:
    return patched_module_of(importlib.import_module(name)).source


@dataclasses.dataclass(frozen=True)
class Versions:
    """What is installed and what is known to match; looked up only when it is printed."""

    module_name: str
    known: str = ""
    """The versions that the pairs are known to match."""

    def __str__(self) -> str:
        top = self.module_name.split(".")[0]
        distributions = importlib.metadata.packages_distributions().get(top, [])
        installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(distributions))
        return f"Installed: {installed or f'{top}, version unknown'}. Known to match: {self.known or 'not stated'}."


def _located(pair: Pair, frame: types.FrameType) -> Pair:
    """The pair with the file and line of its two strings, where they are literals in the caller's source."""
    if pair.before_at and pair.after_at:
        return pair
    before_at = pair.before_at or _literal_at(pair.before, frame)
    return dataclasses.replace(pair, before_at=before_at, after_at=pair.after_at or _literal_at(pair.after, frame))


def _literal_at(text: str, frame: types.FrameType) -> Origin | None:
    filename, line = frame.f_code.co_filename, frame.f_lineno
    try:
        tree = ast.parse("".join(linecache.getlines(filename, frame.f_globals)))
    except SyntaxError:
        return None
    places = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == text]
    # The one next to the call, if the same text is written more than once.
    return Origin(filename, min(places, key=lambda place: abs(place - line))) if places else None

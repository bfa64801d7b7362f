"""Patching a module as it is executed for the first time.

A finder at the head of `sys.meta_path` asks the other finders for the module and puts a loader around theirs, which
runs the patched text in the place of the module's own. Whatever imports the module afterwards, and every name that is
taken out of it, is thus patched; nothing of the unpatched module ever exists. The module keeps its own loader and spec.

If a patch does not match, the import fails and will fail again: a model that silently lacks its sites is worse than
none.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

from interp_jax.patching.errors import AlreadyImportedError
from interp_jax.patching.installed_source import installed_source
from interp_jax.patching.patched_module import (
    PatchedModule,
    Request,
    by_module,
    find_source,
    import_needed,
    lock,
    patched_module_of,
    register,
)

_waiting: dict[str, list[Request]] = {}


class _PatchingFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _waiting.get(fullname):
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _PatchingFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _PatchingLoader(spec.loader)
                return spec
        return None


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with lock:
            requests = list(_waiting.get(name, ()))
        state = PatchedModule(name, find_source(name, module, self._loader), None)
        own: list[Request] = []
        for request in requests:
            for target, part in by_module(request, name, state.source, installed_source).items():
                if target == name:
                    own.append(part)
                elif target in sys.modules:
                    import_needed([part])
                    with lock:
                        other = patched_module_of(sys.modules[target])
                        other.set_requests([*other.without(request), part])
                elif part not in _waiting.get(target, []):
                    wait_for(target, part)
        state.run_patched(module, own)
        with lock:
            _waiting.pop(name, None)
            register(state)


def wait_for(name: str, request: Request) -> None:
    """Patches a module when it is imported.

    Args:
        name: the module, which must not have been imported.
        request: the patches.

    Raises:
        AlreadyImportedError: it has been.
    """
    with lock:
        if name in sys.modules:
            raise AlreadyImportedError(
                f"Module {name!r} has been imported already, so it cannot be patched on import. Ask for it "
                f"before the first "
                "import, or patch it in place with install()."
            )
        _waiting.setdefault(name, []).append(request)
        if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PatchingFinder())


def stop_waiting(request: Request) -> None:
    """Takes back `wait_for`, for a request and its parts, as far as their modules are still waited for."""
    with lock:
        for name, requests in list(_waiting.items()):
            requests[:] = [each for each in requests if not each.belongs_to(request)]
            if not requests:
                del _waiting[name]
        if not _waiting:
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PatchingFinder)]

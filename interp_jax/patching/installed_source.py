"""The source of modules as they are installed, found without running any of it.

`importlib.util.find_spec` imports the packages around a module; a look at a library should not, be it for the time that
takes or because the library no longer imports at all.
"""

import importlib.machinery
import importlib.metadata
import pathlib
import sys
from collections.abc import Iterator

from interp_jax.patching.errors import SourceError
from interp_jax.patching.patched_module import find_source
from interp_jax.patching.source_text import SourceText


def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """What a module would be loaded from.

    Args:
        name: dotted.

    Returns:
        Its spec, or None where it or a package around it does not exist.
    """
    path, spec = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        try:
            spec = next((found for finder in finders if (found := finder.find_spec(full, path))), None)
        except KeyError:
            # A namespace package: Python asks the package around it, which has not been imported, for its path.
            spec = importlib.machinery.ModuleSpec(full, None, is_package=True)
            folders = [pathlib.Path(folder, parts[end - 1]) for folder in path or ()]
            spec.submodule_search_locations = [str(folder) for folder in folders if folder.is_dir()]
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and end < len(parts):
            return None
    return spec


def installed_source(name: str) -> SourceText:
    """The source of a module.

    Args:
        name: dotted.

    Returns:
        Its text and tree.

    Raises:
        SourceError: the module does not exist, has no source, or is not Python for this interpreter.
    """
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise SourceError(f"There is no module {name!r}.")
    try:
        return find_source(name, None, spec.loader)
    except SyntaxError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SourceError(f"{error.filename}:{error.lineno}: {error.msg} (read by Python {version}).") from None


def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def modules_of(distribution: str) -> Iterator[tuple[str, str]]:
    """The modules of a distribution that are written in Python.

    Args:
        distribution: an installed one.

    Yields:
        Dotted name and text.
    """
    for file in importlib.metadata.files(distribution) or ():
        if file.suffix != ".py":
            continue
        parts = file.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        path = pathlib.Path(str(file.locate()))
        if path.is_file() and all(part.isidentifier() for part in parts):
            yield name, path.read_text(encoding="utf-8", errors="replace")

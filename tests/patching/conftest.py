"""Modules to patch, written for one test each."""

import importlib
import itertools
import linecache
import sys
import textwrap

import pytest

_numbers = itertools.count()


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module's file and gives its name; it can be imported and has not been."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(source, name=None):
        name = name or f"patched_example_{next(_numbers)}"
        path = tmp_path.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source).lstrip("\n"))
        written.append(name)
        importlib.invalidate_caches()
        return name

    yield write
    for name in written:
        module = sys.modules.pop(name, None)
        if module is not None:
            linecache.cache.pop(module.__file__, None)


@pytest.fixture
def make_module(write_module):
    """Writes a module and imports it."""
    return lambda source, name=None: importlib.import_module(write_module(source, name))

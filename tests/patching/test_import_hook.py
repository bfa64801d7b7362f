"""Patching modules as they are executed for the first time."""

import contextlib
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import threading

import pytest

from interp_jax.patching import AlreadyImportedError, DefinitionError, MatchError, MemberError, Patcher


@pytest.fixture
def waiting():
    """Installs patchers on import, and takes back what the test left."""
    made = []

    def install(*args, **kwargs):
        patcher = Patcher(*args, **kwargs)
        patcher.install_on_import()
        made.append(patcher)
        return patcher

    yield install
    for patcher in made:
        if "idle" not in repr(patcher):
            with contextlib.suppress(DefinitionError):  # What only an import could do cannot be undone.
                patcher.uninstall()


def test_every_alias_and_what_runs_at_import_is_patched(write_module, waiting):
    before = list(sys.meta_path)  # Patch sets that other tests installed may wait for their modules.
    name = write_module("def f(x):\n    return x + 1\n\nTABLE = [f(1)]\nalias = f\n")
    user = write_module(f"from {name} import f, TABLE\n")
    patcher = waiting(name, f=["x + 1", "x + 5"])
    aliases = importlib.import_module(user)
    module = sys.modules[name]
    assert (aliases.f(1), module.alias(1), aliases.TABLE) == (6, 6, [6])
    assert "x + 5" in inspect.getsource(aliases.f)
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert module.__loader__ is module.__spec__.loader
    patcher.uninstall()
    assert (aliases.f(1), aliases.TABLE) == (2, [6])
    assert "x + 1" in inspect.getsource(aliases.f)
    assert sys.meta_path == before


def test_class_headers_and_decorators_can_change_on_import(write_module, waiting):
    name = write_module("class A:\n    pass\n\nclass B:\n    def m(self):\n        return 1\n")
    waiting(name, B=["class B:\n    $...body", "class B(A, metaclass=type):\n    $...body"], A=["pass", "factor = 3"])
    module = importlib.import_module(name)
    assert issubclass(module.B, module.A)
    assert (module.B().m(), module.B.factor) == (1, 3)
    with pytest.raises(DefinitionError):
        Patcher(module, A=["class A:\n    $...body", "class A(dict):\n    $...body"]).install()


def test_a_pattern_in_decorators_and_keywords(write_module, waiting):
    name = write_module(
        "import functools\n\n@functools.lru_cache(maxsize=3)\ndef f(x):\n    return sorted(x, key=abs, reverse=True)\n"
    )
    waiting(name, f=["3", "7", "abs", "lambda v: -abs(v)"])
    module = importlib.import_module(name)
    assert module.f.cache_parameters()["maxsize"] == 7
    assert module.f((1, -3, 2)) == [1, 2, -3]


def test_asking_after_the_import_is_an_error(make_module):
    module = make_module("def f(x):\n    return x\n")
    with pytest.raises(AlreadyImportedError, match="before the first import"):
        Patcher(module.__name__, f=["x", "y"]).install_on_import()


def test_an_import_whose_patch_does_not_match_fails_each_time(write_module, waiting):
    name = write_module("def f(x):\n    return x\n")
    patcher = waiting(name, f=["x + 1", "x"])
    for _ in range(2):
        with pytest.raises(MatchError, match="matches 0 places in f"):
            importlib.import_module(name)
        assert name not in sys.modules
    patcher.uninstall()
    assert importlib.import_module(name).f(1) == 1


def test_relative_imports_and_members_that_a_package_passes_on(write_module, waiting):
    write_module("from .inner import f as g\nfrom .inner import C\n", "passing_on.__init__")
    inner = (
        "from . import other\n\ndef f(x):\n    return other.h(x) + 1\n\nclass C:\n    def m(self):\n        return 1\n"
    )
    write_module(inner, "passing_on.inner")
    write_module("def h(x):\n    return x * 2\n", "passing_on.other")
    patcher = waiting("passing_on", {"g": ["$x + 1", "$x + 2"], "C.m": ["1", "5"]})
    package = importlib.import_module("passing_on")
    try:
        assert (package.g(1), package.C().m(), package.inner.f(1)) == (4, 5, 4)
        patcher.uninstall()
        assert (package.g(1), package.C().m()) == (3, 1)
        with Patcher(package, {"g": ["$x + 1", "$x + 3"]}):
            assert package.g(1) == 5
        assert package.g(1) == 3
        with pytest.raises(MatchError):
            Patcher(package, {"g": ["$x + 1", "$x + 3"], "C.m": ["2", "5"]}).install()
        assert package.g(1) == 3
    finally:
        for name in [name for name in sys.modules if name.startswith("passing_on")]:
            del sys.modules[name]


def test_members_are_followed_through_packages_to_where_they_are_defined(write_module, waiting):
    write_module("from .a import *\nfrom .b import D as E\n", "chain.__init__")
    write_module("from .c import f, g as h\nfrom . import *\n", "chain.a")
    write_module("try:\n    from nowhere import *\nexcept ImportError:\n    from .c import *\n", "chain.b")
    write_module(
        "def f(x):\n    return x + 1\ng = lambda x: x + 1\nclass D:\n    def m(self):\n        return 1\n", "chain.c"
    )
    patcher = waiting("chain", {"f": ["x + 1", "x + 5"], "h": ["x + 1", "x + 6"], "E.m": ["1", "3"]})
    package = importlib.import_module("chain")
    try:
        for _ in range(2):
            assert (package.f(0), package.h(0), package.E().m()) == (5, 6, 3)
            patcher.uninstall()
            assert (package.f(0), package.h(0), package.E().m()) == (1, 1, 1)
            patcher.install()
        patcher.uninstall()
        with pytest.raises(MemberError, match="no member 'nothing'"):
            Patcher(package, nothing=["1", "2"]).install()
    finally:
        for name in [name for name in sys.modules if name.startswith("chain")]:
            del sys.modules[name]


def test_imports_of_a_patch_wait_for_no_thread_that_waits_for_the_patch(write_module, make_module, waiting):
    slow = write_module("import time\ntime.sleep(0.2)\ndef f(x):\n    return x + 1\n")
    user = write_module(f"import time\ntime.sleep(0.1)\nimport {slow}\ndef f(x):\n    return x + 1\n")
    module = make_module("def f(x):\n    return x + 1\n")
    for name in (slow, user):
        waiting(name, f=["x + 1", "x + 5"])
    other = Patcher(module, f=["x + 1", "x + 2"], imports=[f"import {user} as needed"])
    work = [lambda: importlib.import_module(user), other.install]
    threads = [threading.Thread(target=each, daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert module.f(0) == 2
    other.uninstall()


def test_a_failing_module_is_not_left_half_imported(write_module, waiting):
    name = write_module("def f(x):\n    return x\n\nraise OSError('not today')\n")
    waiting(name, f=["return x", "return 0"])
    for _ in range(2):
        with pytest.raises(OSError, match="not today"):
            importlib.import_module(name)
        assert name not in sys.modules


def test_a_fresh_process_patches_the_standard_library_without_jax(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys
import interp_jax.patching as patching

patching.known()
patching.load("transformers")
limit = ["if max_denominator < 1:\\n    $...body", ""]
patching.Patcher("fractions", {"Fraction.limit_denominator": limit}).install_on_import()
patching.Patcher("colorsys", rgb_to_yiq=["0.30*r", "0.5*r"]).install_on_import()
import colorsys, fractions, textwrap

assert colorsys.rgb_to_yiq(1, 0, 0)[0] == 0.5
fractions.Fraction(1, 3)
dedent = textwrap.dedent
with patching.Patcher("textwrap", dedent=["return text", "return text.upper()"]):
    assert dedent("  a") == "A"
assert dedent("  a") == "a"
assert "jax" not in sys.modules and "numpy" not in sys.modules, "JAX was imported"
print("fine")
"""
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=_root(), env=_environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def _root():
    return str(importlib.util.find_spec("interp_jax").submodule_search_locations[0]) + "/.."


def _environment():
    return {**os.environ, "PYTHONPATH": _root()}

"""Finding the source of a module without importing anything around it."""

import sys

import pytest

from interp_jax.patching.errors import SourceError
from interp_jax.patching.installed_source import find_spec, installed_source


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package that must not be imported, with a namespace package in it, and one in that."""
    package = tmp_path / "unimported_library"
    inner = package / "models" / "kinds"
    inner.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError\n")
    (inner / "model.py").write_text("layers = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package.name


def test_a_module_in_namespace_packages_of_a_package_that_was_not_imported(library):
    assert installed_source(f"{library}.models.kinds.model").text == "layers = 3\n"
    assert not [name for name in sys.modules if name.startswith(library)]


@pytest.mark.parametrize("rest", ["model", "models.model", "models.kinds.other", "other.kinds.model"])
def test_what_is_not_there(library, rest):
    assert find_spec(f"{library}.{rest}") is None
    with pytest.raises(SourceError, match="There is no module"):
        installed_source(f"{library}.{rest}")


def test_a_namespace_package_has_no_source(library):
    with pytest.raises(SourceError, match="There is no module"):
        installed_source(f"{library}.models")

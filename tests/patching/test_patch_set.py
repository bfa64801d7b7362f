"""Patch sets as files."""

import sys

import pytest

import interp_jax.patching as patching
from interp_jax.patching import patch_set

GOOD = '''
distribution = "example"   # before = 'no pair'
versions = ">=1,<2"
imports = ["from math import sqrt"]

[[modules]]
name = "MODULE"

[[modules.pairs]]
member = "f"
sites = ["embed"]
note = """
before = "no pair, either"
"""
before = "x + 1"
after = """
y = sqrt(x)
"""

[[modules.pairs]]
member = "f"
before = \'\'\'
return y
\'\'\'
after = 'return sqrt(y)'
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_set, "_OWN_FOLDERS", (tmp_path,))
    return tmp_path


def test_every_known_set_loads_with_places_that_are_right():
    assert "transformers" in patching.known()
    for name, path in patching.known().items():
        lines = path.read_text().split("\n")
        for pairs in patching.load(name).modules.values():
            for each in pairs:
                for text, at in ((each.pair.before, each.pair.before_at), (each.pair.after, each.pair.after_at)):
                    assert at.path == str(path)
                    assert text.split("\n")[0] in lines[at.line - 1].replace(r"\"", '"'), (name, at)


def test_places_of_patterns_in_the_file(folder):
    (folder / "example.toml").write_text(GOOD)
    first, second = patching.load("example").modules["MODULE"]
    lines = GOOD.split("\n")
    assert [lines[o.line - 1] for o in (first.pair.before_at, first.pair.after_at)] == [
        'before = "x + 1"',
        "y = sqrt(x)",
    ]
    assert [lines[o.line - 1] for o in (second.pair.before_at, second.pair.after_at)] == [
        "return y",
        "after = 'return sqrt(y)'",
    ]
    assert (first.sites, second.sites, first.member) == (("embed",), (), "f")


def test_install_before_and_after_the_import(folder, write_module):
    source = "def f(x):\n    y = 0\n    x + 1\n    return y\n"
    for when in ("before", "after"):
        name = write_module(source)
        (folder / f"example_{when}.toml").write_text(GOOD.replace("MODULE", name))
        if when == "after":
            __import__(name)
        try:
            patching.install(f"example_{when}")
            module = __import__(name)
            assert module.f(16) == 2.0
            assert patching.install(f"example_{when}").name == f"example_{when}"
        finally:
            patch_set._installed.pop(f"example_{when}", None)


def test_no_match_names_member_statement_and_versions(folder, make_module):
    name = make_module("def f(x):\n    return x\n").__name__
    (folder / "example.toml").write_text(GOOD.replace("MODULE", name))
    with pytest.raises(patching.MatchError) as caught:
        patching.install("example")
    text = str(caught.value)
    assert f"{folder / 'example.toml'}:15:" in text
    assert "in f (" in text
    assert "    x + 1" in text
    assert "Known to match: example >=1,<2" in text
    assert "Installed: " in text
    assert sys.modules[name].f(1) == 1


def test_an_unknown_set_lists_those_that_exist_and_where(folder):
    (folder / "gemma.toml").write_text(GOOD)
    with pytest.raises(patching.UnknownPatchSetError) as caught:
        patching.install("gemini")
    assert "Known: gemma" in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("distribution = ", "distribution "), "not TOML"),
        (("distribution = ", "distributor = "), "lacks 'distribution'"),
        (('sites = ["embed"]', "sites = 3"), "'sites' of pair 1 .* must be a list"),
        (('sites = ["embed"]', 'sight = "embed"'), "'sight', which means nothing"),
        (('member = "f"\nsites', 'note2 = "f"\nsites'), "pair 1 .* lacks 'member'"),
    ],
)
def test_a_file_that_is_no_patch_set(folder, change, message):
    (folder / "example.toml").write_text(GOOD.replace(*change))
    with pytest.raises(patching.PatchSetError, match=message):
        patching.load("example")


def test_a_pattern_s_syntax_error_is_found_when_the_set_is_made_ready(folder):
    (folder / "example.toml").write_text(GOOD.replace('"x + 1"', '"x +"'))
    with pytest.raises(patching.PatternSyntaxError, match=r"example.toml:15: (?s:.*)x \+\n"):
        patching.load("example").patchers()

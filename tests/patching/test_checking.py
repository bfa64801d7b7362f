"""`interp-jax patches check` and `show`: a library that has moved on from what a patch set knows."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import interp_jax.patching as patching

V1 = """
raise RuntimeError("a check runs nothing of the library")

class Block:
    def __call__(self, x, deterministic=True):
        residual = x
        x = self.attention(self.norm_1(x))
        x = residual + x
        residual = x
        x = self.mlp(self.norm_2(x), deterministic=deterministic)
        return residual + x

class Model:
    def __call__(self, tokens):
        return self.head(self.embed(tokens))
"""

SET = """
distribution = "a-library"
versions = ">=1,<2"
imports = ["from interp_jax.instrument import site"]

[[modules]]
name = "a_library.model"

[[modules.pairs]]
member = "Block.__call__"
sites = ["attn_out"]
before = "self.attention($x)"
after = 'site(self.attention($x), "attn_out")'

[[modules.pairs]]
member = "Block.__call__"
sites = ["mlp_out"]
before = '''
x = self.mlp($y, deterministic=deterministic)
'''
after = '''
x = site(self.mlp($y, deterministic=deterministic), "mlp_out")
'''

[[modules.pairs]]
member = "Block.__call__"
sites = ["resid_post"]
before = "return residual + x"
after = 'return site(residual + x, "resid_post")'

[[modules.pairs]]
member = "Model.__call__"
sites = ["embed"]
before = "self.embed(tokens)"
after = 'site(self.embed(tokens), "embed")'
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a distribution and a patch set for its first version; gives the set."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source, version="1.0", module="model", others=()):
        files = {f"a_library/{module}.py": source, "a_library/__init__.py": "", **dict(others)}
        files["a_library.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: a-library\nVersion: {version}\n"
        files["a_library.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "a_library.toml").write_text(SET)
        return patching.load(tmp_path / "mine" / "a_library.toml")

    return write


def _statuses(report):
    return [(each.pair.sites[0], each.status) for each in report.pairs]


def test_the_version_that_a_set_is_for_matches_and_is_not_run(library):
    report = patching.check(library(V1))
    assert report.fits
    assert report.is_known_version
    assert report.installed == "1.0"
    assert [each.status for each in report.pairs] == ["matched"] * 4
    assert report.pairs[0].where.endswith("model.py:7")
    assert "a_library" not in sys.modules


def test_a_version_that_is_not_known_and_matches_is_said_so(library):
    report = patching.check(library(V1, version="2.1"))
    assert report.fits
    assert not report.is_known_version
    assert "widen `versions`" in str(report)


def _proposed_set(report, tmp_path):
    """The set with each proposal in its pair's place, as a user would edit it."""
    pairs = [each.proposal or _as_toml(each.pair) for each in report.pairs]
    head = SET[: SET.index("[[modules.pairs]]")]
    path = tmp_path / "mine" / "proposed.toml"
    path.write_text(head + "\n\n".join(pairs))
    return patching.load(path)


def _as_toml(pair):
    return (
        f"[[modules.pairs]]\nmember = {pair.member!r}\nsites = {list(pair.sites)}\n"
        f"before = '''\n{pair.pair.before}\n'''\nafter = '''\n{pair.pair.after}\n'''"
    )


def test_a_renamed_method_gets_a_pair_that_matches(library, tmp_path):
    source = V1.replace("self.mlp", "self.feed_forward")
    report = patching.check(library(source))
    assert not report.fits
    assert _statuses(report) == [
        ("attn_out", "matched"), ("mlp_out", "moved"), ("resid_post", "matched"), ("embed", "matched"),
    ]  # fmt: skip
    moved = report.pairs[1]
    assert moved.explanation.startswith(".mlp is now .feed_forward")
    assert "x = self.feed_forward($y, deterministic=deterministic)" in moved.proposal
    proposed = _proposed_set(report, tmp_path)
    assert patching.check(proposed).fits
    (_, text), *_ = patching.patched_texts(proposed).values()
    assert 'x = site(self.feed_forward(self.norm_2(x), deterministic=deterministic), "mlp_out")' in text


def test_variables_and_keywords_renamed_together(library, tmp_path):
    source = V1.replace("deterministic", "is_inference").replace("residual", "skip")
    report = patching.check(library(source))
    assert _statuses(report) == [
        ("attn_out", "matched"), ("mlp_out", "moved"), ("resid_post", "moved"), ("embed", "matched"),
    ]  # fmt: skip
    assert "residual is now skip" in report.pairs[2].explanation
    assert patching.check(_proposed_set(report, tmp_path)).fits


def test_what_another_pair_matches_is_not_taken_for_renamed(library):
    # Without `norm_2` gone elsewhere, `self.attention(...)` would be a rename of `self.mlp` away.
    source = V1.replace("x = self.mlp(self.norm_2(x), deterministic=deterministic)", "x = x")
    report = patching.check(library(source))
    assert _statuses(report)[1] == ("mlp_out", "missing")
    assert report.pairs[1].proposal == ""


def test_ambiguous_renames_are_not_guessed(library):
    source = V1.replace("self.mlp(", "self.mlp_1(").replace(
        "        return residual",
        "        x = self.mlp_2(self.norm_3(x), deterministic=deterministic)\n        return residual",
    )
    report = patching.check(library(source))
    assert _statuses(report)[1] == ("mlp_out", "missing")
    assert "- x = self.mlp($y, deterministic=deterministic)" in report.pairs[1].explanation
    assert "+ x = self.mlp_1(self.norm_2(x), deterministic=deterministic)" in report.pairs[1].explanation


def test_a_renamed_class_is_known_by_its_code(library, tmp_path):
    report = patching.check(library(V1.replace("class Block", "class DecoderLayer")))
    assert _statuses(report) == [
        ("attn_out", "moved"), ("mlp_out", "moved"), ("resid_post", "moved"), ("embed", "matched"),
    ]  # fmt: skip
    assert "Block.__call__ is now a_library.model: DecoderLayer.__call__" in report.pairs[0].explanation
    assert 'member = "DecoderLayer.__call__"' in report.pairs[0].proposal
    assert patching.check(_proposed_set(report, tmp_path)).fits


def test_code_that_went_into_another_method(library, tmp_path):
    source = V1.replace("x = self.attention(self.norm_1(x))", "x = self.attend(x)").replace(
        "class Model", "    def attend(self, x):\n        return self.attention(self.norm_1(x))\n\nclass Model"
    )
    report = patching.check(library(source))
    assert _statuses(report)[0] == ("attn_out", "moved")
    assert 'member = "Block.attend"' in report.pairs[0].proposal
    assert patching.check(_proposed_set(report, tmp_path)).fits


QKV = "class A:\n    def m(self, x, layer=0):\n        q = self.q(x)\n        k = self.k(x)\n        return q * k\n"


@pytest.mark.parametrize(
    ("source", "before", "after", "proposed"),
    [
        # Renames, and how the new pair is written.
        (QKV.replace(".k(", ".key("), "k = self.k(x)", "k = site(self.k(x))", "before = 'k = self.key(x)'"),
        (QKV.replace("layer", "index"), "def m(self, x, layer=0):\n    $...b",
         "def m(self, x, layer=0):\n    note(layer)\n    $...b", "note(index)"),
        (QKV.replace("q * k", "q * self.keep"), "return q * self.kept", "return site(q * self.kept)",
         "site(q * self.keep)"),
        # What looks like one and may not be.
        (QKV.replace(".k(", ".f(").replace(".q(", ".k(").replace(".f(", ".q("), "q = self.q(x)\nk = self.k(x)",
         "q = site(self.q(x))\nk = self.k(x)", ""),
        (QKV.replace("return q * k", "return self.head(q * k)"), "self.embed($x)", "site(self.embed($x))", ""),
        (QKV.replace("k = ", "layer = "), "k = self.k(x)", "layer, k = 0, self.k(x)", ""),
        (QKV.replace("        q = self.q(x)\n", "") + "\n    def other(self, x):\n        q = self.q(x)\n",
         "q = self.q(x)", "q = site(self.q(x))", ""),
        (QKV.replace("class A", "class Other").replace("self.q", "self.w_q") + "\n\nclass B:\n    def m(self, x):\n"
         "        q = self.q(x)\n", "q = self.q(x)", "q = site(self.q(x))", ""),
    ],
)  # fmt: skip
def test_a_new_pair_is_proposed_only_where_it_is_beyond_doubt(library, tmp_path, source, before, after, proposed):
    library(source)
    path = tmp_path / "mine" / "other.toml"
    head = 'distribution = "a-library"\nversions = ""\n[[modules]]\nname = "a_library.model"\n'
    members = ["A.m", "B.m"] if "class B" in source else ["A.m"]
    pairs = [f"[[modules.pairs]]\nmember = '{m}'\nbefore = '''{before}'''\nafter = '''{after}'''\n" for m in members]
    path.write_text(head + "".join(pairs))
    report = patching.check(patching.load(path))
    assert report.pairs[0].status == ("moved" if proposed else "missing")
    assert proposed in report.pairs[0].proposal
    if proposed:
        path.write_text(head + report.pairs[0].proposal)
        assert patching.check(patching.load(path)).fits


def test_a_module_that_moved(library):
    report = patching.check(
        library(V1, module="layers", others={"a_library/other.py": "class Elsewhere: pass\n"}.items())
    )
    assert [each.status for each in report.pairs] == ["moved"] * 4
    assert "# under the module a_library.layers" in report.pairs[0].proposal


def test_a_package_that_passes_a_member_on_is_no_change(library):
    report = patching.check(
        library("from a_library.inner import Block, Model\n", others={"a_library/inner.py": V1}.items())
    )
    assert report.fits
    assert report.pairs[0].where.endswith("inner.py:7")


def test_a_member_that_is_gone(library):
    report = patching.check(library(V1[: V1.index("class Model")]))
    assert _statuses(report)[3] == ("embed", "missing")
    assert "defines no member 'Model.__call__'" in report.pairs[3].explanation


def test_pairs_that_match_and_cannot_be_made_together(library, tmp_path):
    library(V1)
    path = tmp_path / "mine" / "clash.toml"
    path.write_text(
        SET + "\n[[modules.pairs]]\nmember = 'Block.__call__'\nbefore = 'residual + x'\nafter = 'x'\ncount = 2\n"
    )
    report = patching.check(patching.load(path))
    assert [each.status for each in report.pairs] == ["matched"] * 5
    assert not report.fits
    assert "cannot be made together" in str(report)


def test_a_library_that_is_not_installed(tmp_path):
    path = tmp_path / "a_library.toml"
    path.write_text(SET)
    report = patching.check(patching.load(path))
    assert not report.fits
    assert str(report) == "a_library: a-library is not installed."


def _command(tmp_path, *arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **variables}
    command = [sys.executable, "-W", "error", "-m", "interp_jax.cli", "patches", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_s_exit_status_is_for_ci(library, tmp_path):
    mine = str(library(V1).path)
    fine = _command(tmp_path, "check", mine)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout.startswith("a_library: a-library 1.0 (known: >=1,<2): 4 matched\n")
    (tmp_path / "a_library" / "model.py").write_text(V1.replace("self.mlp", "self.feed_forward"))
    changed = _command(tmp_path, "check", "a_library", INTERP_JAX_PATCHES=str(tmp_path / "mine"))
    assert changed.returncode == 1
    assert "3 matched, 1 moved" in changed.stdout
    assert _command(tmp_path, "check", INTERP_JAX_PATCHES=str(tmp_path / "mine")).returncode == 1


def test_show_is_a_diff_that_patch_applies(library, tmp_path):
    shown = _command(tmp_path, "show", str(library(V1).path))
    assert shown.returncode == 0, shown.stderr
    assert "--- a/a_library/model.py" in shown.stdout
    changed = [line for line in shown.stdout.splitlines() if line.startswith(("+ ", "- "))]
    assert len(changed) == 8
    assert changed[0] == "-        x = self.attention(self.norm_1(x))"
    assert changed[1].startswith('+        x = site(self.attention(self.norm_1(x)), "attn_out")  # ')
    assert "from interp_jax.instrument import site" in shown.stderr
    subprocess.run(["patch", "-p1", "--quiet"], input=shown.stdout, text=True, cwd=tmp_path, check=True)
    assert 'site(self.embed(tokens), "embed")' in (tmp_path / "a_library" / "model.py").read_text()


def test_list_and_mistakes(library, tmp_path):
    library(V1)
    rows = _command(tmp_path, "list", INTERP_JAX_PATCHES=str(tmp_path / "mine")).stdout.splitlines()
    (row,) = [row for row in rows if row.startswith("a_library ")]
    assert row.split() == [
        "a_library",
        "a-library",
        ">=1,<2",
        "1.0",
        "1",
        "4",
        str(tmp_path / "mine" / "a_library.toml"),
    ]
    unknown = _command(tmp_path, "check", "nothing")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("UnknownPatchSetError: There is no patch set 'nothing'. Known: ")
    unnamed = _command(tmp_path, "show")
    assert unnamed.returncode == 1
    assert "Say which set to show: " in unnamed.stderr


def test_sets_of_a_user_s_folder_and_of_another_distribution(library, tmp_path, monkeypatch):
    library(V1, others={
        "a_library/sets/other.toml": SET, "a_library/sets/a_library.toml": SET.replace("# mine", ""),
        "a_library.dist-info/entry_points.txt": "[interp_jax.patches]\na = a_library.sets\n",
        "a_library/sets/__init__.py": "raise RuntimeError('looking for sets runs nothing')\n",
    }.items())  # fmt: skip
    assert patching.known()["other"] == tmp_path / "a_library" / "sets" / "other.toml"
    assert patching.known()["a_library"].parent.name == "sets"
    monkeypatch.setenv("INTERP_JAX_PATCHES", str(tmp_path / "mine"))
    assert patching.known()["a_library"].parent.name == "mine"
    assert patching.load("other").distribution == "a-library"
    assert "transformers" in patching.known()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(patching.UnknownPatchSetError, match=r"There is no file .*nothing\.toml"):
        patching.load(pathlib.Path(tmp_path) / "nothing.toml")

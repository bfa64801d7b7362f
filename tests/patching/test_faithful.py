"""Rewriting at scale: modules of the standard library, patched in hundreds of places at once.

The new text must be the program that the same edits make on the tree, and what is not replaced must stand where it was.
"""

import argparse
import ast
import functools
import inspect
import pathlib
import types

import pytest

from interp_jax.patching import Pair, Patcher
from interp_jax.patching.layout import lay_out
from interp_jax.patching.matching import equal, find
from interp_jax.patching.pattern import Origin, parse_pattern
from interp_jax.patching.rewriting import TextRewriter, TreeRewriter, make_edit
from interp_jax.patching.source_text import SourceText

PATTERNS = [
    ("return $x", "return wrap($x)"),
    ("return $x", "y = $x\nreturn y"),
    ("for $i in $s:\n    $...body", "start()\nfor $i in wrap($s):\n    $...body\n    end()"),
    ("if $c:\n    $...body", "with x:\n    if $c:\n        $...body"),
    ("def $f($...p):\n    $...body", "def $f($...p):\n    enter()\n    $...body"),
    ("$f($...a)", "call($f, $...a)"),
    ("$x + $y", "add($x, $y)"),
    ("$x if $c else $y", "pick($c, $x, $y)"),
    ("raise $x", ""),
    ("with $c as $v:\n    $...b", "$v = $c\ntry:\n    $...b\nfinally:\n    $v.close()"),
]


def _without_pass(tree):
    for node in ast.walk(tree):
        for _, block in ast.iter_fields(node):
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                block[:] = [statement for statement in block if not isinstance(statement, ast.Pass)]
    return tree


@pytest.mark.parametrize("module", [argparse, inspect, functools, pathlib, types], ids=lambda module: module.__name__)
@pytest.mark.parametrize(("before", "after"), PATTERNS)
def test_text_and_tree_agree_and_kept_lines_stay(module, before, after):
    path = module.__file__
    text = pathlib.Path(path).read_text()
    source = SourceText(text, path)
    before, after = parse_pattern(before, Origin("p", 1)), parse_pattern(after, Origin("p", 1))
    is_expression = before.expression is not None and after.expression is not None
    strings = [node for node in ast.walk(source.tree) if isinstance(node, ast.JoinedStr)]
    hidden = {node for string in strings for node in ast.walk(string) if node is not string}
    edits = []
    for match in find(before, [source.tree], as_expression=is_expression):
        edit = make_edit(source, match, after, is_expression=is_expression, label="")
        inside_another = edits and edit.start < edits[-1].end
        if match.nodes[0] not in hidden and not inside_another:
            edits.append(edit)
    layout = lay_out(source, TextRewriter(source, edits).render(0, len(text)))
    tree = layout.parse(path)
    compile(tree, path, "exec")
    assert len(layout.entries) == len(source.lines)
    touched = {line for edit in edits for line in range(source.line_at(edit.start), source.line_at(edit.end) + 1)}
    for number, (line, entry) in enumerate(zip(source.lines, layout.entries, strict=True), 1):
        # A blank line may have given way, and a line may have been folded with what was inserted next to it.
        assert number in touched or not line.strip() or line in entry
    assert equal(_without_pass(TreeRewriter(edits).rebuild(source.tree)), _without_pass(tree))


def test_a_parenthesis_in_the_text_of_an_f_string_is_none(make_module):
    source = """
        def f(x):
            return str(
                "a "
                f"({x!r})."
            )
        """
    module = make_module(source)
    with Patcher(module, f=["str($...a)", "repr(str($...a))"]):
        assert module.f(1) == repr("a (1).")
    assert module.f(1) == "a (1)."


def test_a_string_of_several_lines_stays_whole_where_the_lines_above_it_go(make_module):
    source = (
        'def f(x):\n    y = str(\n        x,\n        """one\n\ntwo""")\n    return y\n\n\ndef g():\n    return 1\n'
    )
    module = make_module(source)
    with Patcher(module, f=["str($x, $y)", "$y"]):
        assert module.f(0) == "one\n\ntwo"
        assert inspect.getsource(module.g) == "def g():\n    return 1\n"
        assert module.f.__code__.co_firstlineno == 1
        assert "return y" in inspect.getsource(module.f)


def test_inspect_finds_the_patched_text_of_functions_and_classes(make_module):
    function = "def f{0}(x):\n    if x:\n        x += {0}\n    return x\n\n\n"
    source = "".join((function + "class C{0}:\n    def m(self):\n        return {0}\n\n\n").format(i) for i in range(6))
    module = make_module(source)
    patches = {f"f{i}": ["x += $n", "log = $n\nx += log"] for i in range(6)}
    patches |= {f"C{i}.m": [Pair("return $n", "n = $n\nreturn n")] for i in range(0, 6, 2)}
    with Patcher(module, patches):
        for i in range(6):
            text = ast.unparse(ast.parse(inspect.getsource(getattr(module, f"f{i}"))))
            assert text == f"def f{i}(x):\n    if x:\n        log = {i}\n        x += log\n    return x"
            body = f"n = {i}\n        return n" if i % 2 == 0 else f"return {i}"
            text = ast.unparse(ast.parse(inspect.getsource(getattr(module, f"C{i}"))))
            assert text == f"class C{i}:\n\n    def m(self):\n        {body}"

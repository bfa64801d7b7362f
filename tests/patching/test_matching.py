"""What a pattern matches, and what the replacement makes of it."""

import ast
import inspect
import sys

import pytest

from interp_jax.patching import ConflictError, MatchError, Pair, Patcher, PatchError, PatternSyntaxError


def _patched(make_module, source, *pairs, **names):
    """The function f of a module after patching, in its text without the comments that name the patch."""
    module = make_module(source)
    vars(module).update(names)
    with Patcher(module, f=list(pairs)):
        return ast.unparse(ast.parse(inspect.getsource(module.f)))


def _same(actual, expected):
    assert actual == ast.unparse(ast.parse(expected))


@pytest.mark.parametrize(
    ("body", "before", "after", "expected"),
    [
        ("return g(a, b)", "g(a, b)", "h(b)", "return h(b)"),
        ("return g( a,\n        b )  # why", "g(a,b)", "h(b)", "return h(b)"),
        ("return g(a + 1)", "g($x)", "h($x, 2)", "return h(a + 1, 2)"),
        ("return g(a + 1)", "g($x)", "$x * 2", "return (a + 1) * 2"),
        ("return -g(a) ** 2", "g($x)", "$x + 1", "return -(a + 1) ** 2"),
        ("return g(a).real", "g($x)", "3", "return (3).real"),
        ("return g(a).real", "g($x)", "$x", "return a.real"),
        ("return g(x for x in a)", "g($x)", "h($x, 1)", "return h((x for x in a), 1)"),
        ("return g(x for x in a)", "(x for x in a)", "a", "return g(a)"),
        ("return g(a, k=g(b))", "g(b)", "c", "return g(a, k=c)"),
        ("return g(k=a, *b, **c)", "g($...all)", "h(1, $...all)", "return h(1, k=a, *b, **c)"),
        ("return g(a, b, dtype=c, z=1)", "g($...p, dtype=$t, $...q)", "g($...p, $...q)", "return g(a, b, z=1)"),
        ("return g()", "g($...p)", "h($...p, k=1)", "return h(k=1)"),
        ("return [a, b, c]", "[$...p, c]", "[c, $...p]", "return [c, a, b]"),
        ("return a + a", "$x + $x", "2 * $x", "return 2 * a"),
        ("return a.first(b)", "a.$m($x)", "c.$m($x)", "return c.first(b)"),
        ("return 1", "1", "2", "return 2"),
        ("return 'a' 'b'", '"ab"', "0", "return 0"),
        ("a[b] = c\nreturn a[b]", "return a[b]", "return 0", "a[b] = c\nreturn 0"),
        ("a = b\nc = d\nreturn c", "c = d", "", "a = b\nreturn c"),
        ("if a:\n    b()\nreturn 1", "b()", "", "if a:\n    pass\nreturn 1"),
        ("a = b\nreturn a", "a = b", "a = b\na += 1\na += 2", "a = b\na += 1\na += 2\nreturn a"),
        ("for i in a:\n    b()\n    c()\nreturn 1", "for $i in $s:\n    $...body",
         "for $i in rev($s):\n    $...body\n    d()",
         "for i in rev(a):\n    b()\n    c()\n    d()\nreturn 1"),
        ("for i in a:\n    b('''\n    x''')\n    c()", "for $i in $s:\n    $...body",
         "with d:\n    for $i in $s:\n        if $i:\n            $...body",
         "with d:\n    for i in a:\n        if i:\n            b('''\n    x''')\n            c()"),
        ("for i in a:\n    b()\n    c()", "for $i in $s:\n    $...body", "$...body", "b()\nc()"),
        ("b(); c(); d()", "c()", "e(); f()", "b(); e(); f(); d()"),
        ("b(); c()", "b()", "", "pass; c()"),
        ("if a: b()", "b()", "c()\nd()", "if a: c(); d()"),
        ("if a: b()\nelse: c()  # why", "c()", "for d in a:\n    c()",
         "if a: b()\nelse:\n    for d in a:\n        c()"),
        ("match a:\n    case 1: b()\nc()", "b()", "if a:\n    b()",
         "match a:\n    case 1:\n        if a:\n            b()\nc()"),
        ("a = 1\nb = 2\nc = 3", "$...first\nc = $x", "c = $x\n$...first", "c = 3\na = 1\nb = 2"),
        ("a = (b +\n     c)\nreturn a", "a = $x", "a = g($x)\na = $x", "a = g(b + c)\na = b + c\nreturn a"),
        ("return lambda x: g(x)", "g($x)", "h($x)", "return lambda x: h(x)"),
        ("é = 'ü'; return g(é, 'ß')", "g($x, $y)", "h($y, $x)", "é = 'ü'; return h('ß', é)"),
        ("x: int = g(a)\nreturn x", "g($x)", "$x", "x: int = a\nreturn x"),
        ("return b if a else c", "$x if $c else $y", "$y if $c else $x", "return c if a else b"),
        ("return (y := a) + y", "$x + y", "g($x)", "return g((y := a))"),
        ("return not a", "a", "a and b", "return not (a and b)"),
        ("return a[1:2]", "a", "(b, c)", "return (b, c)[1:2]"),
        ("return a[1:2]", "$x[$i]", "g($x)[$i]", "return g(a)[1:2]"),
        ("return a[:, 1]", "$x[$i]", "g($x)[$i]", "return g(a)[:, 1]"),
        ("return a[b, c]", "$x[$i]", "g($x, $i)", "return g(a, (b, c))"),
        ("return f'b{a}', 'b'", "'b'", "'c'", "return f'b{a}', 'c'"),
        ("return 'a\tb'", "'a\tb'", "'c\td'", "return 'c\td'"),
        ("return g(*a), g(b)", "g($x)", "$x", "return g(*a), b"),
    ],
)  # fmt: skip
def test_replacement(make_module, body, before, after, expected):
    indented = "\n".join("    " + line for line in body.split("\n"))
    source = f"def f(a, b, c, d):\n{indented}\n"
    wanted = "def f(a, b, c, d):\n" + "\n".join("    " + line for line in expected.split("\n"))
    if "'''" in body:  # A string's own lines are not to be indented.
        source = source.replace("\n        x'''", "\n    x'''")
        wanted = wanted.replace("\n        x'''", "\n    x'''")
    _same(_patched(make_module, source, before, after), wanted)


@pytest.mark.parametrize(
    "parameters",
    [
        "a",
        "a, /",
        "*, a",
        "*a",
        "**a",
        "a=(1),",
        "a=(1, 2), *, b: int = (3)",
        "a: 'x' = ')', /, *, b='('",
        "\n  a,  # )\n",
    ],
)
def test_a_run_of_all_parameters(make_module, parameters):
    source = f"def f({parameters}) -> int:\n    return 1\n"
    changed = ["def f($...p) -> int:\n    $...b", "def f($...p) -> str:\n    print()\n    $...b"]
    _same(_patched(make_module, source, *changed), f"def f({parameters}) -> str:\n    print()\n    return 1")
    if ":" not in parameters and "#" not in parameters:
        source = f"def f():\n    return lambda {parameters}: 1\n"
        after = _patched(make_module, source, "lambda $...p: 1", "g(lambda $...p: 2)")
        _same(after, f"def f():\n    return g(lambda {parameters}: 2)")


def test_strings_in_an_indented_pattern_stay_as_they_are(make_module):
    source = 'def f():\n    x = """one\n  two\n\n    three"""\n    return x\n'
    before = """
        x = \"""one
  two

    three\"""
    """
    with Patcher(module := make_module(source), f=[before, before.replace("one", "1")]):
        assert module.f() == "1\n  two\n\n    three"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tells no positions inside f-strings")
def test_inside_f_strings(make_module):
    source = """
    def f(a):
        return f"{g(a)!r:>{a + 1}}"
    """
    after = _patched(make_module, source, "g($x)", "{'b': $x}", "a + 1", "a + 2")
    _same(after, """def f(a):\n    return f"{({'b': a})!r:>{a + 2}}\"""")
    with pytest.raises(MatchError, match="shows its code as text"):
        Patcher(make_module("def f(a):\n    return f'{a + 1=}'\n"), f=["a + 1", "a"]).install()


def test_a_pattern_matches_targets_and_values(make_module):
    source = """
    def f(a):
        x[0] = a
        return x[0]
    """
    actual = _patched(make_module, source, Pair("x[0]", "y[0]", count=2), x=[0], y=[0])
    _same(actual, "def f(a):\n    y[0] = a\n    return y[0]")


def test_patterns_match_the_original_and_not_each_other_s_output(make_module):
    source = """
    def f(a):
        return g(a) + h(a)
    """
    _same(_patched(make_module, source, "g($x)", "h($x)", "h($x)", "g($x)"), "def f(a):\n    return h(a) + g(a)")


def test_one_pair_may_work_inside_what_another_carries_over(make_module):
    source = """
    def f(a):
        return g(h(a) + 1)
    """
    actual = _patched(make_module, source, "return $x", "y = $x\nreturn y", "h($x)", "k($x)")
    _same(actual, "def f(a):\n    y = g(k(a) + 1)\n    return y")


def test_overlapping_pairs_are_refused(make_module):
    module = make_module("def f(a):\n    return g(h(a))\n")
    with pytest.raises(ConflictError, match=r"same code.*f at"):
        Patcher(module, f=["g(h(a))", "1", "h(a)", "2"]).install()


def test_too_many_matches_name_their_lines(make_module):
    module = make_module("def f(a):\n    b = g(a)\n    return g(b)\n")
    with pytest.raises(MatchError, match=r"matches 2 places in f(?s:.*)line 2: b = g\(a\)\n    line 3(?s:.*)count="):
        Patcher(module, f=["g($x)", "h($x)"]).install()
    with Patcher(module, f=[Pair("g($x)", "($x, 1)", count=2)]):
        assert module.f(0) == ((0, 1), 1)


def test_no_match_says_what_was_looked_for_and_what_is_nearest(make_module):
    module = make_module("def f(self, a):\n    x = 1\n    h = self.mlp(a, deterministic=True)\n    return h\n")
    with pytest.raises(MatchError) as caught:
        Patcher(module, f=["h = self.mlp(a)", "h = 0"], known_versions="1.2").install()
    text = str(caught.value)
    assert "matches 0 places in f" in text
    assert "- h = self.mlp(a)" in text
    assert "+ h = self.mlp(a, deterministic=True)" in text
    assert "line 3" in text
    assert "Known to match: 1.2" in text
    assert __file__ in text


def test_a_pattern_s_syntax_error_has_file_line_and_caret():
    with pytest.raises(PatternSyntaxError) as caught:
        Patcher("anything", f=["$x + 1", "one\ntwo + $x three"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{__file__}:")
    assert lines[1].strip() == "two + $x three"
    assert lines[2].index("^") - lines[1].index("two") in (6, 9)


def test_an_unbound_metavariable_is_refused():
    with pytest.raises(PatternSyntaxError, match=r"\$y is not bound .*bound: \$x"):
        Patcher("anything", f=["g($x)", "g($y)"])


def test_a_replacement_that_does_not_fit_leaves_everything_alone(make_module):
    module = make_module("def f(a):\n    b = a\n    return b\n")
    with pytest.raises(PatchError, match="no longer Python"):
        Patcher(module, f=[Pair("b", "g(1)", count=2)]).install()
    assert module.f(3) == 3


def test_nothing_is_applied_if_one_pair_does_not_match(make_module):
    module = make_module("def f(a):\n    return a\n\ndef g(a):\n    return a\n")
    with pytest.raises(MatchError):
        Patcher(module, f=["return a", "return 1"], g=["return b", "return 2"]).install()
    assert (module.f(0), module.g(0)) == (0, 0)

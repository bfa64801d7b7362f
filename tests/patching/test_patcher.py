"""Patching modules that have run: what sees the patch, what tools show, and that all is as it was afterwards."""

import inspect
import io
import linecache
import math
import pathlib
import pdb
import sys
import threading
import traceback
import types

import pytest

from interp_jax.patching import (
    AlreadyImportedError,
    ConflictError,
    DefinitionError,
    MemberError,
    Patcher,
    PatchError,
    SourceError,
)

CONSTRUCTS = '''
from __future__ import annotations

import dataclasses
import functools
import math as mathematics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nowhere import Nothing

SCALE = 10


def plain(x: Nothing) -> Nothing:
    """What plain does."""
    y = x + 1  # add one
    return y * SCALE


def decorated_by_closure(fn):
    def inner(x):
        return fn(x)

    return inner


@decorated_by_closure
def hidden(x):
    return x + 1


@functools.lru_cache
def cached(x):
    return x + 1


def counter(start):
    step = 2
    unused = 7

    def count(x):
        nonlocal start
        start += step
        return start + x + unused - 7

    return count


class Base:
    def __init__(self, x):
        self.x = x

    def value(self):
        return self.x + 1

    def describe(self):
        return "base"


class Derived(Base):
    __secret = 5

    def value(self):
        return super().value() * 2

    def without_super(self):
        return self.x + 1

    def mangled(self):
        return self.__secret + 1

    @property
    def doubled(self):
        return self.x + 1

    @doubled.setter
    def doubled(self, to):
        self.x = to + 1

    @staticmethod
    def static(x):
        return x + 1

    @classmethod
    def of(cls, x):
        return cls(x + 1)

    class Inner:
        def method(self):
            return 1 + 1


@dataclasses.dataclass
class Point:
    x: int = 0

    def moved(self):
        return Point(self.x + 1)


def generator(n):
    for i in range(n):
        yield i + 1


async def coroutine(x):
    return x + 1


halved = functools.partial(plain)
'''


@pytest.fixture
def module(make_module):
    return make_module(CONSTRUCTS)


ONE_MORE = ["$x + 1", "$x + 100"]


def _run(coroutine):
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("plain", lambda m: m.plain(0) // 10),
        ("plain", lambda m: m.halved(0) // 10),
        ("hidden", lambda m: m.hidden(0)),
        ("cached", lambda m: m.cached.__wrapped__(0)),
        ("Base.value", lambda m: m.Base(0).value()),
        ("Base.value", lambda m: m.Derived(0).value() // 2),
        ("Derived.mangled", lambda m: m.Derived(0).mangled() - 5),
        ("Derived.static", lambda m: m.Derived.static(0)),
        ("Derived.of", lambda m: m.Derived.of(0).x),
        ("Point.moved", lambda m: m.Point(0).moved().x),
        ("generator", lambda m: next(m.generator(1))),
        ("coroutine", lambda m: _run(m.coroutine(0))),
    ],
)
def test_members_of_every_kind(module, member, value):
    assert value(module) == 1
    with Patcher(module, {member: ONE_MORE}):
        assert value(module) == 100
    assert value(module) == 1


def test_dotted_members_and_accessors(module):
    with Patcher(
        module,
        {"Derived.Inner.method": ["1 + 1", "7"], "Derived.doubled": ["self.x + 1", "self.x + 2", "to + 1", "to"]},
    ):
        assert module.Derived.Inner().method() == 7
        thing = module.Derived(0)
        thing.doubled = 5
        assert thing.doubled == 7
    assert thing.doubled == 6


def test_objects_and_aliases_made_before_see_the_patch_inside_and_not_after(module):
    thing, method, alias, static = module.Derived(1), module.Derived(1).value, module.plain, module.Derived.static
    count = module.counter(0)
    before = [f.__code__ for f in (alias, static, method.__func__, count)]
    patches = {
        "Derived.value": ["super().value() * 2", "super().value() * 3"],
        "counter.count": ["start + x", "start - x"],
    }
    with Patcher(module, patches, plain=ONE_MORE):
        assert (thing.value(), method(), alias(0), count(1)) == (6, 6, 1000, 1)
        assert isinstance(thing, module.Derived)
    assert (thing.value(), method(), alias(0), count(1)) == (4, 4, 10, 5)
    assert before == [f.__code__ for f in (alias, static, method.__func__, count)]
    assert all(a is b.__code__ for a, b in zip(before, (alias, static, method.__func__, count), strict=True))


def test_closure_variables_may_fall_away_and_the_first_super_may_come(module):
    count = module.counter(0)
    with Patcher(module, {"counter.count": ["start + x + unused - 7", "start + x"]}):
        assert count(1) == 3
    thing = module.Derived(1)
    with Patcher(module, {"Derived.without_super": ["self.x + 1", "super().describe() + __class__.__name__"]}):
        assert thing.without_super() == "baseDerived"
    with Patcher(module, {"Derived.without_super": ["self.x + 1", "(lambda: super(Derived, self).describe())()"]}):
        assert thing.without_super() == "base"
    assert thing.without_super() == 2
    assert not [name for name in vars(module) if name.startswith("_interp_jax")]


def test_a_closure_that_lacks_a_cell_is_an_error(module):
    count = module.counter(0)
    with pytest.raises(DefinitionError, match=r"uses fn from the scope around"):
        Patcher(module, counter=["return count", "fn = 3\nreturn count", "start + x", "start + fn"]).install()
    assert count(1) == 3


def test_patched_code_shares_live_globals_and_imports_leave_again(module):
    with Patcher(
        module, plain=["y * SCALE", "sqrt(y * SCALE)"], imports=["from math import sqrt", "import os.path as p"]
    ):
        module.SCALE = 4
        assert module.plain(0) == 2.0
        assert module.sqrt is math.sqrt
    assert not {"sqrt", "p"} & vars(module).keys()
    assert module.plain(0) == 4


def test_a_name_that_is_taken_is_refused(module):
    with pytest.raises(ConflictError, match="has that name already"):
        Patcher(module, plain=ONE_MORE, imports=["from math import sqrt as SCALE"]).install()
    with pytest.raises(ConflictError, match="variable 'y' of its own"):
        Patcher(module, plain=ONE_MORE, imports=["from math import sqrt as y"]).install()
    assert module.plain(0) == 10


def test_patchers_nest_and_leave_in_any_order(module):
    a = Patcher(module, plain=["$x + 1", "$x + 2"])
    b = Patcher(module, plain=["y * SCALE", "y"], cached=ONE_MORE)
    a.install()
    b.install()
    with a:
        assert module.plain(0) == 2
    a.uninstall()
    assert module.plain(0) == 1
    b.uninstall()
    assert module.plain(0) == 10
    with pytest.raises(PatchError, match="not installed"):
        b.uninstall()


def test_two_patchers_that_collide_are_refused_and_the_first_stays(module):
    with Patcher(module, plain=ONE_MORE), pytest.raises(ConflictError, match="same code"):
        Patcher(module, plain=["x + 1", "x"]).install()
    with Patcher(module, plain=ONE_MORE):
        assert module.plain(0) == 1000
    assert module.plain(0) == 10


def test_an_exception_leaves_everything_as_it_was(module):
    code = module.plain.__code__
    with pytest.raises(ZeroDivisionError), Patcher(module, plain=["y * SCALE", "1 / 0"]):
        module.plain(0)
    assert module.plain.__code__ is code
    assert module.__file__ not in linecache.cache or linecache.cache[module.__file__][1] is not None


def test_threads_see_the_patch_and_may_install_at_once(module):
    patchers = [
        Patcher(module, plain=["y * SCALE", "y"]),
        Patcher(module, cached=ONE_MORE),
        Patcher(module, hidden=ONE_MORE),
    ]
    failures = []

    def work(patcher):
        try:
            for _ in range(3):
                with patcher:
                    pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in patchers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (module.plain(0), module.hidden(0)) == (10, 1)


# ------------------------------------------------------------------ what tools show


def test_source_lines_and_comments(module):
    original = inspect.getsource(module)
    first = module.Point.moved.__code__.co_firstlineno
    with Patcher(
        module,
        plain=["y = $x", "y = $x\ny = y - 1"],
        hidden=["return x + 1", "if x:\n    for _ in 'a':\n        return x\nreturn 1"],
    ):
        text = inspect.getsource(module.plain)
        assert "y = x + 1; y = y - 1  # add one  # " in text or "# add one" in text
        assert __file__ in text
        assert "for _ in 'a':" in inspect.getsource(module.hidden.__closure__[0].cell_contents)
        assert inspect.getsource(module.Point.moved).strip().startswith("def moved")
        assert module.Point.moved.__code__.co_firstlineno == first
        assert module.hidden(3) == 3
    assert inspect.getsource(module) == original


def test_tracebacks_keep_lines_and_name_the_patch(module):
    patches = ["y = $x", "log = []\nlog.append(x)\ny = $x", "y * SCALE", "y * SCALE / 0"]
    line = module.plain.__code__.co_firstlineno + 3
    with Patcher(module, plain=patches):
        try:
            module.plain(1)
        except ZeroDivisionError:
            text = traceback.format_exc()
            frame = traceback.extract_tb(sys.exc_info()[2])[-1]
    assert (frame.filename, frame.lineno) == (module.__file__, line)
    assert "return y * SCALE / 0  # " + __file__ in text
    here = next(
        i
        for i, s in enumerate(pathlib.Path(__file__).read_text().splitlines(), 1)
        if '"y * SCALE / 0"' in s and "patches" in s
    )
    assert f"{__file__}:{here}" in text


def test_a_debugger_steps_through_patched_code(module):
    output = io.StringIO()
    debugger = pdb.Pdb(
        stdin=io.StringIO("step\nnext\nnext\np y\nlist\nnext\ncontinue\n"), stdout=output, nosigint=True, readrc=False
    )
    debugger.use_rawinput = False
    with Patcher(module, plain=["return $x", "result = $x\nif result:\n    result += 1\nreturn result"]):
        debugger.runcall(module.plain, 1)
    text = output.getvalue()
    assert "-> y = x + 1  # add one" in text
    assert "result = y * SCALE" in text
    assert "result += 1" in text
    assert "(Pdb) 2\n" in text


# ------------------------------------------------------------------ outside function bodies


def test_default_values_reach_aliases_made_before(make_module):
    module = make_module(
        """
        def f(x, y=1):
            return x + y

        def wrapped(fn):
            return lambda *a: fn(*a)

        @wrapped
        def g(x, y=1):
            return x + y
        """
    )
    alias = module.f
    with Patcher(module, f=["def f(x, y=1): $...b", "def f(x, y=5, *, z=3):\n    y += z\n    $...b"], g=["1", "2"]):
        assert (alias(1), module.f(1, z=0), module.g(1)) == (9, 6, 3)
        assert alias is module.f
    assert (alias(1), module.g(1)) == (2, 2)
    assert inspect.signature(alias).parameters.keys() == {"x", "y"}


def test_decorators_assignments_and_new_methods_in_place(make_module):
    module = make_module(
        """
        def twice(fn):
            return lambda *a: 2 * fn(*a)

        def thrice(fn):
            return lambda *a: 3 * fn(*a)

        @twice
        def f(x):
            return x

        TABLE = [f(1), 5]

        class Base:
            def m(self):
                return 1

        class C(Base):
            factor = 2

            @property
            def p(self):
                return self.factor

            @twice
            def m(self):
                return super().m() + self.__hidden()

            def __hidden(self):
                return 1
        """
    )
    thing = module.C()
    originals = dict(vars(module.C))
    patches = {
        "C.m": ["twice", "thrice"],
        "C": ["factor = 2", "factor = 7\ndef extra(self):\n    return self.__hidden() + 10"],
    }
    with Patcher(module, patches, f=["twice", "thrice"], TABLE=["5", "6"]):
        assert (module.f(1), module.TABLE, thing.m(), thing.p, thing.extra()) == (3, [3, 6], 6, 7, 11)
    assert (module.f(1), module.TABLE, thing.m(), thing.p) == (2, [2, 5], 4, 2)
    assert dict(vars(module.C)) == originals


def test_nested_classes_annotations_descriptors_and_implicit_class_methods_in_place(make_module):
    module = make_module(
        """
        import functools

        class Named:
            def __init__(self, value):
                self.value = value

            def __set_name__(self, owner, name):
                self.name = name

            def __get__(self, instance, owner):
                return self.name, self.value

        class Outer:
            class Inner:
                __factor = 1

                def m(self):
                    return self.__factor

        class C:
            x: int = 1
            field = Named(1)

            def m(self):
                return 1
        """
    )
    annotations, originals = dict(module.C.__annotations__), dict(vars(module.C))
    new = """
    def m(self): $...body
    @functools.cached_property
    def once(self):
        return 7
    def __init_subclass__(cls):
        cls.tag = 3
    """
    patches = {
        "Outer.Inner": ["__factor = 1", "__factor = 5"],
        "C": [
            "x: int = 1",
            "x: int = 1\ny: int = 2\nz: int = y + 1",
            "Named(1)",
            "Named(2)",
            "def m(self): $...body",
            new,
        ],
    }
    with Patcher(module, patches):
        assert module.Outer.Inner().m() == 5
        assert (module.C.y, module.C.z, module.C.field, module.C().once) == (2, 3, ("field", 2), 7)
        assert module.C.__annotations__ == {"x": int, "y": int, "z": int}
        assert type("D", (module.C,), {}).tag == 3
    assert module.Outer.Inner().m() == 1
    assert (module.C.__annotations__, dict(vars(module.C))) == (annotations, originals)


def test_comprehensions_that_ran_with_the_module_run_again(make_module):
    module = make_module("A = [x + 1 for x in 'ab' and (1, 2)]\nB, C = tuple(x + 2 for x in (1, 2)), 5\n")
    with Patcher(module, A=["x + 1", "x + 10"], B=["x + 2", "x + 20"], C=["5", "6"]):
        assert (module.A, module.B, module.C) == ([11, 12], (21, 22), 6)
    assert (module.A, module.B, module.C) == ([2, 3], (3, 4), 5)


@pytest.mark.parametrize(
    ("body", "change"),
    [
        ("@dataclasses.dataclass\nclass C:\n    x: int = 1", ["x: int = 1", "x: int = 2"]),
        ("@dataclasses.dataclass\nclass C:\n    x: int = 1", ["x: int = 1", "x: int = 1\ny: int = 2"]),
        ("class C(typing.NamedTuple):\n    x: int = 1", ["x: int = 1", "x: int = 2"]),
        ("class C(enum.Enum):\n    X = 1", ["X = 1", "X = 2"]),
    ],
)
def test_fields_that_a_class_was_made_from_cannot_change_in_place(make_module, body, change):
    module = make_module(f"import dataclasses, enum, typing\n\n{body}\n")
    originals = dict(vars(module.C))
    with pytest.raises(DefinitionError, match="changes a field of C"):
        Patcher(module, C=change).install()
    assert dict(vars(module.C)) == originals


def test_results_that_a_cache_kept_go_with_the_code_that_made_them(make_module):
    module = make_module("import functools\n\n@functools.lru_cache\ndef f(x):\n    return x + 1\n")
    assert module.f(0) == 1
    with Patcher(module, f=ONE_MORE):
        assert module.f(0) == 100
    assert module.f(0) == 1


def test_a_patch_of_code_that_nothing_runs_is_refused(make_module):
    module = make_module(
        """
        import sys

        if sys.version_info:
            def f(x):
                return x + 1
        else:
            def f(x):
                return x + 2

        def helper(x):
            return x + 1

        TABLE = sorted([3, 1], key=lambda v: v)
        helper = None
        """
    )
    for member, before in (("f", "x + 2"), ("helper", "x + 1"), ("TABLE", "lambda v: v")):
        with pytest.raises(DefinitionError, match="no function runs the code"):
            Patcher(module, {member: [before, before + " - 1"]}).install()
    assert module.f(0) == 1


def test_a_file_that_changed_since_the_import_is_refused(make_module, write_module):
    module = make_module("def f(x):\n    return x + 1\n")
    write_module("import math\n\ndef f(x):\n    return x + 1\n", module.__name__)
    with pytest.raises(SourceError, match=r"on line 1 of this file, which has changed"):
        Patcher(module, f=ONE_MORE).install()


@pytest.mark.parametrize(
    ("module", "member"), [("heapq", "heappush"), ("functools", "partial.__call__"), ("operator", "index")]
)
def test_a_member_that_c_has_replaced(module, member):
    with pytest.raises(MemberError, match=rf"{module}.{member} is written in C .*has taken the place"):
        Patcher(module, {member: ["def $f($...p):\n    $...body", "def $f($...p):\n    return 1"]}).install()


def test_a_class_header_cannot_change_in_place(module):
    with pytest.raises(DefinitionError, match="install_on_import"):
        Patcher(module, Derived=["class Derived(Base): $...body", "class Derived(Base, object): $...body"]).install()
    assert module.plain(0) == 10


# ------------------------------------------------------------------ bad input


def test_errors_about_members_and_modules(module):
    with pytest.raises(MemberError, match=r"no member 'plian'. Similar: plain"):
        Patcher(module, plian=ONE_MORE).install()
    with pytest.raises(MemberError, match=r"inherited"):
        Patcher(module, {"Derived.describe": ['"base"', '"x"']}).install()
    with pytest.raises(SourceError, match="'math'"):
        Patcher("math", sin=["x", "y"]).install()
    with pytest.raises(SourceError, match="built in"):
        Patcher("sys", exit=["x", "y"]).install()
    with pytest.raises(SourceError, match="written in C"):
        Patcher("_json", scanner=["x", "y"]).install()
    with pytest.raises(SourceError, match="typed in"):
        Patcher(types.ModuleType("nowhere"), f=["x", "y"]).install()
    with pytest.raises(TypeError, match="lacks its other half"):
        Patcher(module, plain=["x + 1"])
    with pytest.raises(TypeError, match="are a string; give a list: plain="):
        Patcher(module, plain="ab")
    with pytest.raises(AlreadyImportedError, match="imported already"):
        Patcher(module, plain=ONE_MORE).install_on_import()
    with pytest.raises(PatchError, match="not one absolute import"):
        Patcher(module, plain=ONE_MORE, imports=["print(1)"]).install()
    with pytest.raises(PatchError, match="from operator import nosuch: operator has no 'nosuch'"):
        Patcher(module, plain=ONE_MORE, imports=["from operator import nosuch"]).install()
    assert module.plain(0) == 10

"""Code objects: which one belongs to which function, and which live functions run it.

A function is patched by giving it another code object. That reaches every alias, every bound method, every wrapper
around it and every object made before, because all of them hold the *function*. Functions are found through the garbage
collector: a decorator may have hidden one in a closure, or copied it, and either way it is still a function with the
module's globals and the old code.
"""

import functools
import gc
import inspect
import types
from collections.abc import Iterable, Iterator

Key = tuple[str, int]
"""Qualified name, and which of the code objects with that name in the order of the source."""


def codes_by_key(module_code: types.CodeType) -> dict[Key, types.CodeType]:
    """All code objects within a module's, the module's own included under `("<module>", 0)`."""
    found: dict[Key, types.CodeType] = {}
    counts: dict[str, int] = {}
    for code in _walk(module_code):
        number = counts.get(code.co_qualname, 0)
        counts[code.co_qualname] = number + 1
        found[code.co_qualname, number] = code
    return found


def _walk(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _walk(constant)


def is_function(code: types.CodeType) -> bool:
    """Whether a function runs this code; a class body and a module run theirs once."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED)


_IMMUTABLE_TYPE = 1 << 8  # What Python calls Py_TPFLAGS_IMMUTABLETYPE: no `class` statement makes one.


def is_written_in_c(value: object) -> bool:
    """Whether a function, method or class is not Python's."""
    if isinstance(value, type):
        return bool(value.__flags__ & _IMMUTABLE_TYPE)
    kinds = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
    return isinstance(value, (*kinds, types.ClassMethodDescriptorType, types.GetSetDescriptorType))


_ResultCache = type(functools.lru_cache(lambda: None))

_RUN_AT_ONCE = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
"""Code that is part of what is around it, though the compiler makes it a function."""


def is_a_definition_s(key: Key, code: types.CodeType) -> bool:
    """Whether it is the code of a `def` or a `lambda` that is inside no other."""
    named = code.co_name.isidentifier() or code.co_name == "<lambda>"
    return is_function(code) and named and "<locals>" not in key[0]


def body_signature(code: types.CodeType) -> tuple[object, ...]:
    """What code does itself, comprehensions included, whatever the functions and classes defined in it do."""
    constants = tuple(
        (type(c).__name__, repr(c))
        if not isinstance(c, types.CodeType)
        else ("code", c.co_qualname, body_signature(c) if c.co_name in _RUN_AT_ONCE else ())
        for c in code.co_consts
    )
    return code.co_code, code.co_names, code.co_varnames, constants


def live_functions(namespace: dict[str, object]) -> list[types.FunctionType]:
    """All functions whose globals are this namespace, wherever they are held."""
    # Not a walk over all objects in Python: a process with a few models in it has millions.
    referrers = gc.get_referrers(namespace)
    return [o for o in referrers if type(o) is types.FunctionType and o.__globals__ is namespace]


def clear_result_caches(functions: Iterable[types.FunctionType]) -> None:
    """Makes `functools.lru_cache` forget what functions returned that run other code now."""
    changed = {id(function) for function in functions}
    if not changed:
        return
    for wrapper in [o for o in gc.get_referrers(_ResultCache) if type(o) is _ResultCache]:
        if id(vars(wrapper).get("__wrapped__")) in changed:
            wrapper.cache_clear()

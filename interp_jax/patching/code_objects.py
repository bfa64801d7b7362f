"""Code objects: which one belongs to which function, and which live functions run it.

A function is patched by giving it another code object. That reaches every alias, every bound method, every wrapper
around it and every object made before, because all of them hold the *function*. Functions are found through the garbage
collector: a decorator may have hidden one in a closure, or copied it, and either way it is still a function with the
module's globals and the old code.
"""

import gc
import inspect
import types
from collections.abc import Iterator

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


def body_signature(code: types.CodeType) -> tuple[object, ...]:
    """What code does itself, whatever the functions and classes defined in it do."""
    constants = tuple(
        ("code", c.co_qualname) if isinstance(c, types.CodeType) else (type(c).__name__, repr(c))
        for c in code.co_consts
    )
    return code.co_code, code.co_names, code.co_varnames, constants


def live_functions(namespace: dict[str, object]) -> list[types.FunctionType]:
    """All functions whose globals are this namespace, wherever they are held."""
    return [o for o in gc.get_objects() if type(o) is types.FunctionType and o.__globals__ is namespace]

"""JAX must trace anew what it traced before a patch, and nothing here may import JAX.

JAX keeps what it traced by the function *object*, and a patch changes the code inside the object; so to JAX nothing has
changed. The remedy is a value of our own that is part of every cache key (`jax.make_user_context`, public): it names
the patchers that have come or gone since their module ran, process-wide. Going back to an earlier set finds what was
traced under it, so entering the same `with` a thousand times compiles twice, and no cache is ever cleared.

JAX is looked up in `sys.modules`. Before it is there nothing can have been traced; the set that is active when it is
first seen becomes the key's default. Programs that use no JAX pay a dictionary lookup.
"""

import sys
from typing import Any

_context: Any = None


def patches_changed(before: frozenset[tuple[str, int]], after: frozenset[tuple[str, int]]) -> None:
    """Tells JAX, if it is there, that another set of patchers is active now.

    Args:
        before: the patchers that had come or gone until now, as module and number.
        after: those that have now.
    """
    global _context
    if _context is None:
        make = getattr(sys.modules.get("jax"), "make_user_context", None)
        if make is None:
            return
        _context = make(before)
    _context.set_global(after)

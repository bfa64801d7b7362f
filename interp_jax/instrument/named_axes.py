"""Sites in libraries whose arrays carry names for their axes.

The values that a loop sees are plain arrays, with the same axes in every library. `named_site` takes the array out of a
penzai or haliax `NamedArray`, puts its axes in order, and makes the named array anew of what comes back:

```python
q = named_site(q, "q", "position", ("kv_head", "q_heads_per_group"), "head_size", layer=layer)  # [batch, seq, heads, d]
```

Neither library is imported: a named array is told by its attributes. With nothing listening, and where the loop leaves
the value alone, the very same object comes back; the transposition that the loop was shown is then dead code.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from interp_jax.instrument.running_pass import SiteError, innermost_pass, site

__all__ = ["named_site"]


def named_site(value: Any, name: str, *axes: str | Sequence[str], layer: int | None = None) -> Any:
    """`site` on the array in a named array.

    Args:
        value: a named array of penzai or haliax.
        name: the site's name.
        *axes: the names of the array's last axes, in the order in which the loop shall see them; all others stand
            before them, in the order in which `value` has them. Several names in place of one are axes that are joined,
            the first one slowest; those of them that `value` lacks are left out, and of none comes an axis of length 1
            (the heads of k and v, where all queries share one).
        layer: as in `site`.

    Returns:
        `value`, or a named array with the same axes in the same order that holds what the loop put in its place.

    Raises:
        SiteError: under a running pass, if `value` is no named array or lacks an axis.
    """
    if innermost_pass() is None:
        return value
    named, field, names = _opened(value, name)
    joined = [_present(axis, names) for axis in axes]
    last = [each for axis in joined for each in axis]
    if not set(last) <= set(names) or len(set(last)) < len(last):
        raise SiteError(f"site {name!r} wants the axes {axes}, each once, but the array has {tuple(names)}")
    order = [*(i for i, each in enumerate(names) if each not in last), *(names.index(each) for each in last)]
    data = getattr(named, field)
    ordered = data.transpose(order)
    before = ordered.shape[: len(names) - len(last)]
    plain = ordered.reshape(*before, *(math.prod(data.shape[names.index(each)] for each in axis) for axis in joined))
    new = site(plain, name, layer=layer)
    if new is plain:
        return value
    return dataclasses.replace(named, **{field: new.reshape(ordered.shape).transpose(np.argsort(order))})


def _opened(value: Any, name: str) -> tuple[Any, str, list[Any]]:
    """The named array, the field that holds its array, and the name of each axis of that; an int where it has none."""
    if hasattr(value, "with_positional_prefix"):  # penzai, where axes without a name come first
        named = value.with_positional_prefix()
        unnamed = range(len(named.data_array.shape) - len(named.named_axes))
        return named, "data_array", [*unnamed, *named.named_axes]
    if hasattr(value, "array") and hasattr(value, "axes"):  # haliax
        return value, "array", [axis.name for axis in value.axes]
    raise SiteError(f"site {name!r} was given a {type(value).__name__}, which is no named array that is known here")


def _present(axis: str | Sequence[str], names: Sequence[Any]) -> list[str]:
    return [axis] if isinstance(axis, str) else [each for each in axis if each in names]

"""Sites in models whose blocks do not know their place.

Some libraries build a model of nested layers, none of which is told where it stands. A patch set says at three places
what runs, and everything below asks:

```python
with numbering_blocks():                                # around the whole model's call
    with next_block():                                  # around each block's call
        q = block_site(q, "q", "seq", "heads", "d")     # anywhere inside: the layer is the block's number
    h = model_site(h, "final_norm", "seq", "d")         # between blocks, and before and after all
layer_scan(scanned_blocks(body), ...)                   # where the blocks are scanned, the scan numbers them
```

The arrays at the sites have named axes (`named_axes.py`). Classes that a library uses for other models, too, may carry
such a site: outside a block `block_site` is the identity, and outside a model, or in a block, `model_site` is.

Blocks are numbered in the order in which they run. What runs is kept in a context variable, so each pass, thread and
greenlet has its own.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from interp_jax.instrument.named_axes import named_site

__all__ = ["block_site", "model_site", "next_block", "numbering_blocks", "scanned_blocks"]


@dataclasses.dataclass(frozen=True)
class _Place:
    numbers: Iterator[int] | None
    """Those of the blocks to come; None where a scan numbers them, or nothing does."""
    is_in_block: bool = False
    layer: int | None = None


_here: contextvars.ContextVar[_Place | None] = contextvars.ContextVar("place in a model", default=None)


@contextlib.contextmanager
def _entered(place: _Place) -> Iterator[None]:
    token = _here.set(place)
    try:
        yield
    finally:
        _here.reset(token)


@contextlib.contextmanager
def numbering_blocks() -> Iterator[None]:
    """A whole model runs in the block of this `with`: its first block has number 0."""
    with _entered(_Place(itertools.count())):
        yield


@contextlib.contextmanager
def next_block() -> Iterator[int | None]:
    """A block of the model runs in the block of this `with`; it gives its number, None where nothing numbers it."""
    place = _here.get()
    numbers = None if place is None else place.numbers
    number = None if numbers is None else next(numbers)
    with _entered(_Place(numbers, True, number)):
        yield number


def scanned_blocks(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a layer scan, whose blocks the scan numbers."""

    @functools.wraps(body, updated=())
    def scanned(*args: Any, **kwargs: Any) -> Any:
        with _entered(_Place(None)):
            return body(*args, **kwargs)

    return scanned


def block_site(value: Any, name: str, *axes: str | Sequence[str]) -> Any:
    """`named_site` with the layer of the block that runs; the identity outside blocks."""
    place = _here.get()
    if place is None or not place.is_in_block:
        return value
    return named_site(value, name, *axes, layer=place.layer)


def model_site(value: Any, name: str, *axes: str | Sequence[str]) -> Any:
    """`named_site` of a whole model, without a layer; the identity in its blocks and outside models."""
    place = _here.get()
    if place is None or place.is_in_block:
        return value
    return named_site(value, name, *axes)

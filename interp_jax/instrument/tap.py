"""Taps: identities with an eye on the gradient that comes back through them.

A tap is a primitive. In the derivative with respect to its zero its tangents go through a second primitive, which is
linear; the transpose of that one calls the tap's function, and that may sow. In every other derivative a tap is the
identity: a model may differentiate itself, forward and backward.

```
            value ----> [ tap ] ----> value          no derivative: nothing at all
          tangent ----> [ eye ] ----> tangent        the derivative with respect to the zero
         gradient <---- [ collect ] <-- gradient     its transpose
```

What bites: a tap is batched when the model's `vmap` runs, and its function is called when the backward pass does. So a
tap remembers each batch that it is in, and its function then runs under the same `vmap`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from interp_jax.instrument.carry import ReapError
from interp_jax.instrument.sow import bound, in_front_of_scans

__all__ = ["batching_a_scan", "batching_a_shard_map", "tap"]

_scans: contextvars.ContextVar[int] = contextvars.ContextVar("scans", default=0)
"""How many scans stand between the vmap that is at work here and what it maps."""
_in_shard_map: contextvars.ContextVar[bool] = contextvars.ContextVar("in_shard_map", default=False)
"""Whether a shard_map does."""


def batching_a_scan() -> contextlib.AbstractContextManager[None]:
    """In the block, a scan's body is batched."""
    return bound(_scans, _scans.get() + 1)


def batching_a_shard_map() -> contextlib.AbstractContextManager[None]:
    """In the block, a shard_map's body is batched."""
    return bound(_in_shard_map, True)


Collect = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Tap:
    tree: Any
    collect: Collect
    keeps_value: bool

    @property
    def count(self) -> int:
        return self.tree.num_leaves

    def gradients(
        self, batches: Sequence["_Batch"], row: Any, kept: Sequence[Any], gradients: Sequence[Any]
    ) -> Sequence[Any]:
        """Calls the function, for each example of the batches; gives the gradients to go on with."""
        if any(batch.in_shard_map for batch in batches):
            raise ReapError(
                "a site that is differentiated stands in a shard_map under vmap, and its gradients would come out with "
                "the devices before the batch: put the vmap inside the shard_map, or ij.gradients inside the vmap"
            )
        replaced: list[bool] = []

        def call(row: Any, kept: list[Any], gradients: list[Any]) -> list[Any]:
            value = jax.tree.unflatten(self.tree, kept) if self.keeps_value else None
            with in_front_of_scans(tuple(batch.scans for batch in batches if any(axis == 0 for axis in batch.leaves))):
                new = self.collect(value, jax.tree.unflatten(self.tree, gradients), row)
            replaced.append(new is not None)
            return [] if new is None else jax.tree.leaves(new)

        for batch in reversed(batches):
            call = batch.of(call)
        new = call(row, list(kept), list(gradients))
        return new if replaced[-1] else gradients


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A vmap that a tap stands in; what it maps has its axis in front."""

    row: int | None
    leaves: tuple[int | None, ...]
    size: int
    name: Any
    spmd_name: Any
    scans: int
    """How many scans stand between the vmap and the tap."""
    in_shard_map: bool
    """Whether a shard_map does."""

    def of(self, call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def batched(row: Any, kept: list[Any], gradients: list[Any]) -> list[Any]:
            leaves = list(self.leaves)
            return jax.vmap(
                call,
                in_axes=(self.row, leaves if kept else None, leaves),
                axis_size=self.size,
                axis_name=self.name,
                spmd_axis_name=self.spmd_name,
            )(row, kept, gradients)

        return batched


def _primitive(name: str, results: Callable[..., list[Any]]) -> Any:
    """A primitive whose results are some of its operands."""
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(results)
    primitive.def_abstract_eval(results)
    mlir.register_lowering(primitive, lambda ctx, *operands, **params: results(*operands, **params))
    return primitive


def _leaves(*operands: Any, tap: _Tap, batches: Any) -> list[Any]:
    return list(operands[len(operands) - tap.count :])


_tap_p = _primitive("tap", _leaves)
"""Operands: the row, the zero, the value's leaves, which are its results."""
_eye_p = _primitive("tap_eye", _leaves)
"""Operands: the row, the value's leaves where they are kept, the zero's tangent, the tangents, which are its results.
Linear in what are tangents."""


def _tap_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    row, _, *leaves = primals
    _, zero_tangent, *leaf_tangents = tangents
    outs = _tap_p.bind(*primals, **params)  # the pass that differentiates the zero may be one further out
    if type(zero_tangent) is ad.Zero:
        return outs, leaf_tangents
    kept = leaves if params["tap"].keeps_value else []
    return outs, _eye_p.bind(row, *kept, zero_tangent, *map(ad.instantiate_zeros, leaf_tangents), **params)


def _eye_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return _eye_p.bind(*primals, **params), _leaves(*tangents, **params)


def _eye_transpose(cotangents: Sequence[Any], *operands: Any, tap: _Tap, batches: Sequence[_Batch]) -> list[Any]:
    row, *kept = operands[: len(operands) - tap.count - 1]
    gradients = tap.gradients(batches, row, kept, [ad.instantiate_zeros(one) for one in cotangents])
    zero = operands[len(operands) - tap.count - 1].aval
    return [None] * (1 + len(kept)) + [jnp.zeros(zero.shape, zero.dtype), *gradients]


def _batcher(primitive: Any) -> Callable[..., Any]:
    def batch(
        axis_data: Any, operands: Sequence[Any], axes: Sequence[Any], *, tap: _Tap, batches: tuple[_Batch, ...]
    ) -> tuple[list[Any], list[Any]]:
        if all(axis is None for axis in axes):
            return primitive.bind(*operands, tap=tap, batches=batches), [None] * tap.count
        size = axis_data.size
        operands = [
            one if axis is None else jnp.moveaxis(one, axis, 0) for one, axis in zip(operands, axes, strict=True)
        ]
        mapped = [axis is not None for axis in axes]
        # All leaves are mapped or none: what is kept goes with its gradient, and what is made of one may depend on all.
        zero = len(operands) - tap.count - 1 if primitive is _eye_p else 1
        values = [place for place in range(1, len(operands)) if place != zero]
        if any(mapped[place] for place in values):
            for place in values:
                if not mapped[place]:
                    operands[place] = jnp.broadcast_to(operands[place], (size, *jnp.shape(operands[place])))
                    mapped[place] = True
        found = [0 if one else None for one in mapped]
        leaves = found[len(found) - tap.count :]
        one = _Batch(
            found[0], tuple(leaves), size, axis_data.name, axis_data.spmd_name, _scans.get(), _in_shard_map.get()
        )
        return primitive.bind(*operands, tap=tap, batches=(one, *batches)), leaves

    return batch


ad.primitive_jvps[_tap_p] = _tap_jvp
ad.primitive_jvps[_eye_p] = _eye_jvp
ad.primitive_transposes[_eye_p] = _eye_transpose
batching.fancy_primitive_batchers[_tap_p] = _batcher(_tap_p)
batching.fancy_primitive_batchers[_eye_p] = _batcher(_eye_p)


def tap(value: Any, row: Any, zero: Any, collect: Collect, *, keeps_value: bool = False) -> Any:
    """An identity with an eye on what comes back through it.

    Args:
        value: the value to carry on with.
        row: an array, handed to `collect`.
        zero: what is differentiated where the gradient is wanted, a scalar.
        collect: called in a backward pass with the value, its gradient and `row`. What it returns goes on in the
            gradient's place; None leaves that as it is.
        keeps_value: whether the value is kept for `collect`, which gets None otherwise.

    Returns:
        `value`.
    """
    leaves, tree = jax.tree.flatten(value)
    tapped = _tap_p.bind(row, zero, *leaves, tap=_Tap(tree, collect, keeps_value), batches=())
    return jax.tree.unflatten(tree, tapped)

"""Sows under `vmap` of control flow and of shard_map.

`vmap` of a cond or while with a batched predicate runs every branch and selects, so a sow would fire in branches that
were not taken. `vmap` of a scan puts the batch axis behind the stacked one, and `vmap` of a `shard_map` behind the
devices'. JAX's batching rules know nothing of sows, so for these primitives a rule of ours stands before JAX's: it
takes the sows out of the equation, lets JAX batch that, and sows again outside, on the condition that the value was
sown. An equation without sows goes straight to JAX's rule.

What is to be planted must reach the sow inside. It is asked for outside, by a sow too, and goes in with the operands.

A result that does not depend on the batch must be told so: `vmap(out_axes=None)` and `jacfwd` insist.
"""

import contextlib
import contextvars
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import primitives as jex_primitives
from jax.interpreters import batching

from interp_jax.instrument import trace_context
from interp_jax.instrument.carry import Key, Level, Purpose, ReapError, Slot, bind, in_words, sown_in_equation
from interp_jax.instrument.sow import MODES, bound, listeners, sow_p
from interp_jax.instrument.tap import batching_a_scan, batching_a_shard_map

__all__ = ["harvested", "install", "staged"]


def _sow_outside(primitive: Any) -> None:
    jax_rule = batching.fancy_primitive_batchers[primitive]

    @functools.wraps(jax_rule)
    def rule(axis_data: Any, args: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
        runs_every_branch = primitive is jex_primitives.while_p or (
            primitive is jex_primitives.cond_p and axes[0] is not None
        )
        handled = _handled(primitive, params, runs_every_branch)
        if not handled:
            with batching_a_scan() if primitive is jex_primitives.scan_p else contextlib.nullcontext():
                return jax_rule(axis_data, args, axes, **params)
        return _batched(primitive, axis_data, args, axes, params, handled)

    batching.fancy_primitive_batchers[primitive] = rule


_PURPOSE = Purpose(None, reaps=True, notes_writes=True, modes=(*MODES, "save", "ask"))


def _handled(primitive: Any, params: dict[str, Any], runs_every_branch: bool) -> dict[Key, Slot]:
    """The sows that are taken out of an equation."""
    sown = sown_in_equation(primitive, params)
    handled = {key: slot for key, slot in sown.items() if _PURPOSE.handles(key, slot.mode)}
    for _, path in sown.keys() - handled.keys():
        if runs_every_branch:
            raise ReapError(
                f"{in_words(path)} is asked for in a vmapped `{primitive}`, which save cannot cross: put the pass "
                "inside the vmap, or write the layer_scan's layers as a Python loop"
            )
    return handled


def _batched(
    primitive: Any,
    axis_data: Any,
    args: Sequence[Any],
    axes: Sequence[Any],
    params: dict[str, Any],
    handled: dict[Key, Slot],
) -> tuple[list[Any], list[int | None]]:
    """Binds an equation for a whole batch, its sows beside it: the results, and where their batch axes are."""
    planted = _planted(handled, axis_data.size)
    unmapped: dict[int, Any] = {}

    def function(args: Sequence[Any], planted: Sequence[list[Any]]) -> dict[int, Any]:
        level = Level(_PURPOSE, dict(zip(keys, planted, strict=True)))
        outs = dict(enumerate(bind(primitive, args, params, level)))
        level.sow_again()
        mapped = {number: out for number, out in outs.items() if trace_context.is_of_current_trace(out)}
        unmapped.update((number, out) for number, out in outs.items() if number not in mapped)
        return mapped

    keys = list(planted)
    mapped = jax.vmap(
        function,
        in_axes=(list(axes), [leaves_axis for _, leaves_axis in planted.values()]),
        axis_size=axis_data.size,
        axis_name=axis_data.name,
        spmd_axis_name=axis_data.spmd_name,
    )(list(args), [leaves for leaves, _ in planted.values()])
    outs = {**mapped, **unmapped}
    numbers = range(len(outs))
    return [outs[number] for number in numbers], [0 if number in mapped else None for number in numbers]


def _planted(handled: dict[Key, Slot], size: int) -> dict[Key, tuple[list[Any], int | None]]:
    """What is planted in an equation under vmap, with its batch axis; asked for where the equation stands."""
    keys = {key for listener in listeners() for key in listener.planted}
    return {
        key: _asked_for(key, slot, None if slot.mode == "ask" else size)
        for key, slot in handled.items()
        if slot.mode == "ask" or key in keys
    }


def _asked_for(key: Key, slot: Slot, size: int | None) -> tuple[list[Any], int | None]:
    """A sow of zeros, which somebody replaces: for every row of a batch of this size, or one for the whole batch.

    What is the same for the whole batch must not be mapped, or all results would depend on the batch.
    """
    zeros = slot.zeros()
    if size is not None:
        zeros = [jnp.broadcast_to(leaf, (size, *leaf.shape)) for leaf in zeros]
    tag, path = key
    leaves = sow_p.bind(
        *zeros, tag=tag, path=path, mode=slot.mode, tree=slot.tree, has_pred=False, slots=None, scans=None, fronts=()
    )
    return leaves, None if size is None else 0


# shard_map has a function for an operand, and a trace a method for it.

_harvested: contextvars.ContextVar[bool] = contextvars.ContextVar("harvested", default=False)


def harvested() -> contextlib.AbstractContextManager[None]:
    """In the block a harvest is on: only there are functions under shard_map looked through for sows."""
    return bound(_harvested, True)


def staged(primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Binds a primitive that has functions for operands, in a jaxpr.

    Returns:
        The equation; its operands; what bind gave, without the values, since it may be a container of JAX's own.
    """
    empty: Any = None

    def function(*args: Any) -> list[Any]:
        nonlocal empty
        out = primitive.bind(*args, **params)
        empty = out.update([None] * len(out)) if hasattr(out, "update") else None
        return list(out)

    jaxpr = jax.make_jaxpr(function)(*map(jax.typeof, args))
    (eqn,) = jaxpr.eqns
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip([*opened.constvars, *opened.invars], [*jaxpr.consts, *args], strict=True))
    return eqn, [atom.val if isinstance(atom, jex.Literal) else env[atom] for atom in eqn.invars], empty


def _sow_outside_shard_map() -> None:
    trace_type: Any = trace_context.vmap_types()[0]
    jax_rule = trace_type.process_shard_map

    @functools.wraps(jax_rule)
    def rule(trace: Any, primitive: Any, fun: Any, args: Sequence[Any], /, **params: Any) -> Any:
        if not _harvested.get():
            return jax_rule(trace, primitive, fun, args, **params)
        with trace_context.entered(trace):
            eqn, operands, empty = staged(primitive, args, {"subfuns": (fun,), **params})
            handled = _handled(primitive, eqn.params, runs_every_branch=False)
            if not handled:  # what was traced is not traced again: its sites have been shown
                bind_params = primitive.get_bind_params(eqn.params)
                (fun,) = bind_params.pop("subfuns")
                with batching_a_shard_map():
                    return empty.update(list(jax_rule(trace, primitive, fun, operands, **bind_params)))
            with trace_context.entered(trace.parent_trace):
                planted = _planted(handled, trace.axis_data.size)
            level = Level(
                _PURPOSE,
                {
                    key: leaves if axis is None else [trace_context.mapped(trace, leaf) for leaf in leaves]
                    for key, (leaves, axis) in planted.items()
                },
            )
            outs = bind(primitive, operands, eqn.params, level)
            level.sow_again()
            return empty.update(outs)

    trace_type.process_shard_map = rule


def install() -> None:
    """Puts the rules in their places. JAX's registry is one for the process, so this is done once, on import."""
    for primitive in (jex_primitives.scan_p, jex_primitives.while_p, jex_primitives.cond_p):
        _sow_outside(primitive)
    _sow_outside_shard_map()

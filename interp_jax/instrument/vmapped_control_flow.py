"""Sows under `vmap` of control flow.

`vmap` of a cond or while with a batched predicate runs every branch and selects, so a sow would fire in branches that
were not taken. `vmap` of a scan puts the batch axis behind the stacked one. JAX's batching rules know nothing of sows,
so for these three primitives a rule of ours stands before JAX's: it takes the sows out of the equation, lets JAX batch
that, and sows again outside, on the condition that the value was sown. An equation without sows goes straight to JAX's
rule.

What is to be planted must reach the sow inside. It is asked for outside, by a sow too, and goes in with the operands.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as jex_primitives
from jax.interpreters import batching

from interp_jax.instrument.carry import Key, Level, Purpose, ReapError, Slot, bind, in_words, sown_in_equation
from interp_jax.instrument.sow import listeners, sow_p

__all__ = ["install"]


def _sow_outside(primitive: Any) -> None:
    jax_rule = batching.fancy_primitive_batchers[primitive]

    @functools.wraps(jax_rule)
    def rule(axis_data: Any, args: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
        purpose = Purpose(None, reaps=True, notes_writes=True)
        sown = sown_in_equation(primitive, params)
        handled = {key: slot for key, slot in sown.items() if purpose.handles(key, slot.mode)}
        runs_every_branch = primitive is jex_primitives.while_p or (
            primitive is jex_primitives.cond_p and axes[0] is not None
        )
        for _, path in sown.keys() - handled.keys():
            if runs_every_branch:
                raise ReapError(
                    f"{in_words(path)} is asked for in a vmapped `{primitive}`, which save cannot cross: put the pass "
                    "inside the vmap, or write the layer_scan's layers as a Python loop"
                )
        if not handled:
            return jax_rule(axis_data, args, axes, **params)

        planted_keys = {key for listener in listeners() for key in listener.planted}
        planted = {key: _asked_for(key, slot, axis_data.size) for key, slot in handled.items() if key in planted_keys}

        def function(args: Sequence[Any], planted: Sequence[list[Any]]) -> list[Any]:
            level = Level(purpose, dict(zip(keys, planted, strict=True)))
            outs = bind(primitive, args, params, level)
            level.sow_again()
            return outs

        keys = list(planted)
        mapped = jax.vmap(
            function,
            in_axes=(list(axes), 0),
            axis_size=axis_data.size,
            axis_name=axis_data.name,
            spmd_axis_name=axis_data.spmd_name,
        )
        outs = mapped(list(args), [planted[key] for key in keys])
        return outs, [0] * len(outs)

    batching.fancy_primitive_batchers[primitive] = rule


def _asked_for(key: Key, slot: Slot, size: int) -> list[Any]:
    """What is planted under a name, for every row of the batch: a sow of zeros, which somebody replaces."""
    zeros = [jnp.broadcast_to(leaf, (size, *leaf.shape)) for leaf in slot.zeros()]
    tag, path = key
    return sow_p.bind(
        *zeros, tag=tag, path=path, mode=slot.mode, tree=slot.tree, has_pred=False, slots=None, scans=None
    )


def install() -> None:
    """Puts the rules in their places. JAX's registry is one for the process, so this is done once, on import."""
    for primitive in (jex_primitives.scan_p, jex_primitives.while_p, jex_primitives.cond_p):
        _sow_outside(primitive)

"""Sows under `vmap` of control flow.

`vmap` of a cond or while with a batched predicate runs every branch and selects, so a sow would fire in branches that
were not taken. `vmap` of a scan puts the batch axis behind the stacked one. JAX's batching rules know nothing of sows,
so for these three primitives a rule of ours stands before JAX's: it takes the sows out of the equation, lets JAX batch
that, and sows again outside, on the condition that the value was sown. An equation without sows goes straight to JAX's
rule.

What is to be planted must reach the sow itself, so such a sow stays where it is.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import primitives as jex_primitives
from jax.interpreters import batching

from interp_jax.instrument.carry import Level, Purpose, ReapError, bind, in_words, sown_in_equation
from interp_jax.instrument.sow import listeners

__all__ = ["install"]


def _sow_outside(primitive: Any) -> None:
    """Puts before a primitive's batching rule one that takes the sows out of the equation first."""
    jax_rule = batching.fancy_primitive_batchers[primitive]

    @functools.wraps(jax_rule)
    def rule(axis_data: Any, args: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
        sown = sown_in_equation(primitive, params)
        if not sown:
            return jax_rule(axis_data, args, axes, **params)
        planted = frozenset(path for listener in listeners() for path in listener.planted)
        purpose = Purpose(None, reaps=True, notes_writes=True, leaves=planted)
        if primitive is not jex_primitives.scan_p:
            for (_, path), slot in sown.items():
                if slot.mode in ("slot", "stack"):
                    raise ReapError(
                        f"{in_words(path)!r} is in a layer scan in a vmapped `{primitive}`: save cannot cross that"
                    )

        def function(*args: Any) -> list[Any]:
            level = Level(purpose)
            outs = bind(primitive, args, params, level)
            level.sow_again()
            return outs

        if not any(purpose.handles(key, slot.mode) for key, slot in sown.items()):
            return jax_rule(axis_data, args, axes, **params)
        outs = jax.vmap(
            function,
            in_axes=tuple(axes),
            axis_size=axis_data.size,
            axis_name=axis_data.name,
            spmd_axis_name=axis_data.spmd_name,
        )(*args)
        return outs, [0] * len(outs)

    batching.fancy_primitive_batchers[primitive] = rule


def install() -> None:
    """Puts the rules in their places. JAX's registry is one for the process, so this is done once, on import."""
    for primitive in (jex_primitives.scan_p, jex_primitives.while_p, jex_primitives.cond_p):
        _sow_outside(primitive)

"""How sown values cross each primitive that holds a jaxpr: jit, checkpoint, scan, while, cond, shard_map, custom
derivatives.

A rule binds the equation anew, with the sub-jaxpr interpreted: state and what is planted go in beside the operands,
state and what is sown once come out beside the results. What the primitive was told (shardings, donation, policy,
unrolling, mesh) stays.

A custom derivative is for the function's results. What is sown inside is differentiated as what it is, the primal code;
the results keep the user's rule, but their primal values are those of the code that ran, an edit by a running pass
included.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import primitives as jex_primitives

from interp_jax.instrument.carry import (
    Crossing,
    Key,
    Params,
    ReapError,
    Results,
    Rule,
    Slot,
    Values,
    in_words,
    manual_axes,
    sown_in,
)
from interp_jax.instrument.sow import silence

__all__ = ["RULES"]


RULES: dict[str, Rule] = {}
"""By the primitive's name: that of shard_map is not public, and some have two."""


def _crosses(*primitives: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


@_crosses("jit")
def _jit(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    closed = params["jaxpr"]
    operands, tree = jax.tree.flatten((args, state, planted))
    trees: list[Any] = []

    def function(*operands: Any) -> list[Any]:
        results, out_tree = jax.tree.flatten(crossing.run(closed, *jax.tree.unflatten(tree, operands)))
        trees.append(out_tree)
        return results

    jaxpr = jax.make_jaxpr(function)(*closed.in_avals, *map(jax.typeof, operands[len(args) :]))
    more_in, more_out = len(operands) - len(args), len(jaxpr.out_avals) - len(closed.out_avals)
    unspecified, no_layout = _unspecified_sharding()
    outs = jex_primitives.jit_p.bind(
        *operands,
        **{
            **params,
            "jaxpr": jaxpr,
            "in_shardings": (*params["in_shardings"], *[unspecified] * more_in),
            "in_layouts": (*params["in_layouts"], *[no_layout] * more_in),
            "donated_invars": (*params["donated_invars"], *[False] * more_in),
            "out_shardings": (*params["out_shardings"], *[unspecified] * more_out),
            "out_layouts": (*params["out_layouts"], *[no_layout] * more_out),
        },
    )
    return jax.tree.unflatten(trees[0], outs)


@functools.cache
def _unspecified_sharding() -> tuple[Any, Any]:
    """What jit itself writes for a value that nobody gave a sharding or a layout."""
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x * 2))(jax.ShapeDtypeStruct((), "float32")).eqns
    return eqn.params["out_shardings"][0], eqn.params["out_layouts"][0]


@_crosses("remat2", "checkpoint")
def _checkpoint(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    function = functools.partial(crossing.run, params["jaxpr"])
    checkpointed = jax.checkpoint(function, policy=params["policy"], prevent_cse=params["prevent_cse"])
    return checkpointed(args, state, planted)


@_crosses("closed_call", "core_closed_call", "call", "core_call", "eval_jaxpr")
def _call(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    (jaxpr,) = jex.jaxprs_in_params(params)
    return crossing.run(jaxpr, args, state, planted)


@_crosses("scan")
def _scan(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    for name in crossing.names("strict"):
        raise ReapError(
            f"Cannot use strict mode for {name!r} inside `scan`. Sow it with mode='append' to stack the iterations, or "
            "mode='clobber' to keep the last"
        )
    for (_, path), slot in crossing.slots.items():
        if slot.scans is not None and slot.scans < 0:
            raise ReapError(
                f"{in_words(path)} stands in a layer_scan and in a scan besides, around the layer_scan or in its body, "
                "and what is asked of it cannot leave both: write one of the two as a Python loop, or put the pass "
                "(ij.gradients, say) inside the other scan"
            )
    n_consts, n_carry = _scan_parts(params)
    consts, init, xs = args[:n_consts], list(args[n_consts : n_consts + n_carry]), list(args[n_consts + n_carry :])
    is_sliced = [slot.mode == "append" for slot in crossing.planted.values()]

    def body(carry: Any, x: Any) -> Any:
        (values, state), (inputs, slices) = carry, x
        remaining = iter(slices)
        here = [next(remaining) if sliced else whole for sliced, whole in zip(is_sliced, planted, strict=True)]
        outs, state, once = crossing.run(params["jaxpr"], [*consts, *values, *inputs], state, here)
        return (outs[:n_carry], state), (outs[n_carry:], once)

    slices = [whole for sliced, whole in zip(is_sliced, planted, strict=True) if sliced]
    (values, state), (ys, once) = jax.lax.scan(
        body,
        (init, state),
        (xs, slices),
        **{name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params},
    )
    inside = sown_in(params["jaxpr"])
    once = [
        [jnp.moveaxis(leaf, 0, inside[key].stack_axis) for leaf in leaves]
        for key, leaves in zip(crossing.once, once, strict=True)
    ]
    return [*values, *ys], state, once


def _scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since JAX 0.11
    return len(consts), len(carry)


@_crosses("while")
def _while(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    for name in crossing.names("strict", "append", "stack"):
        raise ReapError(
            f"Must use clobber or cond_clobber mode for {name!r} inside of a `while_loop`. How often it "
            "runs is not known"
        )
    for (_, path), slot in sown_in(params["cond_jaxpr"]).items():
        raise ReapError(
            f"{in_words(path)!r} is sown in the condition of a while loop: sow it in the body ({slot.mode})"
        )
    after_cond = params["cond_nconsts"]
    after_consts = after_cond + params["body_nconsts"]
    cond_consts, body_consts, init = args[:after_cond], args[after_cond:after_consts], list(args[after_consts:])

    def goes_on(carry: Any) -> Any:
        return jex.jaxpr_as_fun(params["cond_jaxpr"])(*cond_consts, *carry[0])[0]

    def body(carry: Any) -> Any:
        values, state, _ = carry
        return crossing.run(params["body_jaxpr"], [*body_consts, *values], state, planted)

    nothing = [slot.zeros() for slot in crossing.once.values()]
    return jax.lax.while_loop(goes_on, body, (init, state, nothing))


@_crosses("cond")
def _cond(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    _check_branches(params["branches"], crossing)
    index, *operands = args
    branches = [functools.partial(crossing.run, branch) for branch in params["branches"]]
    return jax.lax.switch(index, branches, operands, state, planted)


def _check_branches(branches: Sequence[Any], crossing: Crossing) -> None:
    """Branches must agree in what they sow once; what is state, or saved, may be left out."""
    sown = [{key: slot for key, slot in sown_in(branch).items() if key in crossing.slots} for branch in branches]
    must = [{key: slot for key, slot in one.items() if slot.mode in ("strict", "append")} for one in sown]
    for one in must[1:]:
        if len(one) != len(must[0]):
            names = [sorted(in_words(path) for _, path in each) for each in must]
            raise ReapError(
                f"Mismatching number of `sow`s between branches. They sow {' and '.join(map(str, names))}; sow the "
                "same names in each, or use mode='clobber', where a branch may leave a name as it was"
            )
        for _, path in one.keys() - must[0].keys():
            raise ReapError(
                f"Missing sow in branch: {in_words(path)!r}. Sow the same names in each branch, or use mode='clobber', "
                "where a branch may leave a name as it was"
            )
    for one in sown:
        for key, slot in one.items():
            for other in sown:
                if key in other:
                    _check_alike(key, slot, other[key])


def _check_alike(key: Key, slot: Slot, other: Slot) -> None:
    for what, ours, theirs in (
        ("tree", slot.tree, other.tree),
        ("shape", slot.shapes, other.shapes),
        ("dtype", [aval.dtype for aval in slot.avals], [aval.dtype for aval in other.avals]),
    ):
        if ours != theirs:
            raise ReapError(
                f"Mismatched {what} between branches: {in_words(key[1])!r}. It is {ours} in one, {theirs} in another"
            )


@_crosses("shard_map")
def _shard_map(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    """Each device has values of its own: outside they stand stacked, one leading axis a manual axis of the mesh.

    What is asked for is the same on all.
    """
    for (_, path), slot in crossing.slots.items():
        if slot.mode == "slot":
            raise ReapError(
                f"{in_words(path)} stands in a layer_scan in a shard_map, which gradients of layers cannot leave: put "
                "ij.gradients inside the shard_map, or write the layer_scan as a Python loop"
            )
    axes = manual_axes(params)
    stacked, replicated = jax.sharding.PartitionSpec(*axes), jax.sharding.PartitionSpec()
    is_asked = [slot.mode == "ask" for slot in crossing.planted.values()]

    def own(values: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[len(axes) :]), values)

    def function(args: Any, state: Any, planted: Any) -> Any:
        parts = [whole if asked else own(whole) for asked, whole in zip(is_asked, planted, strict=True)]
        outs, state, once = crossing.run(params["jaxpr"], args, own(state), parts)
        state, once = jax.tree.map(lambda leaf: jnp.reshape(leaf, (1,) * len(axes) + jnp.shape(leaf)), (state, once))
        return outs, state, once

    return jax.shard_map(
        function,
        mesh=params["mesh"],
        in_specs=(list(params["in_specs"]), stacked, [replicated if asked else stacked for asked in is_asked]),
        out_specs=(list(params["out_specs"]), stacked, stacked),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(args, state, planted)


@_crosses("custom_jvp_call")
def _custom_jvp(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    """The results' tangents are the user's rule's; those of what is sown, the code's."""
    primitive = jex_primitives.custom_jvp_call_p
    code = functools.partial(crossing.run, params["call_jaxpr"])

    def by_rule(args: Any) -> Any:
        with silence():
            return primitive.bind(*args, **primitive.get_bind_params(params))

    @jax.custom_jvp
    def function(args: Any, state: Any, planted: Any) -> Any:
        return code(args, state, planted)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        _, out_tangents = jax.jvp(by_rule, primals[:1], tangents[:1])
        if not crossing.keeps_any:  # the code need not be differentiable
            return code(*primals), (out_tangents, [], [])
        results, (_, *sown_tangents) = jax.jvp(code, primals, tangents)
        return results, (out_tangents, *sown_tangents)

    return function(args, state, planted)


@_crosses("custom_vjp_call")
def _custom_vjp(crossing: Crossing, params: Params, args: list[Any], state: Values, planted: Values) -> Results:
    """The results' cotangents go through the user's rule; those of what is sown, through the code."""
    primitive = jex_primitives.custom_vjp_call_p
    code = functools.partial(crossing.run, params["call_jaxpr"])

    def by_rule(args: Any) -> Any:
        with silence():
            return primitive.bind(*args, **primitive.get_bind_params(params))

    @jax.custom_vjp
    def function(args: Any, state: Any, planted: Any) -> Any:
        return code(args, state, planted)

    def forward(*operands: Any) -> Any:
        outs, *sown = code(*operands)
        _, rule_vjp = jax.vjp(by_rule, operands[0])
        # Where nothing is kept the code need not be differentiable.
        of_code = (lambda *operands: code(*operands)[1:]) if crossing.keeps_any else (lambda *operands: ([], []))
        _, code_vjp = jax.vjp(of_code, *operands)
        return (outs, *sown), (rule_vjp, code_vjp)

    def backward(vjps: Any, cotangents: Any) -> Any:
        (rule_vjp, code_vjp), (outs, *sown) = vjps, cotangents
        (by_rule_args,) = rule_vjp(outs)
        by_code_args, *rest = code_vjp(tuple(sown))
        return (jax.tree.map(_add_cotangents, by_rule_args, by_code_args), *rest)

    function.defvjp(forward, backward)
    return function(args, state, planted)


def _add_cotangents(one: Any, other: Any) -> Any:
    return one if one.dtype == jax.dtypes.float0 else one + other

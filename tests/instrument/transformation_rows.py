"""What a loop is crossed with: every transformation, as data, beside the same computation written out by hand.

A `Row` builds two programs of one `Body`. `transform` puts the body under the transformation as a user would; `by_hand`
says in plain Python what that must compute: a scan is a `for`, a cond an `if`, a `vmap` a list of examples, and `jit`
and `checkpoint` are nothing at all. A body is a function `x -> (y, aux)`: one with sites, one with a whole loop inside,
or its hand-written double. `aux` is what is carried out, so `by_hand` also says what a saved value is on the far side
of the transformation.

To add a row, add one entry to `GROUPS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

__all__ = ["GROUPS", "Body", "Row"]

Program = Callable[[Any], tuple[Any, Any]]
Transform = Callable[["Body"], Program]

STEPS = 3
SCALES = (0.9, 1.1, 0.8)


class Body:
    """A function `x -> (y, aux)` that knows what `aux` is where the body does not run."""

    def __init__(self, call: Program, nothing: Callable[[Any], Any] = lambda x: {}):
        self.call = call
        self.nothing = nothing

    def __call__(self, x: Any) -> tuple[Any, Any]:
        return self.call(x)

    def under(self, transform: "Transform") -> "Body":
        return Body(transform(self), self.nothing)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A transformation, and what must come of a loop around it and of a loop inside it."""

    name: str
    transform: Transform
    by_hand: Transform
    saved: str = "as it is"
    """What `save` gives, in the page's words."""
    visits: int = 1
    """How often a loop around it comes to the body's sites."""
    numbered: bool = False
    """The sites stand more than once in the program, so the loop gives each save a name of its own."""
    derivative: str = "grad"
    """How the whole is differentiated: `grad`, `jvp` only, `none`, or `rule`: not as what is written by hand."""
    values_only: bool = False
    """It takes values, no tracers: the loop around it stands under no transformation itself."""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What a loop around it is refused, and the error's message."""
    refused_as: str = "loop inside only"
    """The refusal in the page's words."""
    refused_here: bool = True
    """False where the versions installed here do not refuse it, and it must be right."""
    holds_effects: bool = False
    """JAX keeps an effect's operands (`jax.debug.print`'s too) longer than its leak checker allows."""


def same(body: Body) -> Program:
    return body


# Control flow, by hand


def ends_with(steps: int) -> Transform:
    """Steps one after another; what is carried out is the last step's."""

    def by_hand(body: Body) -> Program:
        def program(x: Any) -> tuple[Any, Any]:
            aux = body.nothing(x)
            for _ in range(steps):
                x, aux = body(x)
            return x, aux

        return program

    return by_hand


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def stacks(body: Body, scales: tuple[float, ...] = (1.0,) * STEPS) -> Program:
    """Steps one after another; what is carried out is every step's."""

    def program(x: Any) -> tuple[Any, Any]:
        auxes = []
        for scale in scales:
            x, aux = body(x * scale)
            auxes.append(aux)
        return x, stack(auxes)

    return program


def each(by_hand: Transform, *, in_axis: int = 0, out_axis: int = 0) -> Transform:
    """One example after another."""

    def of(body: Body) -> Program:
        def program(x: Any) -> tuple[Any, Any]:
            ys, auxes = zip(*[by_hand(body)(example) for example in jnp.moveaxis(x, in_axis, 0)], strict=True)
            return jnp.stack(ys, out_axis), stack(list(auxes))

        return program

    return of


def skips(body: Body) -> Program:
    return lambda x: (-x, body.nothing(x))


def nest(*transforms: Transform) -> Transform:
    """The first transformation of the second of ... of the body."""

    def of(body: Body) -> Program:
        for transform in reversed(transforms):
            body = body.under(transform)
        return body

    return of


# jit


def jit_twice(body: Body) -> Program:
    shared = jax.jit(body)

    def program(x: Any) -> tuple[Any, Any]:
        x, first = shared(x)
        x, second = shared(x)
        return x, (first, second)

    return program


def twice_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        x, first = body(x)
        x, second = body(x)
        return x, (first, second)

    return program


def jit_donated(body: Body) -> Program:
    donating = jax.jit(body, donate_argnums=0)

    def program(x: Any) -> tuple[Any, Any]:
        given = x + 0
        out = donating(given)
        assert isinstance(given, jax.core.Tracer) or given.is_deleted()
        return out

    return program


def jit_static(body: Body) -> Program:
    jitted = jax.jit(lambda x, scale, *, shift: body(x * scale + shift), static_argnames=("scale", "shift"))
    return lambda x: jitted(x, 0.9, shift=0.25)


def jit_sharded(body: Body) -> Program:
    everywhere = jax.NamedSharding(mesh(), jax.P())
    return jax.jit(body, in_shardings=everywhere, out_shardings=everywhere)


# Derivatives. The objective is the sum of cubes, so that a gradient depends on the values.


def objective(program: Program) -> Callable[[Any], tuple[Any, Any]]:
    def of(x: Any) -> tuple[Any, Any]:
        y, aux = program(x)
        return (y**3).sum(), aux

    return of


def grad(transform: Transform) -> Transform:
    return lambda body: jax.grad(objective(transform(body)), has_aux=True)


def value_and_grad(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        (value, aux), gradient = jax.value_and_grad(objective(body), has_aux=True)(x)
        return (value, gradient), aux

    return program


def jvp(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, tangent, aux = jax.jvp(body, (x,), (jnp.cos(x),), has_aux=True)
        return (y, tangent), aux

    return program


def vjp(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, pullback, aux = jax.vjp(body, x, has_aux=True)
        return (y, pullback(jnp.cos(x))), aux

    return program


def linearize(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, pushforward, aux = jax.linearize(body, x, has_aux=True)
        return (y, pushforward(jnp.cos(x))), aux

    return program


def hessian(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        out, aux = jax.jacfwd(lambda row: grad(same)(body)(row), has_aux=True)(x[0])
        return out, aux

    return program


def custom_jvp(body: Body) -> Program:
    """The rule is ten times the identity, which the true derivative is not."""
    function = jax.custom_jvp(body)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        out = function(*primals)
        return out, (10 * tangents[0], jax.tree.map(jnp.zeros_like, out[1]))

    return function


def custom_vjp(body: Body) -> Program:
    function = jax.custom_vjp(body)
    function.defvjp(lambda x: (body(x), None), lambda _, gradients: (10 * gradients[0],))
    return function


def custom_gradient(body: Body) -> Program:
    @jax.custom_gradient
    def function(x: Any) -> Any:
        return body(x), lambda gradients: 10 * gradients[0]

    return function


def by_rule(by_hand: Transform = same, steps: int = 1) -> Transform:
    """The gradient of the objective where each step's rule multiplies by ten."""

    def of(body: Body) -> Program:
        def program(x: Any) -> tuple[Any, Any]:
            y, aux = by_hand(body)(x)
            return 3 * y**2 * 10**steps, aux

        return program

    return of


# vmap


def vmap_mixed(body: Body) -> Program:
    """The body sees a row of `x` and a row of a matrix that is not mapped."""
    return lambda x: jax.vmap(lambda row, matrix: body(row + matrix[0]), in_axes=(0, None))(x, jnp.tanh(x))


def vmap_mixed_by_hand(body: Body) -> Program:
    return lambda x: each(lambda body: lambda row: body(row + jnp.tanh(x)[0]))(body)(x)


def vmap_unmapped(body: Body) -> Program:
    """The body's value does not depend on the batch."""

    def program(x: Any) -> tuple[Any, Any]:
        def of_row(row: Any) -> tuple[Any, Any]:
            y, aux = body(x[0])
            return row + y, aux

        return jax.vmap(of_row, out_axes=(0, None))(x)

    return program


def vmap_unmapped_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, aux = body(x[0])
        return x + y, aux

    return program


def vmap_named(body: Body) -> Program:
    def of_row(row: Any) -> tuple[Any, Any]:
        y, aux = body(row)
        return y - lax.pmean(y, "batch"), aux

    return jax.vmap(of_row, axis_name="batch")


def vmap_named_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, aux = each(same)(body)(x)
        return y - y.mean(0), aux

    return program


# Control flow


def scan(body: Body, length: int = STEPS, **options: Any) -> Program:
    def step(carry: Any, _: Any) -> tuple[Any, Any]:
        return body(carry)

    return lambda x: lax.scan(step, x, length=length, **options)


def scan_stacked(body: Body, **options: Any) -> Program:
    def step(carry: Any, scale: Any) -> tuple[Any, Any]:
        return body(carry * scale)

    return lambda x: lax.scan(step, x, jnp.array(SCALES), **options)


def scan_backwards_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, aux = stacks(body, SCALES[::-1])(x)
        return y, jax.tree.map(lambda leaf: leaf[::-1], aux)

    return program


def scan_weak(body: Body) -> Program:
    """The carry starts weakly typed."""

    def step(carry: Any, _: Any) -> tuple[Any, Any]:
        x, mean = carry
        y, aux = body(x * jnp.cos(mean))
        return (x, y.mean()), aux

    return lambda x: lax.scan(step, (x, 0.0), length=STEPS)


def scan_weak_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        carry, auxes = jnp.float32(0), []
        for _ in range(STEPS):
            y, aux = body(x * jnp.cos(carry))
            carry = y.mean()
            auxes.append(aux)
        return (x, carry), stack(auxes)

    return program


def scan_in_scan(body: Body) -> Program:
    return scan(body.under(scan), length=2)


def stacks_in_stacks(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        auxes = []
        for _ in range(2):
            x, aux = stacks(body)(x)
            auxes.append(aux)
        return x, stack(auxes)

    return program


def lax_map(body: Body, **options: Any) -> Program:
    return lambda x: lax.map(body, x, **options)


def in_chunks(by_hand: Transform) -> Transform:
    """Rows in chunks of four: an iteration a chunk."""

    def of(body: Body) -> Program:
        def program(x: Any) -> tuple[Any, Any]:
            y, aux = by_hand(body)(x)
            return y, jax.tree.map(lambda leaf: leaf.reshape(-1, 4, *leaf.shape[1:]), aux)

        return program

    return of


def while_steps(body: Body, steps: Callable[[Any], Any]) -> Program:
    def goes_on(carry: Any) -> Any:
        count, limit, _, _ = carry
        return count < limit

    def step(carry: Any) -> Any:
        count, limit, x, _ = carry
        return (count + 1, limit, *body(x))

    return lambda x: lax.while_loop(goes_on, step, (0, steps(x), x, body.nothing(x)))[2:]


def while_loop(steps: int) -> Transform:
    return lambda body: while_steps(body, lambda x: steps)


def while_of_scan(body: Body) -> Program:
    return while_loop(2)(Body(scan(body), lambda x: stack([body.nothing(x)] * STEPS)))


def while_of_scan_by_hand(body: Body) -> Program:
    return ends_with(2)(Body(stacks(body), lambda x: stack([body.nothing(x)] * STEPS)))


def steps_of(x: Any) -> Any:
    """From none to three, by the data."""
    return jnp.clip(x.sum(), 0, STEPS).astype(jnp.int32)


def while_by_data(body: Body) -> Program:
    return while_steps(body, steps_of)


def while_by_data_by_hand(body: Body) -> Program:
    return lambda x: ends_with(int(steps_of(x)))(body)(x)


def while_condition(body: Body) -> Program:
    """The sites stand in the condition."""

    def goes_on(x: Any) -> Any:
        return abs(body(x)[0].sum()) < 20

    def step(x: Any) -> Any:
        return x * 2

    return lambda x: (lax.while_loop(goes_on, step, x), ())


def while_condition_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        while abs(body(x)[0].sum()) < 20:
            x = x * 2
        return x, ()

    return program


def fori_static(body: Body) -> Program:
    """A loop inside carries its buffer of all iterations itself: a `fori_loop` stacks nothing."""

    def step(index: Any, carry: Any) -> Any:
        y, aux = body(carry[0])
        return y, jax.tree.map(lambda buffer, row: buffer.at[index].set(row), carry[1], aux)

    return lambda x: lax.fori_loop(0, STEPS, step, (x, stack([body.nothing(x)] * STEPS)))


def fori_dynamic(body: Body) -> Program:
    def step(_: Any, carry: Any) -> Any:
        return body(carry[0])

    jitted = jax.jit(lambda x, steps: lax.fori_loop(0, steps, step, (x, body.nothing(x))))
    return lambda x: jitted(x, STEPS)


Predicate = Callable[[Any], Any]


def cond(body: Body, predicate: Predicate) -> Program:
    otherwise = skips(body)
    return lambda x: lax.cond(predicate(x), body, otherwise, x)


def branches(predicate: Predicate, otherwise: Transform = skips) -> Transform:
    """An ordinary `if`."""
    return lambda body: lambda x: (body if predicate(x) else otherwise(body))(x)


def is_positive(x: Any) -> Any:
    return x.sum() > 0


def is_negative(x: Any) -> Any:
    return x.sum() < 0


def is_first(x: Any) -> Any:
    """True in the first iteration of a loop, and not in the others."""
    return x.mean() > 0.47


def cond_taken(body: Body) -> Program:
    return cond(body, is_positive)


def cond_not_taken(body: Body) -> Program:
    return cond(body, is_negative)


def cond_at_first(body: Body) -> Program:
    return cond(body, is_first)


def cond_of_scan(body: Body) -> Program:
    return cond_taken(Body(scan(body), lambda x: stack([body.nothing(x)] * STEPS)))


def cond_of_scan_by_hand(body: Body) -> Program:
    return branches(is_positive)(Body(stacks(body), lambda x: stack([body.nothing(x)] * STEPS)))


def cond_both(body: Body) -> Program:
    other = half(body)
    return lambda x: lax.cond(x.sum() < 0, body, other, x)


def switch(body: Body) -> Program:
    of_index = [body, skips(body), half(body)]
    return lambda x: lax.switch(steps_of(x) % 3, of_index, x)


def switch_by_hand(body: Body) -> Program:
    return lambda x: [body, skips(body), half(body)][int(steps_of(x)) % 3](x)


def half(body: Body) -> Program:
    return lambda x: body(x * 0.5)


# Devices


def mesh() -> Any:
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def shard_map(body: Body, in_specs: Any = None, mesh: Callable[[], Any] = mesh, **options: Any) -> Program:
    def local(x: Any) -> tuple[Any, Any]:
        y, aux = body(x)
        return y, jax.tree.map(lambda leaf: leaf[None], aux)

    in_specs = jax.P("data") if in_specs is None else in_specs
    return jax.shard_map(local, mesh=mesh(), in_specs=in_specs, out_specs=jax.P("data"), **options)


def shard_map_partly(body: Body) -> Program:
    """Manual over one axis of the mesh, while the compiler keeps the other."""
    auto = jax.sharding.AxisType.Auto

    def two_axes() -> Any:
        return jax.make_mesh((jax.device_count(), 1), ("data", "latent"), axis_types=(auto, auto))

    return shard_map(body, mesh=two_axes, axis_names={"data"})


def shards(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        ys, auxes = zip(*[body(shard) for shard in jnp.split(x, jax.device_count())], strict=True)
        return jnp.concatenate(ys), stack(list(auxes))

    return program


def copies(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        y, aux = body(x)
        return jnp.concatenate([y] * jax.device_count()), stack([aux] * jax.device_count())

    return program


# Without running


def zeros_of_shapes(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(body, x))

    return program


def zeros_by_hand(body: Body) -> Program:
    return lambda x: jax.tree.map(jnp.zeros_like, body(x))


def evaluated_jaxpr(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        jaxpr, shapes = jax.make_jaxpr(body, return_shape=True)(x)
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.extend.core.jaxpr_as_fun(jaxpr)(x))

    return program


def compiled_ahead(body: Body) -> Program:
    shape = jax.ShapeDtypeStruct
    return lambda x: jax.jit(body).lower(shape(x.shape, x.dtype)).compile()(np.asarray(x))


def disabled_jit(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        with jax.disable_jit():
            return jax.jit(body)(x)

    return program


# Flax


class LinenBlock(nn.Module):
    body: Any

    @nn.compact
    def __call__(self, x):
        return self.body(x * self.param("scale", nn.initializers.ones, ()))


class LinenStep(nn.Module):
    body: Any

    @nn.compact
    def __call__(self, x, _):
        return LinenBlock(self.body, name="block")(x)


def linen(transform: Callable[[Any], Any] = lambda module: module) -> Transform:
    def of(body: Body) -> Program:
        module = transform(LinenBlock)(body)
        return lambda x: module.apply({"params": {"scale": jnp.float32(SCALES[0])}}, x)

    return of


def linen_scan(body: Body, wrap: Callable[[Any], Any] = lambda module: module) -> Program:
    layers = nn.scan(wrap(LinenStep), variable_axes={"params": 0}, split_rngs={"params": True}, length=STEPS)(body)
    variables = {"params": {"block": {"scale": jnp.array(SCALES)}}}
    return lambda x: layers.apply(variables, x, None)


def flax_takes_effects_for_data() -> bool:
    """Newer Flax refuses any effect in the body of its scan, that of `jax.debug.print` too."""
    try:
        linen_scan(Body(lambda x: (jax.debug.callback(lambda _: None, x), (x, {}))[1]))(jnp.ones(2))
    except ValueError:
        return True
    return False


def linen_vmap(body: Body) -> Program:
    module = nn.vmap(LinenBlock, variable_axes={"params": None}, split_rngs={"params": False})(body)
    return lambda x: module.apply({"params": {"scale": jnp.float32(SCALES[0])}}, x)


class NnxBlock(nnx.Module):
    def __init__(self, body: Body, scale: Any):
        self.body = body
        self.scale = nnx.Param(jnp.asarray(scale, jnp.float32))

    def __call__(self, x):
        return self.body(x * self.scale[...])


def brought(module: Any, x: Any) -> Any:
    """NNX refuses a module that was made outside the current trace: there a user hands it in as an argument."""
    return nnx.clone(module) if isinstance(x, jax.core.Tracer) else module


def call(module: Any, x: Any) -> tuple[Any, Any]:
    return module(x)


def nnx_called(transform: Callable[[Any], Any]) -> Transform:
    def of(body: Body) -> Program:
        module, called = NnxBlock(body, SCALES[0]), transform(call)
        return lambda x: called(brought(module, x), x)

    return of


def nnx_grad(transform: Any) -> Transform:
    def of(body: Body) -> Program:
        module = NnxBlock(body, SCALES[0])

        def program(x: Any) -> tuple[Any, Any]:
            gradient, aux = transform(lambda module: objective(module)(x), has_aux=True)(brought(module, x))
            return jax.tree.leaves(gradient), aux

        return program

    return of


def scale_gradient_by_hand(body: Body) -> Program:
    def program(x: Any) -> tuple[Any, Any]:
        gradient, aux = jax.grad(lambda scale: objective(lambda x: body(x * scale))(x), has_aux=True)(SCALES[0])
        return [gradient], aux

    return program


def nnx_lax_scan(body: Body) -> Program:
    layers = NnxBlock(body, SCALES)
    return lambda x: lax.scan(lambda x, layer: layer(x), x, brought(layers, x))


def nnx_scan(body: Body) -> Program:
    layers = NnxBlock(body, SCALES)
    scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return lambda x: scanned(x, brought(layers, x))


def nnx_cond(body: Body) -> Program:
    module = NnxBlock(body, SCALES[0])
    return lambda x: nnx.cond(is_positive(x), call, lambda module, x: skips(body)(x), brought(module, x), x)


def nnx_cond_by_hand(body: Body) -> Program:
    return lambda x: scaled(body)(x) if is_positive(x) else skips(body)(x)


def scaled(body: Body) -> Program:
    return lambda x: body(x * SCALES[0])


def scales_stacked(body: Body) -> Program:
    return stacks(body, SCALES)


policies = jax.checkpoint_policies
CHECKPOINT_POLICIES = {
    "nothing_saveable": policies.nothing_saveable,
    "everything_saveable": policies.everything_saveable,
    "dots_saveable": policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": policies.save_only_these_names("hidden"),
    "save_anything_except_these_names": policies.save_anything_except_these_names("hidden"),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

STACKED = "one an iteration, stacked"
LAST = "of the last iteration; zeros if there was none"
TAKEN = "if that branch was taken, else zeros"
BATCHED = "batch axis first"
SHARDED = "one leading axis for each manual axis of the mesh"
UNREACHED = "was saved in a function whose values cannot leave it"

GROUPS = {
    "Nothing, and `jit`": [
        Row("nothing", same, same),
        Row("jit", jax.jit, same),
        Row("jit, shared by two call sites", jit_twice, twice_by_hand, visits=2, numbered=True),
        Row("jit of jit", nest(jax.jit, jax.jit), same),
        Row("jit, donated argument", jit_donated, same),
        Row("jit, static arguments", jit_static, lambda body: lambda x: body(x * 0.9 + 0.25)),
        Row("jit, shardings", jit_sharded, same),
        Row("jit, inline", functools.partial(jax.jit, inline=True), same),
        Row("jit, disabled", disabled_jit, same),
    ],
    "Derivatives": [
        Row("grad", grad(same), grad(same)),
        Row("value_and_grad(has_aux=True)", value_and_grad, value_and_grad),
        Row("jvp", jvp, jvp),
        Row("vjp", vjp, vjp),
        Row("linearize", linearize, linearize),
        Row("hessian", hessian, hessian),
        Row("grad of jit", grad(jax.jit), grad(same)),
        Row("jit of grad", nest(jax.jit, grad(same)), grad(same)),
    ],
    "`vmap`": [
        Row("vmap", jax.vmap, each(same), BATCHED),
        Row("vmap(in_axes=1)", functools.partial(jax.vmap, in_axes=1), each(same, in_axis=1), BATCHED),
        Row(
            "vmap(in_axes=1, out_axes=1)",
            functools.partial(jax.vmap, in_axes=1, out_axes=(1, 0)),
            each(same, in_axis=1, out_axis=1),
            BATCHED,
        ),
        Row("vmap(in_axes=(0, None))", vmap_mixed, vmap_mixed_by_hand, BATCHED),
        Row("vmap, value not mapped", vmap_unmapped, vmap_unmapped_by_hand),
        Row("vmap(axis_name=...)", vmap_named, vmap_named_by_hand, BATCHED),
        Row("vmap of vmap", nest(jax.vmap, jax.vmap), each(each(same)), BATCHED),
        Row("vmap of jit", nest(jax.vmap, jax.jit), each(same), BATCHED),
        Row("vmap of grad", nest(jax.vmap, grad(same)), each(grad(same)), BATCHED),
        Row("grad of vmap", grad(jax.vmap), grad(each(same)), BATCHED),
    ],
    "`checkpoint`": [
        Row("checkpoint", jax.checkpoint, same),
        Row("jit of checkpoint of jit", nest(jax.jit, jax.checkpoint, jax.jit), same),
        Row("checkpoint of vmap", nest(jax.checkpoint, jax.vmap), each(same), BATCHED),
        Row("checkpoint of grad", nest(jax.checkpoint, grad(same)), grad(same)),
        Row("grad of checkpoint", grad(jax.checkpoint), grad(same)),
        *[
            Row(f"grad of checkpoint, {name}", grad(functools.partial(jax.checkpoint, policy=policy)), grad(same))
            for name, policy in CHECKPOINT_POLICIES.items()
        ],
        Row(
            "grad of checkpoint(prevent_cse=False)",
            grad(functools.partial(jax.checkpoint, prevent_cse=False)),
            grad(same),
        ),
    ],
    "Loops": [
        Row("scan", scan, stacks, STACKED),
        Row("scan over stacked parameters", scan_stacked, scales_stacked, STACKED),
        Row("scan(reverse=True)", functools.partial(scan_stacked, reverse=True), scan_backwards_by_hand, STACKED),
        Row("scan(unroll=2)", functools.partial(scan, unroll=2), stacks, STACKED),
        Row("scan, weakly typed carry", scan_weak, scan_weak_by_hand, STACKED),
        Row("scan in scan", scan_in_scan, stacks_in_stacks, STACKED),
        Row("scan of jit", nest(scan, jax.jit), stacks, STACKED),
        Row("scan of grad", nest(scan, grad(same)), nest(stacks, grad(same)), STACKED),
        Row("scan of vmap", nest(scan, jax.vmap), nest(stacks, each(same)), STACKED),
        Row("vmap of scan", nest(jax.vmap, scan), each(stacks), STACKED),
        Row("grad of scan of checkpoint", grad(nest(scan, jax.checkpoint)), grad(stacks), STACKED, holds_effects=True),
        Row("grad of jit of checkpoint of scan", grad(nest(jax.jit, jax.checkpoint, scan)), grad(stacks), STACKED),
        Row("lax.map", lax_map, each(same), STACKED),
        Row(
            "lax.map(batch_size=4)",
            in_chunks(functools.partial(lax_map, batch_size=4)),
            in_chunks(each(same)),
            "one a chunk, stacked, then the batch axis",
        ),
        Row("while_loop", while_loop(STEPS), ends_with(STEPS), LAST, derivative="jvp"),
        Row("while_loop, no iteration", while_loop(0), ends_with(0), LAST, derivative="jvp"),
        Row(
            "while_loop, in its condition",
            while_condition,
            while_condition_by_hand,
            derivative="jvp",
            refused={"save": "in the condition of a while loop"},
        ),
        Row(
            "vmap of while_loop, batched predicate",
            nest(jax.vmap, while_by_data),
            each(while_by_data_by_hand),
            LAST,
            derivative="jvp",
        ),
        Row("while_loop of scan", while_of_scan, while_of_scan_by_hand, LAST, derivative="jvp"),
        Row("scan of while_loop", nest(scan, while_loop(2)), nest(stacks, ends_with(2)), STACKED, derivative="jvp"),
        Row("fori_loop, static bounds", fori_static, stacks, STACKED),
        Row("fori_loop, dynamic bounds", fori_dynamic, ends_with(STEPS), LAST, derivative="jvp"),
    ],
    "Branches": [
        Row("cond, branch taken", cond_taken, branches(is_positive), TAKEN),
        Row("cond, branch not taken", cond_not_taken, branches(is_negative), TAKEN),
        Row("cond, in both branches", cond_both, branches(is_negative, half), TAKEN, visits=2),
        Row("switch, in two of three branches", switch, switch_by_hand, TAKEN, visits=2),
        Row("grad of cond", grad(cond_taken), grad(branches(is_positive)), TAKEN),
        Row(
            "jit of vmap of cond, batched predicate",
            nest(jax.jit, jax.vmap, cond_taken),
            each(branches(is_positive)),
            TAKEN,
        ),
        Row("vmap of switch, batched index", nest(jax.vmap, switch), each(switch_by_hand), TAKEN, visits=2),
        Row("scan of cond", nest(scan, cond_at_first), nest(stacks, branches(is_first)), STACKED),
        Row("cond of scan", cond_of_scan, cond_of_scan_by_hand, TAKEN),
        Row(
            "while_loop of cond",
            nest(while_loop(STEPS), cond_at_first),
            nest(ends_with(STEPS), branches(is_first)),
            LAST,
            derivative="jvp",
        ),
        Row("checkpoint of cond of jit", nest(jax.checkpoint, cond_taken, jax.jit), branches(is_positive), TAKEN),
    ],
    "Derivative rules of the user's": [
        Row("custom_jvp", custom_jvp, same, derivative="rule"),
        Row("custom_vjp", custom_vjp, same, derivative="rule"),
        Row("custom_gradient", custom_gradient, same, derivative="rule"),
        Row("jit of custom_jvp", nest(jax.jit, custom_jvp), same, derivative="rule"),
        Row("jit of custom_vjp", nest(jax.jit, custom_vjp), same, derivative="rule"),
        Row("grad of custom_jvp", grad(custom_jvp), by_rule(), derivative="rule"),
        Row("grad of custom_vjp", grad(custom_vjp), by_rule(), derivative="rule"),
        Row("grad of custom_gradient", grad(custom_gradient), by_rule(), derivative="rule"),
        Row("grad of jit of custom_jvp", grad(nest(jax.jit, custom_jvp)), by_rule(), visits=2, derivative="rule"),
        Row("grad of jit of custom_vjp", grad(nest(jax.jit, custom_vjp)), by_rule(), visits=2, derivative="rule"),
        Row("vmap of custom_jvp", nest(jax.vmap, custom_jvp), each(same), BATCHED, derivative="rule"),
        Row("vmap of custom_vjp", nest(jax.vmap, custom_vjp), each(same), BATCHED, derivative="rule"),
        Row("scan of custom_jvp", nest(scan, custom_jvp), stacks, STACKED, derivative="rule"),
        Row("scan of custom_vjp", nest(scan, custom_vjp), stacks, STACKED, derivative="rule"),
        Row(
            "grad of scan of custom_jvp",
            grad(nest(scan, custom_jvp)),
            by_rule(stacks, STEPS),
            STACKED,
            visits=2,
            derivative="rule",
            holds_effects=True,
        ),
        Row(
            "grad of scan of custom_vjp",
            grad(nest(scan, custom_vjp)),
            by_rule(stacks, STEPS),
            STACKED,
            visits=2,
            derivative="rule",
            holds_effects=True,
        ),
    ],
    "Devices": [
        Row("shard_map", shard_map, shards, SHARDED),
        Row("jit of shard_map", nest(jax.jit, shard_map), shards, SHARDED),
        Row(
            "jit of shard_map, replicated input",
            nest(jax.jit, functools.partial(shard_map, in_specs=jax.P())),
            copies,
            SHARDED,
        ),
        Row(
            "jit of shard_map(check_vma=False)",
            nest(jax.jit, functools.partial(shard_map, check_vma=False)),
            shards,
            SHARDED,
        ),
        Row("jit of shard_map, manual over one of two axes", nest(jax.jit, shard_map_partly), shards, SHARDED),
        Row("jit of grad of shard_map", nest(jax.jit, grad(shard_map)), grad(shards), SHARDED),
        Row("jit of shard_map of scan", nest(jax.jit, shard_map, scan), nest(shards, stacks), SHARDED),
        Row("scan of shard_map", nest(scan, shard_map), nest(stacks, shards), STACKED),
        Row("shard_map of vmap", nest(shard_map, jax.vmap), nest(shards, each(same)), SHARDED),
        Row(
            "vmap of shard_map",
            nest(functools.partial(jax.vmap, in_axes=1), shard_map),
            each(shards, in_axis=1),
            BATCHED,
        ),
        Row(
            "jit of shard_map of vmap of scan",
            nest(jax.jit, shard_map, jax.vmap, scan),
            nest(shards, each(stacks)),
            SHARDED,
        ),
    ],
    "Without running": [
        Row("eval_shape", zeros_of_shapes, zeros_by_hand, refused={"save": UNREACHED}, derivative="none"),
        Row("make_jaxpr, then evaluated", evaluated_jaxpr, same, derivative="none"),
        Row(
            "lower and compile", compiled_ahead, same, derivative="none", values_only=True, refused={"save": UNREACHED}
        ),
    ],
    "Flax": [
        Row("linen", linen(), scaled),
        Row("linen nn.jit", linen(nn.jit), scaled),
        Row("linen nn.remat", linen(nn.remat), scaled),
        *[
            Row(
                name,
                functools.partial(linen_scan, wrap=wrap),
                scales_stacked,
                STACKED,
                visits=2,
                refused={"save": "data dependency on the scan body"},
                refused_as="newest Flax: loop inside only",
                refused_here=flax_takes_effects_for_data(),
                holds_effects=True,
            )
            for name, wrap in {"linen nn.scan": same, "linen nn.scan of nn.remat": nn.remat}.items()
        ],
        Row("linen nn.vmap", linen_vmap, each(scaled), BATCHED),
        Row("NNX under jax.jit", nnx_called(jax.jit), scaled),
        Row("NNX under jax.checkpoint", nnx_called(jax.checkpoint), scaled),
        Row("NNX under jax.grad", nnx_grad(jax.grad), scale_gradient_by_hand),
        Row("NNX under jax.lax.scan", nnx_lax_scan, scales_stacked, STACKED),
        Row("nnx.jit", nnx_called(nnx.jit), scaled),
        Row("nnx.remat", nnx_called(nnx.remat), scaled),
        Row("nnx.grad", nnx_grad(nnx.grad), scale_gradient_by_hand),
        Row("nnx.scan", nnx_scan, scales_stacked, STACKED),
        Row("nnx.vmap", nnx_called(functools.partial(nnx.vmap, in_axes=(None, 0))), each(scaled), BATCHED),
        Row("nnx.cond", nnx_cond, nnx_cond_by_hand, TAKEN),
    ],
}

"""How a model's weights lie while tokens are generated: for a step's few rows, on a CPU, a copy is read faster.

- **Turned**: XLA for CPU gets through a matrix up to 1.6 times as fast where its outputs lie first
  (`products.times_turned`), if there are two rows or more.
- **Unrolled**: out of a stack every layer is copied at every step before it is multiplied. Without, SmolLM2's steps are
  an eighth to a fifth shorter, and steadier: with copies they took up to twice as long where another program wanted the
  processor's cache. In bfloat16 XLA widens what it copies, and 16 rows took twice as long. But each layer is compiled
  by itself.

Either is done where the steps make up for it: for the copy, and for the compilation. The copy is made a layer at a time
by one small program. Elsewhere than on a CPU weights are left as they are.
"""

import functools
import math
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from interp_jax.models.products import FEW_ROWS, Turned
from interp_jax.models.transformer import Block, KeyValueCache, Transformer, with_blocks

__all__ = ["laid_out", "laid_out_for_steps", "unstacked"]

_STEPS_WORTH_TURNING = 32
"""Turning the weights takes as long as 15 to 30 steps gain by it."""
_BYTES_WORTH_A_LAYER = {"several rows": 1.5e9, "several rows in bfloat16": 0.4e9, "one row": 4e9}
"""Reading so much where it lies, not out of a stack, gains the time that one more layer takes to compile. Of SmolLM2 16
rows were even after 160 steps on a quiet machine and 85 on a busy one, one row after 400 and 100. One row's products
take the longest to compile."""
_MOST_BYTES = 4 * 2**30
"""Models of more are left as they are: the copy lies in memory beside them."""


def laid_out_for_steps(model: Transformer, batch: int, max_new_tokens: int) -> Transformer | None:
    """The model as the steps of a generation read it fastest; None where a copy is not made up for.

    Args:
        model: The model.
        batch: Rows.
        max_new_tokens: Steps.
    """
    leaves = jax.tree.leaves(model)
    if batch > FEW_ROWS or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    devices = set[jax.Device]().union(*(leaf.devices() for leaf in leaves if isinstance(leaf, jax.Array)))
    is_on_one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    if not is_on_one_cpu or sum(leaf.nbytes for leaf in leaves) > _MOST_BYTES:
        return None
    several = "several rows in bfloat16" if model.compute_dtype == jnp.bfloat16 else "several rows"
    worth = model.config.n_layers * _BYTES_WORTH_A_LAYER["one row" if batch == 1 else several]
    n_read = max_new_tokens * sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
    is_turned = batch > 1 and max_new_tokens >= _STEPS_WORTH_TURNING
    is_unrolled = model.is_stacked and n_read >= worth
    return laid_out(model, is_turned=is_turned, is_unrolled=is_unrolled) if is_turned or is_unrolled else None


def laid_out(model: Transformer, *, is_turned: bool, is_unrolled: bool) -> Transformer:
    """The same model over a copy of its weights; for passes alone, and not to be laid out twice.

    Args:
        model: The model.
        is_turned: Whether the matrices of the blocks and of an unembedding lie with their outputs first, under their
            own names; but queries' with keys' and values', which are small alone, in `W_qkv` in place of three.
        is_unrolled: Whether the layers of a stack are laid out each by itself.
    """
    blocks = cast(Any, model.blocks)
    if is_unrolled and model.is_stacked:
        numbers = range(model.config.n_layers)
        blocks = nnx.List([_layer_of(blocks, jnp.asarray(number), is_turned) for number in numbers])
    elif is_turned:
        blocks = _turned(blocks, 1) if model.is_stacked else nnx.List([_turned(block, 0) for block in blocks])
    other = with_blocks(model, blocks)
    if is_turned and not model.config.tied_embeddings:
        other.W_unembed = Turned(_outputs_first(model.W_unembed[...], lead=0, inputs=1))
    return other


def unstacked(cache: KeyValueCache) -> KeyValueCache:
    """The cache of a stacked model, for the same model unrolled.

    Args:
        cache: Its keys and values are stacked.
    """
    k, v = (tuple(cast(Array, stack)) for stack in (cache.k, cache.v))
    return KeyValueCache(k, v, cache.positions, cache.n_filled)


@functools.partial(jax.jit, static_argnums=2)
def _layer_of(stack: Block, number: Array, is_turned: bool) -> Block:
    """One layer of a stack; which is data, so that one program serves all."""
    block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stack)
    return _turned(block, 0) if is_turned else block


@functools.partial(jax.jit, static_argnums=1)
def _turned(block: Block, lead: int) -> Block:
    """Another module over the same arrays but for those that are turned; `lead` is 1 for a stack."""
    other = jax.tree.map(lambda leaf: leaf, block)

    def turned(*weights: nnx.Param, inputs: int = 1) -> Turned:
        return Turned(jnp.concatenate([_outputs_first(weight[...], lead, inputs) for weight in weights], axis=lead))

    attn, mlp = other.attn, other.mlp
    attn.W_qkv, attn.W_o = turned(attn.W_q, attn.W_k, attn.W_v), turned(attn.W_o, inputs=2)
    del attn.W_q, attn.W_k, attn.W_v
    if mlp.config.gated_mlp:
        mlp.W_gate = turned(mlp.W_gate)
    mlp.W_in, mlp.W_out = turned(mlp.W_in), turned(mlp.W_out)
    return other


@functools.partial(jax.jit, static_argnames=("lead", "inputs"))
def _outputs_first(weight: Array, lead: int, inputs: int) -> Array:
    """`[*lead, *inputs, *outputs]` as `[*lead, *outputs, *inputs]`.

    In strips of a cache line, which takes XLA for CPU less than half as long as in one go.
    """
    shape, strip = weight.shape, 16
    before, rows, columns = shape[:lead], shape[lead : lead + inputs], shape[lead + inputs :]
    matrices = weight.reshape(-1, math.prod(rows), math.prod(columns))
    if matrices.shape[2] % strip:
        return matrices.swapaxes(1, 2).reshape(*before, *columns, *rows)
    strips = matrices.reshape(*matrices.shape[:2], -1, strip).swapaxes(1, 2)
    strips = jax.lax.optimization_barrier(strips)  # else XLA makes one step of two
    return strips.swapaxes(2, 3).reshape(*before, *columns, *rows)

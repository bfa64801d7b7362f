"""What attention gives for queries, keys and values: scores, softmax, and the values' weighted sum.

Whole, where somebody may look at the scores: two sites show them. Otherwise, where there are many, in blocks of
queries, so that one block's scores alone are in memory. Each query's row is computed in the same way, by a program that
is differentiated without keeping scores. A causal pass leaves out keys that no query of a quarter sees.

Measured, of SmolLM2 with logits on two cores (`python -m benchmarks.models --only long`): 1 x 4096 tokens took 45 s
whole and 15 s in blocks, 4 x 1024 took 12.8 and 9.8 s, with a seventh and two fifths of the memory. A GPU's kernels
want large blocks, and are given them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from interp_jax.instrument import site
from interp_jax.instrument.running_pass import may_be_shown
from interp_jax.models.products import product

__all__ = ["attended", "soft_capped"]

_SITES = ("attn_logits", "attn_probs")
_MOST_SCORES_AT_ONCE = {"cpu": 2**22, "elsewhere": 2**30}
"""More are computed in blocks."""
_SCORES_OF_A_BLOCK = {"cpu": 2**21, "elsewhere": 2**30}
"""On a CPU so many lie in its cache."""
_SMALLEST_BLOCK = 32
_PARTS = 4
"""Of a causal pass; each sees the keys up to its own end."""


def attended(
    queries: Float[Array, "batch seq groups members d_head"],
    keys: Float[Array, "batch groups a b"],
    values: Float[Array, "batch groups keys d_head"],
    sees: Bool[Array, "rows 1 seq keys"],
    scale: Any,
    *,
    soft_cap: float | None,
    is_turned: bool,
    is_causal: bool,
) -> Float[Array, "batch groups members seq d_head"]:
    """What each head reads.

    Args:
        queries: a group shares one key-value head.
        keys: `[batch, groups, keys, d_head]`; turned `[batch, groups, d_head, keys]`.
        values: one for each key.
        sees: which query sees which key; rows is batch or 1.
        scale: what a score is multiplied with.
        soft_cap: of the scores; None for none.
        is_turned: how the keys lie.
        is_causal: whether no query sees a key behind its own index.
    """
    given = queries, keys, values, sees, scale
    n_scores = _scores_of_a_query(queries, values) * queries.shape[1]
    is_known = isinstance(n_scores, int)  # in an export of any batch size it is not
    if not is_known or n_scores <= _MOST_SCORES_AT_ONCE["cpu"] or may_be_shown(*_SITES):
        return _heads(*given, soft_cap=soft_cap, is_turned=is_turned, show=True)
    for name in _SITES:
        site(np.zeros(()), name)  # nobody wants them, but a list of the sites that exist has them
    return _in_blocks(*given, soft_cap=soft_cap, is_turned=is_turned, is_causal=is_causal)


def _scores_of_a_query(queries: Array, values: Array) -> Any:
    """How many scores one position has, over all rows and heads."""
    batch, _, groups, members, _ = queries.shape
    return batch * groups * members * values.shape[2]


def soft_capped(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`.

    Args:
        x: scores or logits.
        cap: None for none.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def _heads(
    queries: Array,
    keys: Array,
    values: Array,
    sees: Array,
    scale: Any,
    *,
    soft_cap: float | None,
    is_turned: bool,
    show: bool = False,
) -> Array:
    """`attended`, whole."""
    batch, seq, groups, members, _ = queries.shape
    if is_turned:
        scores = product("bgmqd,bgdk->bgmqk", jnp.moveaxis(queries, 1, 3), keys)
    else:
        scores = product("bqgmd,bgkd->bgmqk", queries, keys)
    scores = scores * scale
    scores = soft_capped(scores, soft_cap).reshape(batch, groups * members, seq, -1)
    scores = site(scores, _SITES[0]) if show else scores
    # Not -inf: a position that is padding sees nothing, and its row shall be finite.
    masked = jnp.where(sees, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(masked, axis=-1).astype(queries.dtype)
    probs = site(probs, _SITES[1]) if show else probs
    return product("bgmqk,bgkd->bgmqd", probs.reshape(batch, groups, members, seq, -1), values)


@functools.partial(jax.jit, inline=True, static_argnames=("soft_cap", "is_turned", "is_causal"))
def _in_blocks(
    queries: Array,
    keys: Array,
    values: Array,
    sees: Array,
    scale: Any,
    *,
    soft_cap: float | None,
    is_turned: bool,
    is_causal: bool,
) -> Array:
    """`attended`, a block of queries at a time."""
    one = functools.partial(_heads, soft_cap=soft_cap, is_turned=is_turned)
    of_query = _scores_of_a_query(queries, values)

    def on(platform: str) -> Any:
        if of_query * queries.shape[1] <= _MOST_SCORES_AT_ONCE[platform]:
            return one
        block = max(_SMALLEST_BLOCK, _SCORES_OF_A_BLOCK[platform] // of_query)
        return functools.partial(_part_by_part if is_causal else _block_by_block, one, block)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else one way keeps room for what the other one keeps
    def on_its_device(*args: Any) -> Array:
        return jax.lax.platform_dependent(*args, cpu=on("cpu"), default=on("elsewhere"))

    return on_its_device(queries, keys, values, sees, scale)


def _part_by_part(one: Any, block: int, queries: Array, keys: Array, values: Array, sees: Array, scale: Any) -> Array:
    """A causal pass over keys that lie as they come; none is behind a part's end."""
    size = block * math.ceil(queries.shape[1] / (block * _PARTS))
    found = []
    for start in range(0, queries.shape[1], size):
        end = start + size
        part = queries[:, start:end], keys[:, :, :end], values[:, :, :end], sees[:, :, start:end, :end]
        found.append(_block_by_block(one, block, *part, scale))
    return jnp.concatenate(found, axis=3)


def _block_by_block(one: Any, block: int, queries: Array, keys: Array, values: Array, sees: Array, scale: Any) -> Array:
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(queries: Array, sees: Array, keys: Array, values: Array, scale: Any) -> Array:
        return one(queries, keys.astype(queries.dtype), values.astype(queries.dtype), sees, scale)

    wide = jnp.promote_types(keys.dtype, jnp.float32)  # in which their gradients are summed over the blocks
    keys, values = keys.astype(wide), values.astype(wide)
    batch, seq, *heads = queries.shape
    n_whole = seq // block
    if not n_whole:
        return of_block(queries, sees, keys, values, scale)
    whole = n_whole * block
    blocks = (
        jnp.moveaxis(queries[:, :whole].reshape(batch, n_whole, block, *heads), 1, 0),
        jnp.moveaxis(sees[:, :, :whole].reshape(*sees.shape[:2], n_whole, block, -1), 2, 0),
    )
    found = jax.lax.map(lambda each: of_block(*each, keys, values, scale), blocks)  # block, batch, ..., query, d_head
    found = jnp.moveaxis(found, 0, 3).reshape(*found.shape[1:4], whole, -1)
    if whole == seq:
        return found
    rest = of_block(queries[:, whole:], sees[:, :, whole:], keys, values, scale)
    return jnp.concatenate([found, rest], axis=3)

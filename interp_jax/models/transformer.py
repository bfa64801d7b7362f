"""The project's own decoder-only transformer, every site of the design in place.

One class, driven by one frozen config (`transformer_config.py`), covers GPT-2, GPT-Neo, GPT-NeoX, Llama, Mistral, Qwen
and Gemma. Weights from their authors come through `hugging_face.py` and `gguf_model.py`, our own through
`saved_model.py`.

A `Transformer` is a `flax.nnx` module and thereby a pytree: pass it as the parameters of a pure function, and use
plain `jax.jit`, `jax.grad` and optax on it. `apply` is that pure function; `apply_at` gives the logits of one position
alone, and `apply_from` begins at a layer that is data, with a given stream.

What each site holds (b = batch, s = seq; `query` and `key` both run over seq; with a cache, `key` over its slots):

| site | layer | shape | value |
|---|---|---|---|
| embed | None | b s d_model | what enters the first block: rows of `W_embed`, scaled, positions added |
| resid_pre | 0.. | b s d_model | the residual stream as it enters the block |
| attn_in | 0.. | b s d_model | normed `resid_pre` |
| q | 0.. | b s n_heads d_head | query as it enters the scores: normed, after rotary, before the scale |
| k, v | 0.. | b s n_kv_heads d_head | key likewise, value; one for each group of heads |
| attn_logits | 0.. | b n_heads query key | q.k times the scale, soft-capped, before the mask |
| attn_probs | 0.. | b n_heads query key | after mask and softmax |
| attn_heads | 0.. | b s n_heads d_head | what each head reads, before the output projection |
| attn_out | 0.. | b s d_model | what attention adds to the stream (after a post-norm) |
| resid_mid | 0.. | b s d_model | `resid_pre + attn_out`; not in a parallel block |
| mlp_in | 0.. | b s d_model | normed `resid_mid` |
| mlp_pre | 0.. | b s d_mlp | what goes into the nonlinearity (of a gated MLP: the gate) |
| mlp_act | 0.. | b s d_mlp | the neurons: what `W_out` reads (of a gated MLP: gate times linear part) |
| mlp_out | 0.. | b s d_model | what the MLP adds to the stream (after a post-norm) |
| resid_post | 0.. | b s d_model | `resid_mid + mlp_out` |
| final_norm | None | b s d_model | normed last `resid_post` |
| logits | None | b s vocab_size | unnormalised log-probabilities of the next token, soft-capped |

Layers are *stacked* (every parameter of the blocks has a leading axis of layers, and `ij.layer_scan` goes over them:
the program is that of one layer) or *unrolled* (a Python loop over modules: XLA sees each layer by itself, which on a
CPU saves a copy of the weights a pass, and costs compile time). `stacked` and `unrolled` turn one into the other. Both
give the same values and the same sites.

Hazards:
- `attn_logits` stands before the mask, so that its entries are finite and an edit cannot let a position see its
  future. An edit of the entries above the diagonal therefore does nothing.
- Where no pass may look at `attn_logits` and `attn_probs`, attention over many positions goes by blocks of queries
  (`attention.py`): at tokens the values are the same but for rounding, the memory is not.
- A token id outside the vocabulary is an error outside jit. Under jit, where nothing can raise, it gives NaN logits for
  its row: clamping the id silently, as indexing in JAX does, would hide the fault.
- Norms, the softmax and rotary angles are computed in float32 whatever the dtype.
- Padding: what stands at a position that is no token is finite and means nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from interp_jax.instrument import in_layer, layer_scan, site
from interp_jax.models.attention import attended, soft_capped
from interp_jax.models.products import times, times_turned
from interp_jax.models.rows_of import rows_of
from interp_jax.models.token_ids import check_ids
from interp_jax.models.transformer_config import TransformerConfig as TransformerConfig

_INIT_STD = 0.02  # GPT-2's, for every matrix; those that write to the residual stream are divided by sqrt(2 n_layers)

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the tokens that a model has seen, for each layer; one more pass needs only the new tokens.

    As the model's blocks, they are stacked or a tuple of layers: each is written in place, and read as it lies.
    """

    k: (
        Float[Array, "n_layers batch n_kv_heads d_head slots"]
        | tuple[Float[Array, "batch n_kv_heads d_head slots"], ...]
    )
    """After rotary; turned, for so the product with a step's few queries is up to twice as fast on a CPU."""
    v: (
        Float[Array, "n_layers batch n_kv_heads slots d_head"]
        | tuple[Float[Array, "batch n_kv_heads slots d_head"], ...]
    )
    """Values."""
    positions: Int[Array, "batch slots"]
    """Each slot's position in its row; -1 where it is empty or holds padding."""
    n_filled: Int[Array, ""]
    """How many slots are filled, the same in every row."""


def empty_cache(model: "Transformer", batch: int, slots: int) -> KeyValueCache:
    """A cache with nothing in it.

    Args:
        model: Whose keys and values it will hold; its shapes are enough.
        batch: Rows.
        slots: How many tokens a row can hold, padding included.

    Returns:
        The cache, in the dtype of the model's computation.
    """
    c = model.config

    def zeros(*of_head: int) -> Any:
        of_layer = (batch, c.n_kv_heads, *of_head)
        if model.is_stacked:
            return jnp.zeros((c.n_layers, *of_layer), model.compute_dtype)
        return tuple(jnp.zeros(of_layer, model.compute_dtype) for _ in range(c.n_layers))

    k, v = zeros(c.d_head, slots), zeros(slots, c.d_head)
    return KeyValueCache(k, v, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rotary:
    """Cosine and sine of each position's angles, [rows, seq, 1, n_rotary / 2] in float32; rows is batch or 1."""

    cos: Array
    sin: Array

    @staticmethod
    def at(positions: Int[Array, "rows seq"], frequencies: np.ndarray, factor: float = 1.0) -> "_Rotary":
        angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        return _Rotary(factor * jnp.cos(angles), factor * jnp.sin(angles))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Reach:
    """What depends on whether a layer is local: the angles, and which key a query sees [rows, 1, query, key]."""

    rotary: _Rotary | None
    sees: Bool[Array, "rows 1 query key"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Surroundings:
    """What every layer shares."""

    everywhere: _Reach | None
    local: _Reach | None
    start: Any
    """The first free slot of the cache; None without one."""
    is_causal: bool = dataclasses.field(metadata={"static": True})
    """Whether no query sees a key behind its own index, wherever they stand."""

    def reach(self, is_local: bool | Bool[Array, ""]) -> _Reach:
        """That of one layer. Where it is only known as the scan runs, both are there and one is selected."""
        if self.everywhere is None or self.local is None:
            found = self.everywhere or self.local
            assert found is not None
            return found
        if isinstance(is_local, bool):
            return self.local if is_local else self.everywhere
        return jax.tree.map(lambda a, b: jnp.where(is_local, a, b), self.local, self.everywhere)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis.

    Parameters: `scale[width]`; for LayerNorm also `bias[width]`.
    """

    def __init__(
        self, config: TransformerConfig, dtype: DTypeLike = jnp.float32, *, width: int | None = None, rms: bool = False
    ) -> None:
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.is_layer_norm = config.norm == "layer" and not rms
        width = config.d_model if width is None else width
        self.scale = nnx.Param(jnp.full(width, 1 - config.norm_offset, dtype))
        if self.is_layer_norm:
            self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        wide = x.astype(jnp.float32)
        if self.is_layer_norm:
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32)
        wide = wide * (scale + self.offset if self.offset else scale)
        if self.is_layer_norm:
            wide = wide + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


def rotate(x: Float[Array, "batch seq heads d_head"], base: float) -> Float[Array, "batch seq heads d_head"]:
    """Turns coordinate i and i + d_head / 2 of each head by position times base ** (-2 i / d_head) radians.

    Rotary position embedding (Su et al. 2021, "RoFormer") in the half-split layout of GPT-NeoX and Llama. Position is
    the index along `seq`, from 0.

    Args:
        x: Queries or keys.
        base: The frequency base, `TransformerConfig.rotary_base`.

    Returns:
        The turned queries or keys, in `x`'s dtype.
    """
    frequencies = base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return _turn(x, _Rotary.at(jnp.arange(x.shape[1])[None], frequencies))


def _turn(x: Float[Array, "batch seq heads d_head"], rotary: _Rotary) -> Float[Array, "batch seq heads d_head"]:
    """Turns the first coordinates of each head, as many as there are angles for, half against half."""
    half = rotary.cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = rotary.cos, rotary.sin
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(each.astype(x.dtype) for each in turned), rest], axis=-1)


def _remembered(cache: Array, new: Array, number: Any, start: Any, axis: int) -> tuple[Array, Array]:
    """What one layer sees, and the cache, with new keys or values written from slot `start` of the axis on."""
    if cache.ndim == new.ndim:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis)
        return cache, cache
    place = [jnp.zeros_like(start)] * new.ndim
    place[axis] = start
    cache = jax.lax.dynamic_update_slice(cache, new[None], (number, *place))
    return jax.lax.dynamic_index_in_dim(cache, number, keepdims=False), cache


class Attention(nnx.Module):
    """Causal grouped-query self-attention.

    Parameters: `W_q[d_model, n_heads, d_head]`, `W_k[d_model, n_kv_heads, d_head]`,
    `W_v[d_model, n_kv_heads, d_head]`, `W_o[n_heads, d_head, d_model]`; where the config has them also
    `b_q[n_heads, d_head]`, `b_k[n_kv_heads, d_head]`, `b_v[n_kv_heads, d_head]`, `b_o[d_model]`,
    `q_norm.scale[d_head]`, `k_norm.scale[d_head]`.
    """

    W_qkv: nnx.Param  # of `step_layout` only

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        c, keys = config, jax.random.split(key, 4)
        self.W_q = nnx.Param(_normal(keys[0], (c.d_model, c.n_heads, c.d_head), dtype))
        self.W_k = nnx.Param(_normal(keys[1], (c.d_model, c.n_kv_heads, c.d_head), dtype))
        self.W_v = nnx.Param(_normal(keys[2], (c.d_model, c.n_kv_heads, c.d_head), dtype))
        self.W_o = nnx.Param(_normal(keys[3], (c.n_heads, c.d_head, c.d_model), dtype, c.n_layers))
        if c.qkv_bias:
            self.b_q = nnx.Param(jnp.zeros((c.n_heads, c.d_head), dtype))
            self.b_k = nnx.Param(jnp.zeros((c.n_kv_heads, c.d_head), dtype))
            self.b_v = nnx.Param(jnp.zeros((c.n_kv_heads, c.d_head), dtype))
        if c.attn_out_bias:
            self.b_o = nnx.Param(jnp.zeros(c.d_model, dtype))
        if c.qk_norm:
            self.q_norm = Norm(c, dtype, width=c.d_head, rms=True)
            self.k_norm = Norm(c, dtype, width=c.d_head, rms=True)

    def __call__(self, x: Array, shared: _Surroundings, reach: _Reach, number: Any, cache: Any) -> tuple[Array, Any]:
        """What attention gives for `x[batch, seq, d_model]`, and the cache's keys and values with those of `x`."""
        batch, seq, _ = x.shape
        c = self.config
        q, k, v = self._projected(x)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if reach.rotary is not None:
            q, k = _turn(q, reach.rotary), _turn(k, reach.rotary)
        q, k, v = site(q, "q"), site(k, "k"), site(v, "v")
        # Heads before positions from here on: the products below then read everything as it lies. Heads are (group,
        # member): a group shares one key-value head, which is thus never copied out.
        grouped = q.reshape(batch, seq, c.n_kv_heads, -1, c.d_head)
        v, scale = v.swapaxes(1, 2), c.scale / (number + 1) if c.attn_scale_falls else c.scale
        if cache is None:
            k = k.swapaxes(1, 2)
        else:
            k, of_k = _remembered(cache[0], jnp.moveaxis(k, 1, 3), number, shared.start, 3)
            v, of_v = _remembered(cache[1], v, number, shared.start, 2)
            cache = of_k, of_v
        heads = attended(
            grouped, k, v, reach.sees, jnp.asarray(scale, x.dtype), soft_cap=c.attn_soft_cap,
            is_turned=cache is not None, is_causal=shared.is_causal,
        )  # fmt: skip
        heads = site(heads.reshape(batch, c.n_heads, seq, c.d_head).swapaxes(1, 2), "attn_heads")
        out = times(heads, self.W_o, axes=2)
        return out + self.b_o[...].astype(x.dtype) if c.attn_out_bias else out, cache

    def _projected(self, x: Array) -> list[Array]:
        """Queries, keys and values."""
        c = self.config
        if hasattr(self, "W_qkv"):
            each = jnp.split(times(x, self.W_qkv), [c.n_heads, c.n_heads + c.n_kv_heads], axis=-2)
        else:
            each = [times(x, weight) for weight in (self.W_q, self.W_k, self.W_v)]
        if not c.qkv_bias:
            return each
        biases = (self.b_q, self.b_k, self.b_v)
        return [value + bias[...].astype(x.dtype) for value, bias in zip(each, biases, strict=True)]


class MLP(nnx.Module):
    """Gated or plain two-layer perceptron.

    Parameters: `W_in[d_model, d_mlp]`, `W_out[d_mlp, d_model]`; gated also `W_gate[d_model, d_mlp]`; with biases also
    `b_in[d_mlp]`, `b_out[d_model]`, `b_gate[d_mlp]`.
    """

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        c, keys = config, jax.random.split(key, 3)
        self.W_in = nnx.Param(_normal(keys[0], (c.d_model, c.d_mlp), dtype))
        self.W_out = nnx.Param(_normal(keys[1], (c.d_mlp, c.d_model), dtype, c.n_layers))
        if c.gated_mlp:
            self.W_gate = nnx.Param(_normal(keys[2], (c.d_model, c.d_mlp), dtype))
        if c.mlp_bias:
            self.b_in = nnx.Param(jnp.zeros(c.d_mlp, dtype))
            self.b_out = nnx.Param(jnp.zeros(c.d_model, dtype))
            if c.gated_mlp:
                self.b_gate = nnx.Param(jnp.zeros(c.d_mlp, dtype))

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        pre = site(self._mapped(x, "gate" if self.config.gated_mlp else "in"), "mlp_pre")
        act = _ACTIVATIONS[self.config.activation](pre)
        act = act * self._mapped(x, "in") if self.config.gated_mlp else act
        return self._mapped(site(act, "mlp_act"), "out")

    def _mapped(self, x: Array, which: str) -> Array:
        mapped = times(x, getattr(self, f"W_{which}"))
        return mapped + getattr(self, f"b_{which}")[...].astype(x.dtype) if self.config.mlp_bias else mapped


class Block(nnx.Module):
    """One layer: attention and MLP, each normed before and added to the residual stream after.

    Parts: `attn_norm`, `attn`, `mlp_norm`, `mlp`; with post-norms also `attn_post_norm`, `mlp_post_norm`.
    """

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        attn_key, mlp_key = jax.random.split(key)
        self.attn_norm = Norm(config, dtype)
        self.attn = Attention(config, attn_key, dtype)
        self.mlp_norm = Norm(config, dtype)
        self.mlp = MLP(config, mlp_key, dtype)
        if config.post_norms:
            self.attn_post_norm = Norm(config, dtype)
            self.mlp_post_norm = Norm(config, dtype)

    def __call__(self, x: Array, shared: _Surroundings, is_local: Any, number: Any, cache: Any) -> tuple[Array, Any]:
        """The stream `x[batch, seq, d_model]` after the layer, and the cache."""
        resid_pre = site(x, "resid_pre")
        attn_in = site(self.attn_norm(resid_pre), "attn_in")
        attn_out, cache = self.attn(attn_in, shared, shared.reach(is_local), number, cache)
        if self.config.post_norms:
            attn_out = self.attn_post_norm(attn_out)
        attn_out = site(attn_out, "attn_out")
        if self.config.parallel_residual:
            mlp_out = self._mlp_out(resid_pre)
            return site(resid_pre + attn_out + mlp_out, "resid_post"), cache
        resid_mid = site(resid_pre + attn_out, "resid_mid")
        return site(resid_mid + self._mlp_out(resid_mid), "resid_post"), cache

    def _mlp_out(self, stream: Array) -> Array:
        mlp_out = self.mlp(site(self.mlp_norm(stream), "mlp_in"))
        return site(self.mlp_post_norm(mlp_out) if self.config.post_norms else mlp_out, "mlp_out")


class Transformer(nnx.Module):
    """A decoder-only language model; see the module's docstring for its sites.

    Parameters, with the names that they have in a saved file (i counts layers from 0; in memory, where layers are
    stacked, `blocks.NAME[n_layers, ...]` holds all of them):

    - `W_embed[vocab_size, d_model]`; learned positions: `W_pos[context, d_model]`
    - `blocks.i.attn_norm.scale[d_model]`, `blocks.i.mlp_norm.scale[d_model]`; LayerNorm: `.bias[d_model]` beside each;
      post-norms: `blocks.i.attn_post_norm.scale[d_model]`, `blocks.i.mlp_post_norm.scale[d_model]`
    - `blocks.i.attn.W_q[d_model, n_heads, d_head]`
    - `blocks.i.attn.W_k[d_model, n_kv_heads, d_head]`, `blocks.i.attn.W_v[d_model, n_kv_heads, d_head]`
    - `blocks.i.attn.W_o[n_heads, d_head, d_model]`
    - with biases: `blocks.i.attn.b_q[n_heads, d_head]`, `.b_k[n_kv_heads, d_head]`, `.b_v[n_kv_heads, d_head]`,
      `.b_o[d_model]`
    - with qk-norm: `blocks.i.attn.q_norm.scale[d_head]`, `blocks.i.attn.k_norm.scale[d_head]`
    - `blocks.i.mlp.W_in[d_model, d_mlp]`, `blocks.i.mlp.W_out[d_mlp, d_model]`; gated: `blocks.i.mlp.W_gate` as `W_in`;
      with biases: `.b_in[d_mlp]`, `.b_out[d_model]`, gated: `.b_gate[d_mlp]`
    - `final_norm.scale[d_model]`; LayerNorm: `final_norm.bias[d_model]`
    - untied: `W_unembed[d_model, vocab_size]`; with a bias: `b_unembed[vocab_size]`

    Every matrix multiplies from the right: `y = x @ W`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        key: PRNGKeyArray,
        *,
        dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike | None = None,
        layers: Literal["stacked", "unrolled"] = "stacked",
        remat: bool = False,
    ) -> None:
        """Draws random parameters.

        Args:
            config: Shape and kind.
            key: A typed random key, `jax.random.key(seed)`.
            dtype: Of the parameters.
            compute_dtype: Of activations and logits; the parameters' when None.
            layers: 'stacked' scans over the layers, 'unrolled' is a Python loop; see the module's docstring.
            remat: Whether a layer's insides are computed again in the backward pass instead of being kept.
        """
        if layers not in ("stacked", "unrolled"):
            raise ValueError(f"layers={layers!r}; it must be 'stacked' or 'unrolled'.")
        self.config = config
        self.given_compute_dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
        self.is_stacked, self.remat = layers == "stacked", remat
        embed_key, unembed_key, *block_keys = jax.random.split(key, config.n_layers + 2)
        self.W_embed = nnx.Param(_normal(embed_key, (config.vocab_size, config.d_model), dtype))
        if config.positions == "learned":
            position_key = jax.random.fold_in(embed_key, 1)
            self.W_pos = nnx.Param(_normal(position_key, (config.context, config.d_model), dtype))
        blocks = [Block(config, block_key, dtype) for block_key in block_keys]
        self.blocks = _stack(blocks) if self.is_stacked else nnx.List(blocks)
        self.final_norm = Norm(config, dtype)
        if not config.tied_embeddings:
            self.W_unembed = nnx.Param(_normal(unembed_key, (config.d_model, config.vocab_size), dtype))
        if config.unembed_bias:
            self.b_unembed = nnx.Param(jnp.zeros(config.vocab_size, dtype))

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        is_token: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq vocab_size"]:
        """Logits of the next token at every position.

        Args:
            tokens: Token ids, at most `config.context` a row.
            is_token: False where there is padding, left or right, which no token sees.
            positions: Of each token in its row, from 0; counted over `is_token` when None.

        Returns:
            Logits, in the dtype of the computation.

        Raises:
            ValueError: The rows are longer than the context, or, outside jit, an id is no token.
        """
        return self._run(tokens, is_token, positions, None)[0]

    def extend(
        self,
        cache: KeyValueCache,
        tokens: Int[Array, "batch seq"],
        *,
        is_token: Bool[Array, "batch seq"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "batch seq_out vocab_size"], KeyValueCache]:
        """The same for tokens that follow those in a cache.

        Args:
            cache: From `empty_cache` or from the call before. It must have room: nothing can raise under jit.
            tokens: Token ids.
            is_token: False where there is padding.
            last_only: Give (and compute) the logits of the last position only.

        Returns:
            Logits, and the cache with these tokens in it.

        Raises:
            ValueError: As a call; or, outside jit, the cache has no room, or a row would be longer than the context.
        """
        slots, filled = cache.positions.shape[1], cache.n_filled
        if not isinstance(filled, jax.core.Tracer) and int(filled) + tokens.shape[-1] > slots:
            raise ValueError(
                f"The cache has {slots} slots, {int(filled)} of them filled: {tokens.shape[-1]} more do not fit. "
                "Make one with more: empty_cache(model, batch, slots)."
            )
        logits, extended = self._run(tokens, is_token, None, cache, at=-1 if last_only else None)
        assert extended is not None
        return logits, extended

    def _run(
        self,
        tokens: Any,
        is_token: Any,
        positions: Any,
        cache: KeyValueCache | None,
        *,
        at: Any = None,
        entry: tuple[Any, Any] | None = None,
    ) -> tuple[Array, KeyValueCache | None]:
        """Logits, and the cache with the tokens in it.

        Of one position where `at` says so; with an entry, `(stream, layer)`, from there on.
        """
        c = self.config
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(
                f"The tokens have shape {tokens.shape}; it must be [batch, seq], with at least one token; for one row "
                "give tokens[None]."
            )
        if is_token is not None and is_token.shape != tokens.shape:
            raise ValueError(f"is_token has shape {is_token.shape}, and tokens have {tokens.shape}.")
        seq = tokens.shape[1]
        if seq > c.context:
            raise ValueError(
                f"The model's context is {c.context} tokens and the rows have shape {tokens.shape}; cut them."
            )
        if is_token is not None:
            tokens = jnp.where(is_token, tokens, 0)  # -1 may stand where there is padding
        check_ids(tokens, c.vocab_size)
        may_exceed = positions is not None or cache is not None  # else each is its index, or that among the tokens
        if positions is None:
            counted = jnp.arange(seq)[None] if is_token is None else jnp.cumsum(is_token, axis=1) - 1
            positions = counted if cache is None else counted + cache.positions.max(axis=1, keepdims=True) + 1
        if may_exceed and not isinstance(positions, jax.core.Tracer):
            last = int(np.asarray(positions).max(initial=0))
            if last >= c.context:
                raise ValueError(f"A token stands at position {last}; the model's context is {c.context} tokens.")
        # Padding is nowhere: every query stands behind it and would see it, but for its sign.
        placed = positions if is_token is None else jnp.where(is_token, positions, -1)
        key_positions = placed
        if cache is not None:
            placed = jnp.broadcast_to(placed, tokens.shape)
            key_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, placed, cache.n_filled, 1)
        shared = _Surroundings(
            self._reach(placed, key_positions, local=False) if not all(c.is_local) else None,
            self._reach(placed, key_positions, local=True) if any(c.is_local) else None,
            None if cache is None else cache.n_filled,
            not may_exceed,
        )

        x = rows_of(self.W_embed[...], tokens).astype(self.compute_dtype)
        if isinstance(tokens, jax.core.Tracer):
            # Elsewhere `check_ids` has raised. The lookup gives NaN at that position alone, and what attention makes of
            # it in others hangs on whether it leaves keys out.
            is_wrong = ((tokens < 0) | (tokens >= c.vocab_size)).any(axis=1)
            x = jnp.where(is_wrong[:, None, None], jnp.nan, x)
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if c.positions == "learned":
            x = x + rows_of(self.W_pos[...], jnp.maximum(placed, 0)).astype(x.dtype)
        x, first = site(x, "embed", layer=None), None
        if entry is not None:
            stream, first = entry
            x = jnp.where(first > 0, stream.astype(x.dtype), x)
        x, kept = self._through_blocks(x, shared, cache, first)
        if at is not None:
            x = x[:, at][:, None]
        x = site(self.final_norm(x), "final_norm", layer=None)
        if c.tied_embeddings:
            logits = times_turned(x, self.W_embed[...].astype(x.dtype))
        else:
            logits = times(x, self.W_unembed)
        if c.unembed_bias:
            logits = logits + self.b_unembed[...].astype(x.dtype)
        logits = site(soft_capped(logits, c.logit_soft_cap), "logits", layer=None)
        if cache is None:
            return logits, None
        keys, values = kept
        return logits, KeyValueCache(keys, values, key_positions, cache.n_filled + seq)

    def _reach(self, positions: Array, key_positions: Array, *, local: bool) -> _Reach:
        c = self.config
        distance = positions[:, None, :, None] - key_positions[:, None, None, :]
        sees = (distance >= 0) & (key_positions >= 0)[:, None, None, :]
        if local:
            assert c.window is not None
            sees = sees & (distance < c.window)
        if c.positions != "rotary":
            return _Reach(None, sees)
        frequencies, factor = c.rotary_frequencies(local=local), c.rotary_attention_factor(local=local)
        return _Reach(_Rotary.at(positions, frequencies, factor), sees)

    def _through_blocks(
        self, x: Array, shared: _Surroundings, cache: KeyValueCache | None, first: Any = None
    ) -> tuple[Array, Any]:
        """The stream after all layers, or all from the first on; and with a cache all keys and values."""

        def run(x: Array, block: Block, is_local: Any, number: Any, kept: Any) -> tuple[Array, Any]:
            if first is None:
                return block(x, shared, is_local, number, kept)

            def in_block(x: Array) -> Array:
                return block(x, shared, is_local, number, None)[0]

            return jax.lax.cond(number >= first, in_block, lambda x: x, x), None

        static = () if self.is_stacked else (2, 3)
        layer = cast(Any, jax.checkpoint(run, static_argnums=static) if self.remat else run)
        n_layers = self.config.n_layers
        kept: Any = None if cache is None else (cache.k, cache.v)
        if self.is_stacked:
            # The caches of all layers are carried, and each layer writes its part in place: as one input and one output
            # of the scan they would be copied at every token.
            xs = (self.blocks, jnp.asarray(self.config.is_local), jnp.arange(n_layers))
            (x, kept), _ = layer_scan(lambda carry, each: (layer(carry[0], *each, carry[1]), None), (x, kept), xs)
            return x, kept
        each_kept = [None] * n_layers if cache is None else zip(*kept, strict=True)
        each = zip(cast(Any, self.blocks), self.config.is_local, range(n_layers), each_kept, strict=True)
        new: list[Any] = []
        for block, is_local, number, kept in each:
            with in_layer(number):
                x, kept = layer(x, block, is_local, number, kept)
            new.append(kept)
        return x, None if cache is None else tuple(zip(*new, strict=True))

    @property
    def compute_dtype(self) -> Any:
        """The dtype of activations and logits."""
        return self.W_embed[...].dtype if self.given_compute_dtype is None else self.given_compute_dtype

    @property
    def unembedding(self) -> Float[Array, "d_model vocab_size"]:
        """The matrix from the final norm's output to logits."""
        return self.W_embed[...].T if self.config.tied_embeddings else self.W_unembed[...]


def apply(model: Transformer, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab_size"]:
    """`model(tokens)` as a pure function of parameters and tokens, to give to `jax.jit`, `jax.grad` or `ij.iterate`."""
    return model(tokens)


def apply_at(
    model: Transformer, tokens: Int[Array, "batch seq"], position: Int[Array, ""] | int
) -> Float[Array, "batch 1 vocab_size"]:
    """`apply`, but the logits of one position only; `final_norm` and `logits` are of that position, too.

    Args:
        model: The parameters.
        tokens: Token ids.
        position: Where; negative from the end. It is data.
    """
    return model._run(tokens, None, None, None, at=position)[0]


def apply_from(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    stream: Float[Array, "batch seq d_model"],
    layer: Int[Array, ""] | int,
    position: Int[Array, ""] | int | None = None,
) -> Float[Array, "batch seq_out vocab_size"]:
    """`apply`, but the stream enters one layer with a given value, and the layers below it are not run.

    The layer is data: one compiled program serves them all. A running pass still sees the sites of every layer; what it
    does at those that are not run has no effect, and what it saves there is zero.

    Args:
        model: The parameters.
        tokens: Token ids.
        stream: `resid_pre` of that layer. At layer 0 it is not looked at: what enters there is `embed`.
        layer: From 0 to `n_layers - 1`.
        position: As in `apply_at`; all positions when None.

    Returns:
        Logits, in the dtype of the computation.
    """
    return model._run(tokens, None, None, None, at=position, entry=(stream, layer))[0]


def stacked(model: Transformer) -> Transformer:
    """The same model with its layers stacked; itself if they are."""
    return model if model.is_stacked else with_blocks(model, _stack(list(cast(Any, model.blocks))))


def unrolled(model: Transformer) -> Transformer:
    """The same model with a module for each layer; itself if it is so."""
    if not model.is_stacked:
        return model
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks) for i in range(model.config.n_layers)]
    return with_blocks(model, nnx.List(each))


def with_blocks(model: Transformer, blocks: Any) -> Transformer:
    """The same model with other blocks: a stack of them, or a `nnx.List`.

    Args:
        model: The model.
        blocks: Its blocks.
    """
    other = jax.tree.map(lambda leaf: leaf, model)  # another module over the same arrays
    other.blocks, other.is_stacked = blocks, not isinstance(blocks, nnx.List)
    return other


def _stack(blocks: list[Block]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def partition_specs(model: Transformer) -> Transformer:
    """How each parameter is laid over a mesh with an axis `model`.

    Heads, neurons and the vocabulary are split, so that each chip has whole heads and neurons, and the sums over them
    are the only communication; norms and biases of the stream are on every chip. Activations follow by the batch, over
    an axis `data`.

    Args:
        model: A model or its shapes.

    Returns:
        A `PartitionSpec` in the place of each array; for `jax.tree.map` with `NamedSharding(mesh, spec)`.
    """
    split = {
        "W_embed": ("model", None), "W_unembed": (None, "model"), "b_unembed": ("model",),
        "W_q": (None, "model", None), "W_k": (None, "model", None), "W_v": (None, "model", None),
        "W_o": ("model", None, None),
        "b_q": ("model", None), "b_k": ("model", None), "b_v": ("model", None),
        "W_in": (None, "model"), "W_gate": (None, "model"), "W_out": ("model", None),
        "b_in": ("model",), "b_gate": ("model",),
    }  # fmt: skip
    paths, tree = jax.tree_util.tree_flatten_with_path(model)
    specs = []
    for path, _ in paths:
        names = [_plain(entry) for entry in path if _plain(entry) != "value"]
        spec = split.get(names[-1], ())
        is_in_stack = names[0] == "blocks" and model.is_stacked
        specs.append(PartitionSpec(None, *spec) if is_in_stack and spec else PartitionSpec(*spec))
    return jax.tree.unflatten(tree, specs)


def promoted_logits(model: Transformer, directions: Float[Array, "n d_model"]) -> Float[Array, "n vocab_size"]:
    """Logits that a direction in the residual stream promotes when it is written just before the final norm.

    The final norm's scale is folded in; its division by the root mean square (and LayerNorm's centring) is left out,
    for that depends on the rest of the stream. So each row is right up to a positive factor (and that centring).

    Args:
        model: Whose unembedding is meant.
        directions: One direction a row.

    Returns:
        One row of logits a direction.
    """
    scale = model.final_norm.scale[...] + model.config.norm_offset
    return (directions * scale) @ model.unembedding


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike, n_layers: int | None = None) -> Array:
    std = _INIT_STD if n_layers is None else _INIT_STD / math.sqrt(2 * n_layers)
    return std * jax.random.normal(key, shape, jnp.dtype(dtype))


def named_parameters(model: Transformer) -> dict[str, Any]:
    """Every leaf under its parameter's dotted name, in the order of `jax.tree.leaves(model)`.

    `blocks.0.attn.W_q` where layers are unrolled, `blocks.attn.W_q` (of all layers) where they are stacked. Works as
    well on what has a model's structure: its gradient, or its shapes from `jax.eval_shape`.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    return {".".join(_plain(entry) for entry in path if _plain(entry) != "value"): leaf for path, leaf in paths}


def parameter_names(config: TransformerConfig) -> list[str]:
    """The names of a model's parameters where its layers are unrolled, as files have them."""
    return list(named_parameters(jax.eval_shape(lambda: Transformer(config, jax.random.key(0), layers="unrolled"))))


def _plain(entry: Any) -> str:
    """One step of a key path as a bare word: an attribute's or key's name, or an index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"Unknown key path entry {entry!r}.")

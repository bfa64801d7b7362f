"""The project's own decoder-only transformer, every site of the design in place.

One class, driven by one frozen config. What stands today is the Llama-like core: RMSNorm or LayerNorm before each
half of a block, rotary positions, grouped-query attention, a gated or a plain MLP, tied or untied unembedding. A new
family is a new field of `TransformerConfig` and a branch where the quantity is computed, not a new class.

A `Transformer` is a `flax.nnx` module and thereby a pytree: pass it as the parameters of a pure function, and use
plain `jax.jit`, `jax.grad` and optax on it. `apply` is that pure function.

What each site holds (b = batch, s = seq; `query` and `key` both run over seq):

| site | layer | shape | value |
|---|---|---|---|
| embed | None | b s d_model | row of `W_embed` of each token |
| resid_pre | 0.. | b s d_model | the residual stream as it enters the block |
| attn_in | 0.. | b s d_model | normed `resid_pre` |
| q | 0.. | b s n_heads d_head | query as it enters the scores: after rotary, before the scale |
| k, v | 0.. | b s n_kv_heads d_head | key after rotary, value; one for each group of heads |
| attn_logits | 0.. | b n_heads query key | q.k / sqrt(d_head), before the causal mask |
| attn_probs | 0.. | b n_heads query key | after mask and softmax |
| attn_heads | 0.. | b s n_heads d_head | what each head reads, before the output projection |
| attn_out | 0.. | b s d_model | what attention adds to the stream |
| resid_mid | 0.. | b s d_model | `resid_pre + attn_out` |
| mlp_in | 0.. | b s d_model | normed `resid_mid` |
| mlp_pre | 0.. | b s d_mlp | what goes into the nonlinearity (of a gated MLP: the gate) |
| mlp_act | 0.. | b s d_mlp | the neurons: what `W_out` reads (of a gated MLP: gate times linear part) |
| mlp_out | 0.. | b s d_model | what the MLP adds to the stream |
| resid_post | 0.. | b s d_model | `resid_mid + mlp_out` |
| final_norm | None | b s d_model | normed last `resid_post` |
| logits | None | b s vocab_size | unnormalised log-probabilities of the next token |

Hazards:
- `attn_logits` stands before the mask, so that its entries are finite and an edit cannot let a position see its
  future. An edit of the entries above the diagonal therefore does nothing.
- Layers are a Python loop: tracing and compiling grow with `n_layers`.
- A token id outside the vocabulary gives NaN logits for its row: under jit nothing can raise, and clamping the id
  silently, as indexing in JAX does, would hide the fault.
- Norms and the softmax are computed in float32 whatever the parameters' dtype.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from interp_jax.instrument import site
from interp_jax.whole_file import write_whole

_INIT_STD = 0.02  # GPT-2's, for every matrix; those that write to the residual stream are divided by sqrt(2 n_layers)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and kind of a `Transformer`.

    Raises:
        ValueError: A size below 1, heads that do not share out evenly over key-value heads, an odd `d_head`, or an
            unknown norm or activation.
    """

    vocab_size: int
    """Number of token ids."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Number of query heads."""
    n_kv_heads: int
    """Number of key and value heads; each serves n_heads / n_kv_heads query heads, in order."""
    d_head: int
    """Width of one head; even, for rotary turns pairs of coordinates."""
    d_mlp: int
    """Number of neurons in an MLP."""
    context: int
    """Longest sequence, in tokens."""
    norm: str = "rms"
    """'rms' is RMSNorm (a scale), 'layer' is LayerNorm (a scale and a bias)."""
    norm_epsilon: float = 1e-5
    """Added to the mean square or variance under the root."""
    activation: str = "silu"
    """Nonlinearity of the MLP: 'silu', or 'gelu_tanh', GPT-2's tanh form of GELU."""
    gated_mlp: bool = True
    """Whether the MLP is act(x W_gate) * (x W_in) or plain act(x W_in)."""
    rotary_base: float = 10000.0
    """Rotary frequency i of d_head / 2 is rotary_base ** (-2 i / d_head) radians a position."""
    tied_embeddings: bool = True
    """Whether the unembedding is the transpose of the embedding."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "context")
        for size in sizes:
            if getattr(self, size) < 1:
                raise ValueError(f"TransformerConfig.{size} is {getattr(self, size)}; it must be at least 1.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"TransformerConfig has n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads}; "
                "n_heads must be a multiple of n_kv_heads."
            )
        if self.d_head % 2:
            raise ValueError(f"TransformerConfig.d_head is {self.d_head}; rotary positions need an even one.")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"TransformerConfig.norm is {self.norm!r}; it must be one of 'rms', 'layer'.")
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"TransformerConfig.activation is {self.activation!r}; it must be one of {known}.")


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis.

    Parameters: `scale[d_model]`; for LayerNorm also `bias[d_model]`.
    """

    def __init__(self, config: TransformerConfig, dtype: DTypeLike = jnp.float32) -> None:
        self.epsilon = config.norm_epsilon
        self.is_layer_norm = config.norm == "layer"
        self.scale = nnx.Param(jnp.ones(config.d_model, dtype))
        if self.is_layer_norm:
            self.bias = nnx.Param(jnp.zeros(config.d_model, dtype))

    def __call__(self, x: Float[Array, "*rows d_model"]) -> Float[Array, "*rows d_model"]:
        wide = x.astype(jnp.float32)
        if self.is_layer_norm:
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        wide = wide * self.scale[...].astype(jnp.float32)
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
    half = x.shape[-1] // 2
    # In float64 on the host: these are constants of the trace, and float32 loses digits at far positions.
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angle)[:, None, :], jnp.float32) for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions.

    Parameters: `W_q[d_model, n_heads, d_head]`, `W_k[d_model, n_kv_heads, d_head]`,
    `W_v[d_model, n_kv_heads, d_head]`, `W_o[n_heads, d_head, d_model]`.
    """

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        c, keys = config, jax.random.split(key, 4)
        self.W_q = nnx.Param(_normal(keys[0], (c.d_model, c.n_heads, c.d_head), dtype))
        self.W_k = nnx.Param(_normal(keys[1], (c.d_model, c.n_kv_heads, c.d_head), dtype))
        self.W_v = nnx.Param(_normal(keys[2], (c.d_model, c.n_kv_heads, c.d_head), dtype))
        self.W_o = nnx.Param(_normal(keys[3], (c.n_heads, c.d_head, c.d_model), dtype, c.n_layers))

    def __call__(self, x: Float[Array, "batch seq d_model"], layer: int) -> Float[Array, "batch seq d_model"]:
        batch, seq, _ = x.shape
        c = self.config
        q = rotate(jnp.einsum("bsd,dhk->bshk", x, self.W_q[...]), c.rotary_base)
        k = rotate(jnp.einsum("bsd,dhk->bshk", x, self.W_k[...]), c.rotary_base)
        q, k = site(q, "q", layer=layer), site(k, "k", layer=layer)
        v = site(jnp.einsum("bsd,dhk->bshk", x, self.W_v[...]), "v", layer=layer)

        # Heads as (group, member): a group shares one key-value head, which is thus never copied out.
        grouped = q.reshape(batch, seq, c.n_kv_heads, -1, c.d_head)
        logits = jnp.einsum("bqgmk,bsgk->bgmqs", grouped, k) / math.sqrt(c.d_head)
        logits = site(logits.reshape(batch, c.n_heads, seq, seq), "attn_logits", layer=layer)
        is_past = np.tril(np.ones((seq, seq), bool))
        masked = jnp.where(is_past, logits.astype(jnp.float32), -jnp.inf)
        probs = site(jax.nn.softmax(masked, axis=-1).astype(x.dtype), "attn_probs", layer=layer)

        heads = jnp.einsum("bgmqs,bsgk->bqgmk", probs.reshape(batch, c.n_kv_heads, -1, seq, seq), v)
        heads = site(heads.reshape(batch, seq, c.n_heads, c.d_head), "attn_heads", layer=layer)
        return jnp.einsum("bshk,hkd->bsd", heads, self.W_o[...])


class MLP(nnx.Module):
    """Gated or plain two-layer perceptron, without biases.

    Parameters: `W_in[d_model, d_mlp]`, `W_out[d_mlp, d_model]`; gated also `W_gate[d_model, d_mlp]`.
    """

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        c, keys = config, jax.random.split(key, 3)
        self.W_in = nnx.Param(_normal(keys[0], (c.d_model, c.d_mlp), dtype))
        self.W_out = nnx.Param(_normal(keys[1], (c.d_mlp, c.d_model), dtype, c.n_layers))
        if c.gated_mlp:
            self.W_gate = nnx.Param(_normal(keys[2], (c.d_model, c.d_mlp), dtype))

    def __call__(self, x: Float[Array, "batch seq d_model"], layer: int) -> Float[Array, "batch seq d_model"]:
        pre = x @ (self.W_gate if self.config.gated_mlp else self.W_in)[...]
        act = _ACTIVATIONS[self.config.activation](site(pre, "mlp_pre", layer=layer))
        if self.config.gated_mlp:
            act = act * (x @ self.W_in[...])
        return site(act, "mlp_act", layer=layer) @ self.W_out[...]


class Block(nnx.Module):
    """One layer: attention, then MLP, each normed before and added to the residual stream after.

    Parts: `attn_norm`, `attn`, `mlp_norm`, `mlp`.
    """

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> None:
        attn_key, mlp_key = jax.random.split(key)
        self.attn_norm = Norm(config, dtype)
        self.attn = Attention(config, attn_key, dtype)
        self.mlp_norm = Norm(config, dtype)
        self.mlp = MLP(config, mlp_key, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"], layer: int) -> Float[Array, "batch seq d_model"]:
        resid_pre = site(x, "resid_pre", layer=layer)
        attn_in = site(self.attn_norm(resid_pre), "attn_in", layer=layer)
        attn_out = site(self.attn(attn_in, layer), "attn_out", layer=layer)
        resid_mid = site(resid_pre + attn_out, "resid_mid", layer=layer)
        mlp_in = site(self.mlp_norm(resid_mid), "mlp_in", layer=layer)
        mlp_out = site(self.mlp(mlp_in, layer), "mlp_out", layer=layer)
        return site(resid_mid + mlp_out, "resid_post", layer=layer)


class Transformer(nnx.Module):
    """A decoder-only language model; see the module's docstring for its sites.

    Parameters, with the names that they have in a saved file (i counts layers from 0):

    - `W_embed[vocab_size, d_model]`
    - `blocks.i.attn_norm.scale[d_model]`, `blocks.i.mlp_norm.scale[d_model]`; LayerNorm: `.bias[d_model]` beside each
    - `blocks.i.attn.W_q[d_model, n_heads, d_head]`
    - `blocks.i.attn.W_k[d_model, n_kv_heads, d_head]`, `blocks.i.attn.W_v[d_model, n_kv_heads, d_head]`
    - `blocks.i.attn.W_o[n_heads, d_head, d_model]`
    - `blocks.i.mlp.W_in[d_model, d_mlp]`, `blocks.i.mlp.W_out[d_mlp, d_model]`; gated: `blocks.i.mlp.W_gate` as `W_in`
    - `final_norm.scale[d_model]`; LayerNorm: `final_norm.bias[d_model]`
    - untied: `W_unembed[d_model, vocab_size]`

    Every matrix multiplies from the right: `y = x @ W`.
    """

    def __init__(self, config: TransformerConfig, key: PRNGKeyArray, *, dtype: DTypeLike = jnp.float32) -> None:
        """Draws random parameters.

        Args:
            config: Shape and kind.
            key: A typed random key, `jax.random.key(seed)`.
            dtype: Of the parameters, and thereby of the computation.
        """
        self.config = config
        embed_key, unembed_key, *block_keys = jax.random.split(key, config.n_layers + 2)
        self.W_embed = nnx.Param(_normal(embed_key, (config.vocab_size, config.d_model), dtype))
        self.blocks = nnx.List([Block(config, block_key, dtype) for block_key in block_keys])
        self.final_norm = Norm(config, dtype)
        if not config.tied_embeddings:
            self.W_unembed = nnx.Param(_normal(unembed_key, (config.d_model, config.vocab_size), dtype))

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab_size"]:
        """Logits of the next token at every position.

        Args:
            tokens: Token ids, at most `config.context` a row.

        Returns:
            Logits, in the parameters' dtype.

        Raises:
            ValueError: The rows are longer than the context.
        """
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"The model's context is {self.config.context} tokens and the rows have shape {tokens.shape}; cut them."
            )
        x = site(self.W_embed[...].at[tokens].get(mode="fill", fill_value=jnp.nan), "embed", layer=None)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer)
        x = site(self.final_norm(x), "final_norm", layer=None)
        return site(x @ self.unembedding, "logits", layer=None)

    @property
    def unembedding(self) -> Float[Array, "d_model vocab_size"]:
        """The matrix from the final norm's output to logits."""
        return self.W_embed[...].T if self.config.tied_embeddings else self.W_unembed[...]


def apply(model: Transformer, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab_size"]:
    """`model(tokens)` as a pure function of parameters and tokens, to give to `jax.jit`, `jax.grad` or `ij.iterate`."""
    return model(tokens)


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
    return (directions * model.final_norm.scale[...]) @ model.unembedding


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike, n_layers: int | None = None) -> Array:
    std = _INIT_STD if n_layers is None else _INIT_STD / math.sqrt(2 * n_layers)
    return std * jax.random.normal(key, shape, jnp.dtype(dtype))


# Files: a directory with config.json and model.safetensors.


def save(model: Transformer, directory: str | Path, *, dtype: DTypeLike | None = None) -> None:
    """Writes `config.json` and `model.safetensors` into a directory, each whole or not at all.

    Args:
        model: What to write.
        directory: Where; made if it is not there.
        dtype: Dtype of the stored tensors; the parameters' own when None.

    Raises:
        ValueError: `dtype` is too narrow for a parameter, which would be stored as infinite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in named_parameters(model).items():
        host = np.asarray(value)
        with np.errstate(over="ignore"):  # told below, with the parameter's name
            stored = host.astype(host.dtype if dtype is None else jnp.dtype(dtype))
        if not np.array_equal(np.isfinite(stored.astype(np.float32)), np.isfinite(host.astype(np.float32))):
            raise ValueError(f"{name} does not fit into {stored.dtype}; store it in a wider dtype.")
        tensors[name] = stored
    config = _config_json(model.config)
    # The config rides in the weights' header too, so that a config.json of another model beside it is noticed even
    # where every shape happens to agree (an interrupted save over an older model).
    write_whole(directory / "model.safetensors", safetensors.numpy.save(tensors, metadata={"config": config}))
    write_whole(directory / "config.json", config.encode())


def load(directory: str | Path, *, dtype: DTypeLike = jnp.float32) -> Transformer:
    """Reads a model that `save` wrote.

    Args:
        directory: Holds `config.json` and `model.safetensors`.
        dtype: Dtype of the parameters in memory.

    Returns:
        The model, on the default device.

    Raises:
        FileNotFoundError: A file of the two is not there.
        ValueError: A file is cut short or damaged, the two are not of one save, a field of the config is unknown or
            missing, or a tensor is missing, unknown or of a wrong shape; the message lists which.
    """
    directory = Path(directory)
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there; a saved model is a directory with config.json and model.safetensors."
            )
    config = _read_config(config_path)
    try:
        with safetensors.safe_open(weights_path, framework="numpy") as file:
            stored = {name: cast(np.ndarray, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_path} is cut short or damaged ({error}); write or fetch it again.") from error
    if metadata.get("config") != _config_json(config):
        raise ValueError(
            f"{config_path} is not the config that {weights_path.name} was saved with, "
            f"{metadata.get('config', 'which holds none')}; save the model again."
        )

    # eval_shape: the structure alone, no random numbers drawn.
    skeleton = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    wanted = named_parameters(skeleton)
    faults = [f"missing {name}{list(wanted[name].shape)}" for name in wanted if name not in stored]
    faults += [f"unknown {name}{list(stored[name].shape)}" for name in stored if name not in wanted]
    faults += [
        f"{name} is {list(stored[name].shape)} and must be {list(wanted[name].shape)}"
        for name in wanted
        if name in stored and stored[name].shape != wanted[name].shape
    ]
    if faults:
        raise ValueError(f"{weights_path} does not fit its config: {'; '.join(faults)}.")
    leaves = [jnp.asarray(stored[name], dtype) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def named_parameters(model: Transformer) -> dict[str, Any]:
    """Every leaf under its parameter's dotted name, `blocks.0.attn.W_q`, in the order of `jax.tree.leaves(model)`.

    Works as well on what has a model's structure: its gradient, or its shapes from `jax.eval_shape`.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    return {".".join(_plain(entry) for entry in path if _plain(entry) != "value"): leaf for path, leaf in paths}


def _plain(entry: Any) -> str:
    """One step of a key path as a bare word: an attribute's or key's name, or an index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"Unknown key path entry {entry!r}.")


def _config_json(config: TransformerConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _read_config(path: Path) -> TransformerConfig:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); write or fetch it again.") from error
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if not isinstance(fields, dict) or set(fields) != known:
        given = set(fields) if isinstance(fields, dict) else set()
        raise ValueError(
            f"{path} is not a TransformerConfig: missing {sorted(known - given)}, unknown {sorted(given - known)}."
        )
    return TransformerConfig(**fields)

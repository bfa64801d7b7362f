"""A GPT-NeoX-like model (Pythia's), as shapes: it is compiled and never run.

Parallel residual: attention and MLP both read the stream as it enters the layer. Biases, rotary positions and the
embeddings are left out; they add little to what is compiled.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import interp_jax as ij

Layer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a model."""

    layers: int
    d_model: int
    heads: int
    d_mlp: int

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one layer's weights."""
        d, d_head = self.d_model, self.d_model // self.heads
        return {
            "attn_norm": (d,),
            "qkv": (3, d, self.heads, d_head),
            "attn_out": (self.heads, d_head, d),
            "mlp_norm": (d,),
            "mlp_in": (d, self.d_mlp),
            "mlp_out": (self.d_mlp, d),
        }


PYTHIA_1_4B = Shape(layers=24, d_model=2048, heads=16, d_mlp=8192)


def block(weights: Layer, x: jax.Array, mark: Callable[[Any, str], Any] = ij.site) -> jax.Array:
    """One layer, its sites marked; `x` is `[batch, position, d_model]`."""
    x = mark(x, "resid_pre")
    q, k, v = jnp.einsum("bpd,sdhe->sbphe", _normed(x, weights["attn_norm"]), weights["qkv"])
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    positions = jnp.arange(x.shape[1])
    scores = jnp.where(positions[:, None] >= positions, scores, -jnp.inf)
    heads = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores).astype(x.dtype), v)
    attn_out = mark(jnp.einsum("bqhe,hed->bqd", heads, weights["attn_out"]), "attn_out")
    mlp_act = mark(jax.nn.gelu(_normed(x, weights["mlp_norm"]) @ weights["mlp_in"]), "mlp_act")
    mlp_out = mark(mlp_act @ weights["mlp_out"], "mlp_out")
    return mark(x + attn_out + mlp_out, "resid_post")


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def scanned(
    weights: Layer,
    x: jax.Array,
    scan: Callable[..., Any] = jax.lax.scan,
    block: Callable[[Layer, jax.Array], jax.Array] = block,
) -> jax.Array:
    """The model over stacked layers."""
    return scan(lambda x, layer: (block(layer, x), None), x, weights)[0]

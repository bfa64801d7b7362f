"""What one attention head does, as two matrices of low rank (Elhage et al. 2021, "A Mathematical Framework").

The OV circuit is what a head writes of what it reads: `attn_in[key] @ ov`, weighted by the attention pattern. The QK
circuit is where it looks: `attn_in[query] @ qk @ attn_in[key]` is the attention logit, the scale included. Both are of
rank `d_head` and stay in two factors; `dense()` makes the matrix.

Vectors are rows, as everywhere here. Heads that share keys and values (GQA) take those of their group.

What is left out, since no matrix holds it:

- Biases. `fold_value_biases` moves those of the values where they belong; those of queries and keys add to the logit.
- Norms. The circuits read `attn_in`; after `fold_norms` that is the stream, divided by its own size. Scales of the
  norms of queries and keys (qk-norm) and of the norm behind attention (Gemma) are in the circuit, the division is not.
- A cap on the logits, which comes after.

Rotary positions turn queries and keys, so there is one QK circuit for each distance between them.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.transformer import Transformer, named_parameters

__all__ = ["LowRank", "composition_score", "output_value_circuit", "query_key_circuit"]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix `left @ right` that is kept as its factors. Products with matrices stay so."""

    left: Float[Array, "rows rank"]
    """What is read."""
    right: Float[Array, "rank columns"]
    """What is given."""

    __array_ufunc__ = None  # NumPy leaves `array @ low_rank` to this class.

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def T(self) -> "LowRank":
        """Transposed."""
        return LowRank(self.right.T, self.left.T)

    def dense(self) -> Float[Array, "rows columns"]:
        """The matrix itself."""
        return self.left @ self.right

    def __matmul__(self, other: Any) -> "LowRank":
        if isinstance(other, LowRank):
            return LowRank(self.left, (self.right @ other.left) @ other.right)
        return LowRank(self.left, self.right @ jnp.asarray(other))

    def __rmatmul__(self, other: Any) -> "LowRank":
        return LowRank(jnp.asarray(other) @ self.left, self.right)

    def norm(self) -> float:
        """The Frobenius norm."""
        square = jnp.sum((self.left.T @ self.left) * (self.right @ self.right.T))
        return float(jnp.sqrt(jnp.maximum(square, 0.0)))

    def singular_values(self) -> Float[np.ndarray, "rank"]:
        """Those that can differ from zero, the largest first."""
        _, of_left = np.linalg.qr(np.asarray(self.left, np.float64))
        _, of_right = np.linalg.qr(np.asarray(self.right.T, np.float64))
        return np.linalg.svd(of_left @ of_right.T, compute_uv=False)

    def eigenvalues(self) -> np.ndarray:
        """Those of a square matrix that can differ from zero, complex; for OV from tokens to tokens, their sum over the
        sum of their sizes is 1 for a head that copies and -1 for one that suppresses.

        Raises:
            ValueError: The matrix is not square.
        """
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"A matrix of shape {self.shape} is not square, so it has no eigenvalues.")
        return np.linalg.eigvals(np.asarray(self.right @ self.left, np.float64))


def output_value_circuit(language_model: LanguageModel, layer: int, head: int) -> LowRank:
    """What a head writes of what it reads.

    Args:
        language_model: A model that runs on this project's `Transformer`.
        layer: The layer.
        head: The head.

    Returns:
        `[d_model, d_model]`, of rank `d_head`: from `attn_in` to the head's part of `attn_out`.

    Raises:
        ValueError: The model is not a `Transformer`, or has no such layer or head.
    """
    model, weights = _weights(language_model, layer, head)
    c = model.config
    right = _wide(weights["attn.W_o"][head])
    if c.post_norms:
        right = right * (_wide(weights["attn_post_norm.scale"]) + c.norm_offset)
    return LowRank(_wide(weights["attn.W_v"][:, head * c.n_kv_heads // c.n_heads]), right)


def query_key_circuit(language_model: LanguageModel, layer: int, head: int, *, distance: int = 0) -> LowRank:
    """Where a head looks.

    Args:
        language_model: A model that runs on this project's `Transformer`.
        layer: The layer.
        head: The head.
        distance: How many positions the key stands before the query. It matters where positions are rotary.

    Returns:
        `[d_model, d_model]`, of rank `d_head`: `attn_in[query] @ qk @ attn_in[key]` is the attention logit.

    Raises:
        ValueError: The model is not a `Transformer`, or has no such layer or head; the distance is negative.
    """
    if distance < 0:
        raise ValueError(f"distance={distance}: a query sees keys at its own position and before, at 0 or more.")
    model, weights = _weights(language_model, layer, head)
    c = model.config
    query = _wide(weights["attn.W_q"][:, head])
    key = _wide(weights["attn.W_k"][:, head * c.n_kv_heads // c.n_heads])
    if c.qk_norm:
        query = query * (_wide(weights["attn.q_norm.scale"]) + c.norm_offset)
        key = key * (_wide(weights["attn.k_norm.scale"]) + c.norm_offset)
    scale = c.scale / (layer + 1) if c.attn_scale_falls else c.scale
    if c.positions == "rotary":
        is_local = c.is_local[layer]
        angles = distance * jnp.asarray(c.rotary_frequencies(local=is_local), jnp.float32)
        query = _turned(query, angles)
        turned, factor = c.n_rotary, c.rotary_attention_factor(local=is_local) ** 2
        query = jnp.concatenate([query[:, :turned] * factor, query[:, turned:]], axis=1)
    return LowRank(query * scale, key.T)


def composition_score(first: LowRank, second: LowRank) -> float:
    """How much one circuit reads of what another writes, by the sizes of their matrices alone.

    For V-composition `second` is the later head's OV circuit, for Q-composition its QK circuit, for K-composition that
    transposed. Random matrices of rank r have scores near `1 / sqrt(d_model)`; only the excess means something.

    Args:
        first: An OV circuit.
        second: A circuit of a later layer.

    Returns:
        `|first @ second| / (|first| |second|)` in Frobenius norms.
    """
    return (first @ second).norm() / (first.norm() * second.norm())


def _weights(language_model: LanguageModel, layer: int, head: int) -> tuple[Transformer, dict[str, Any]]:
    """The model, and one block's parameters by their names within it."""
    model = language_model.params
    if not isinstance(model, Transformer):
        raise ValueError(
            f"Circuits are read off the weights of this project's Transformer; {language_model.name} runs on another "
            f"library's code (its parameters are a {type(model).__name__}). ij.load gives a Transformer."
        )
    for what, number, size in (("layer", layer, model.config.n_layers), ("head", head, model.config.n_heads)):
        if not 0 <= number < size:
            raise ValueError(f"{language_model.name} has no {what} {number}; they are 0 to {size - 1}.")
    start = "blocks." if model.is_stacked else f"blocks.{layer}."
    found = {name.removeprefix(start): leaf for name, leaf in named_parameters(model).items() if name.startswith(start)}
    return model, {name: leaf[layer] for name, leaf in found.items()} if model.is_stacked else found


def _wide(value: Any) -> Float[Array, "..."]:
    return jnp.asarray(value).astype(jnp.float32)


def _turned(weight: Float[Array, "d_model d_head"], angles: Float[Array, "half"]) -> Float[Array, "d_model d_head"]:
    """Each row turned, half against half, as rotary positions do."""
    half = len(angles)
    first, second, rest = weight[:, :half], weight[:, half : 2 * half], weight[:, 2 * half :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=1)

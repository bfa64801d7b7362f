"""Small random models of several families, for the linear pictures; every part matters, norms and biases included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import interp_jax as ij
from interp_jax.models import transformer
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.transformer import Transformer
from interp_jax.models.transformer_config import TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_mlp=10, context=9, rotary_base=100.0
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(
        LLAMA, norm="layer", activation="gelu_tanh", gated_mlp=False, n_kv_heads=4, positions="learned",
        qkv_bias=True, attn_out_bias=True, mlp_bias=True,
    ),
    "neox": dataclasses.replace(
        LLAMA, norm="layer", activation="gelu", gated_mlp=False, n_kv_heads=4, rotary_dim=2, parallel_residual=True,
        qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied_embeddings=False, unembed_bias=True,
    ),
    "gemma": dataclasses.replace(
        LLAMA, norm_offset=1.0, post_norms=True, qk_norm=True, attn_soft_cap=5.0, logit_soft_cap=8.0, embed_scale=3.0,
        activation="gelu_tanh", window=4, local_layers=(True, False),
    ),
}  # fmt: skip


def small_model(family: str = "llama", *, layers: str = "unrolled", seed: int = 0, n_layers: int = 2) -> LanguageModel:
    """A random model of a family. Its tokenizer is that of the tiny model, whose ids it has no room for."""
    config = CONFIGS[family]
    local = None if config.local_layers is None else tuple(number % 2 == 0 for number in range(n_layers))
    config = dataclasses.replace(config, n_layers=n_layers, local_layers=local)
    shapes = jax.eval_shape(lambda: Transformer(config, jax.random.key(0), layers="unrolled"))
    rng = np.random.default_rng(seed)
    draws = [rng.normal(float(leaf.ndim == 1), 0.4, leaf.shape) for leaf in jax.tree.leaves(shapes)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(draw, jnp.float32) for draw in draws])
    if layers == "stacked":
        params = transformer.stacked(params)
    return dataclasses.replace(
        ij.load("tiny"),
        name=family,
        params=params,
        n_layers=config.n_layers,
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        context=config.context,
    )


def foreign(model: LanguageModel) -> LanguageModel:
    """The same model behind a forward pass that nothing is known of."""
    return dataclasses.replace(model, forward=_foreign_forward)


def _foreign_forward(params, tokens):
    return transformer.apply(params, tokens)


def small_tokens(batch: int = 2, seq: int = 7, seed: int = 0):
    """Random tokens of those models."""
    return jnp.asarray(np.random.default_rng(seed).integers(LLAMA.vocab_size, size=(batch, seq)), jnp.int32)


@jax.jit
def _all_sites(params, tokens):
    return ij.fetch(transformer.apply)(params, tokens)[1]


def all_sites(model: LanguageModel, tokens):
    """Every site's value, as NumPy arrays."""
    return jax.tree.map(np.asarray, _all_sites(model.params, tokens))

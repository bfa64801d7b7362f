"""The same model in simpler weights, where a researcher asks for it: nothing here is ever done unasked.

Each function gives a new model that computes the same logits (`center_unembedding`: the same probabilities) from other
parameters, in the same dtype, with its layers stacked or not as before. What it is for, and when it cannot be done:

| function | afterwards | for reading |
|---|---|---|
| `untie` | the unembedding is a matrix of its own | whatever changes embedding or unembedding alone |
| `fold_norms` | norms have scale 1 and bias 0 | what a matrix reads off the stream: no scale is in between |
| `fold_value_biases` | values have no bias | a head's output: it is a mean of `W_v` outputs alone |
| `center_writing` | nothing writes along the all-ones direction | LayerNorm's models, whose norms ignore it |
| `center_unembedding` | the mean over the vocabulary is 0 | direct logit attribution: differences are all that counts |

Products are taken in float32 and rounded once. Activations are not the same: `fold_norms` changes `attn_in`, `mlp_in`
and `final_norm`, `center_writing` the stream, `fold_value_biases` `v` and `attn_heads`.

Not folded: norms over a head's coordinates (qk-norm) and norms after attention and MLP (Gemma 2 and 3), which have no
matrix behind them that could take their scale.

The ideas are those of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and of TransformerLens,
which does most of this whenever it loads a model.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from interp_jax.models.transformer import Transformer, named_parameters

__all__ = ["center_unembedding", "center_writing", "fold_norms", "fold_value_biases", "untie"]


def untie(model: Transformer) -> Transformer:
    """A model whose unembedding is a matrix of its own, equal to the transposed embedding; itself if it has one.

    Args:
        model: Any.

    Returns:
        The model.
    """
    if not model.config.tied_embeddings:
        return model
    parameters = named_parameters(model)
    return _with(model, parameters | {"W_unembed": parameters["W_embed"].T}, tied_embeddings=False)


def fold_norms(model: Transformer) -> Transformer:
    """Moves the scales and biases of the norms before attention, MLP and unembedding into the matrices that read them.

    Args:
        model: Any. A tied unembedding is untied.

    Returns:
        The model; where norms had biases, q, k, v, the MLP and the logits have some.
    """
    model = untie(model)
    c, old = model.config, named_parameters(model)
    new: dict[str, Any] = dict(old)

    def fold(norm: str, *readers: tuple[str, str]) -> None:
        """Into each matrix `[..., d_model, outputs...]` with its bias, both by name."""
        scale = _wide(old[f"{norm}.scale"]) + c.norm_offset
        for matrix, bias in readers:
            weight = _wide(old[matrix])
            outputs = weight.ndim - scale.ndim
            new[matrix] = weight * scale.reshape(*scale.shape, *[1] * outputs)
            if c.norm == "layer":
                read = jnp.einsum("...d,...dn->...n", _wide(old[f"{norm}.bias"]), weight.reshape(*scale.shape, -1))
                new[bias] = read.reshape(*scale.shape[:-1], *weight.shape[scale.ndim :]) + _wide(old.get(bias, 0.0))
        new[f"{norm}.scale"] = jnp.full_like(scale, 1 - c.norm_offset)
        if c.norm == "layer":
            new[f"{norm}.bias"] = jnp.zeros_like(scale)

    for block in _blocks(model):
        fold(f"{block}.attn_norm", *((f"{block}.attn.W_{each}", f"{block}.attn.b_{each}") for each in "qkv"))
        readers = ("in", "gate") if c.gated_mlp else ("in",)
        fold(f"{block}.mlp_norm", *((f"{block}.mlp.W_{each}", f"{block}.mlp.b_{each}") for each in readers))
        if c.norm == "layer" and not c.mlp_bias:
            new[f"{block}.mlp.b_out"] = jnp.zeros_like(old[f"{block}.attn_norm.scale"])
    fold("final_norm", ("W_unembed", "b_unembed"))
    if c.norm != "layer":
        return _with(model, new)
    return _with(model, new, qkv_bias=True, mlp_bias=True, unembed_bias=True)


def fold_value_biases(model: Transformer) -> Transformer:
    """Moves the biases of the values into that of attention's output: a pattern sums to 1, so they pass whole.

    Args:
        model: Any.

    Returns:
        The model, whose attention has an output bias if it has value biases; itself if it has none.
    """
    c, old = model.config, named_parameters(model)
    if not c.qkv_bias:
        return model
    new = dict(old)
    for block in _blocks(model):
        bias, out = _wide(old[f"{block}.attn.b_v"]), _wide(old[f"{block}.attn.W_o"])
        of_heads = jnp.repeat(bias, c.n_heads // c.n_kv_heads, axis=-2)
        carried = jnp.einsum("...hk,...hkd->...d", of_heads, out)
        new[f"{block}.attn.b_o"] = carried + _wide(old.get(f"{block}.attn.b_o", 0.0))
        new[f"{block}.attn.b_v"] = jnp.zeros_like(bias)
    return _with(model, new, attn_out_bias=True)


def center_writing(model: Transformer) -> Transformer:
    """Takes from everything that writes to the stream its mean over the stream's coordinates, which LayerNorm ignores.

    Args:
        model: One with LayerNorm, as GPT-2 and Pythia. A tied unembedding is untied.

    Returns:
        The model.

    Raises:
        ValueError: The norms are RMSNorms, which do not ignore the mean, or stand after attention and MLP.
    """
    if model.config.norm != "layer" or model.config.post_norms:
        raise ValueError(
            "center_writing needs a model whose stream is read by LayerNorms only; "
            f"this one has norm={model.config.norm!r}, post_norms={model.config.post_norms}."
        )
    model = untie(model)
    old = named_parameters(model)
    writers = ["W_embed", "W_pos"]
    for block in _blocks(model):
        writers += [f"{block}.attn.W_o", f"{block}.attn.b_o", f"{block}.mlp.W_out", f"{block}.mlp.b_out"]
    centered = {name: _less_mean(old[name]) for name in writers if name in old}
    return _with(model, old | centered)


def center_unembedding(model: Transformer) -> Transformer:
    """Takes from the unembedding its mean over the vocabulary: all logits of a position fall by the same amount.

    Args:
        model: One without a cap on its logits. A tied unembedding is untied.

    Returns:
        The model, whose probabilities are the same and whose logits have the mean 0.

    Raises:
        ValueError: The logits are soft-capped: the same amount before the cap is not the same after it.
    """
    if model.config.logit_soft_cap is not None:
        raise ValueError(
            f"center_unembedding changes probabilities here: logit_soft_cap={model.config.logit_soft_cap}."
        )
    model = untie(model)
    old = named_parameters(model)
    return _with(model, old | {name: _less_mean(old[name]) for name in ("W_unembed", "b_unembed") if name in old})


def _wide(value: Any) -> Any:
    return jnp.asarray(value).astype(jnp.float32)


def _less_mean(value: Any) -> Any:
    wide = _wide(value)
    return wide - wide.mean(axis=-1, keepdims=True)


def _blocks(model: Transformer) -> Iterator[str]:
    """What the names of blocks begin with: one for all of them where they are stacked."""
    return iter(["blocks"]) if model.is_stacked else (f"blocks.{i}" for i in range(model.config.n_layers))


def _with(model: Transformer, parameters: dict[str, Any], **changes: Any) -> Transformer:
    """A model of the same kind with other parameters, and with these fields of its config changed."""
    config, dtype = dataclasses.replace(model.config, **changes), model.W_embed[...].dtype
    layers = "stacked" if model.is_stacked else "unrolled"
    options: dict[str, Any] = {
        "dtype": dtype, "compute_dtype": model.given_compute_dtype, "layers": layers, "remat": model.remat,
    }  # fmt: skip
    skeleton = jax.eval_shape(lambda: Transformer(config, jax.random.key(0), **options))
    leaves = [jnp.asarray(parameters[name], dtype) for name in named_parameters(skeleton)]
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)

"""Gemma 3 270M in gemma, Google DeepMind's own library.

Run as a script where gemma is installed, it writes what the model computes (see real_weights.py) for the tests of other
libraries that have a Gemma 3.
"""

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from real_weights import RealWeights, write_pass

import interp_jax.patching as patching

sys.path.append(str(pathlib.Path(__file__).parent / "stand_ins"))  # kauldron, where it is not installed


def load(weights: RealWeights) -> tuple[Callable[[Any, Any], Any], dict[str, Any]]:
    """The model with its sites, in float32.

    Args:
        weights: Gemma 3's, by their Hugging Face names.

    Returns:
        `forward(params, tokens) -> logits`, and params.
    """
    patching.install("gemma")
    model = importlib.import_module("gemma.gm").nn.Gemma3_270M()
    config = model.config
    params: dict[str, Any] = {
        "embedder": {"input_embedding": weights.weight("model.embed_tokens.weight")},
        "final_norm": {"scale": weights.weight("model.norm.weight")},
    }

    def by_head(name: str) -> np.ndarray:
        """[heads * d_head, d_model] to [heads, d_model, d_head]."""
        return weights.weight(name).reshape(-1, config.head_dim, config.embed_dim).swapaxes(1, 2)

    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        params[f"layer_{i}"] = {
            "pre_attention_norm": {"scale": weights.weight(f"{layer}.input_layernorm.weight")},
            "attn": {
                "q_einsum": {"w": by_head(f"{attn}.q_proj.weight")},
                "kv_einsum": {"w": np.stack([by_head(f"{attn}.{name}_proj.weight") for name in "kv"])},
                "_query_norm": {"scale": weights.weight(f"{attn}.q_norm.weight")},
                "_key_norm": {"scale": weights.weight(f"{attn}.k_norm.weight")},
                "attn_vec_einsum": {
                    "w": weights.weight(f"{attn}.o_proj.weight").T.reshape(-1, config.head_dim, config.embed_dim)
                },
            },
            "post_attention_norm": {"scale": weights.weight(f"{layer}.post_attention_layernorm.weight")},
            "pre_ffw_norm": {"scale": weights.weight(f"{layer}.pre_feedforward_layernorm.weight")},
            "mlp": {
                "gating_einsum": np.stack([weights.weight(f"{mlp}.{name}_proj.weight") for name in ("gate", "up")]),
                "linear": weights.weight(f"{mlp}.down_proj.weight").T,
            },
            "post_ffw_norm": {"scale": weights.weight(f"{layer}.post_feedforward_layernorm.weight")},
        }
    return lambda params, tokens: model.apply({"params": params}, tokens).logits, jax.device_put(params)


if __name__ == "__main__":
    gemma3 = RealWeights("gemma3")
    write_pass("gemma3-sites", *load(gemma3), gemma3.rows, {})

"""Gemma 3's text weights from a GGUF file, under the names and in the layout that Hugging Face's checkpoints have.

That is the layout which every library's converter is written against, and so what a test of one needs:

- a linear map is `[out, in]` in both, heads one after another, rotary pairs in halves: nothing is permuted;
- the norms (those of q and k too) multiply by `1 + weight`; llama.cpp adds the one when it writes the file, so it is
  taken off again;
- the unembedding is the embedding, which stands there once.
"""

import numpy as np
from jaxtyping import Float

from interp_jax.models.gguf_file import GgufFile, check_tensor_names

__all__ = ["hugging_face_weights"]

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hugging_face_weights(gguf_file: GgufFile) -> dict[str, Float[np.ndarray, "..."]]:
    """All weights of a Gemma 3 text model, dequantised.

    Args:
        gguf_file: the opened file.

    Returns:
        `model.embed_tokens.weight`, `model.layers.0.self_attn.q_proj.weight` and so on to float32 arrays; the
        unembedding, being the embedding, is left out.

    Raises:
        ValueError: when the file is of another architecture, or its tensors are not those of a Gemma 3.
    """
    architecture = gguf_file.require("general.architecture")
    if architecture != "gemma3":
        raise ValueError(f"{gguf_file.path} is of the architecture {architecture!r}, expected 'gemma3'.")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"} | {
        f"blk.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
        for layer in range(gguf_file.require("gemma3.block_count"))
        for ours, theirs in _LAYER_NAMES.items()
    }
    check_tensor_names(gguf_file, names)
    return {
        theirs: gguf_file.tensor(ours) - 1 if "norm" in ours else gguf_file.tensor(ours)
        for ours, theirs in names.items()
    }

"""What PyTorch's `transformers` computes with small random models of every family: written once, compared ever after.

`python tests/models/pytorch_reference.py`, where PyTorch is installed (extra `peers`), writes `pytorch_reference.json`
(configs, tensor shapes) and `pytorch_reference.npz`: logits, hidden states, attention patterns, and every site of the
last layer that the original's modules expose. The weights are not stored: both sides draw them from the same NumPy
seed, tensor by tensor in the order of their names. So the comparison runs in every CI run, without PyTorch.
"""

import json
import pathlib
import sys
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
TOKENS = np.random.default_rng(7).integers(0, 60, (2, 9))

COMMON = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA = COMMON | {"intermediate_size": 40, "num_key_value_heads": 2}
GPT = {"vocab_size": 60, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32}
CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", GPT),
    "gpt_neo": ("GPTNeo", {
        "vocab_size": 60, "hidden_size": 24, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 2]], "window_size": 4, "intermediate_size": 40,
    }),
    "gpt_neox": ("GPTNeoX", COMMON | {"intermediate_size": 40, "rotary_pct": 0.7}),
    "gpt_neox_sequential": ("GPTNeoX", COMMON | {
        "intermediate_size": 40, "use_parallel_residual": False, "rotary_pct": 1.0,
    }),
    "gpt2_options": ("GPT2", GPT | {
        "n_inner": 40, "activation_function": "quick_gelu", "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "tie_word_embeddings": False,
    }),
    "llama": ("Llama", LLAMA | {"rope_theta": 500.0}),
    "llama_3": ("Llama", LLAMA | {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }),
    "llama_yarn": ("Llama", LLAMA | {"hidden_act": "relu2", "rope_theta": 500.0, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3.0,
    }}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 4}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2_windows": ("Qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_yarn": ("Qwen2", LLAMA | {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False,
        "mscale": 1.0, "mscale_all_dim": 0.7,
    }}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 10, "tie_word_embeddings": True}),
    "gemma": ("Gemma", LLAMA | {"head_dim": 8}),
    "gemma_gelu": ("Gemma", LLAMA | {
        "head_dim": 8, "hidden_act": "gelu", "tie_word_embeddings": False, "attention_bias": True,
    }),
    "gemma2": ("Gemma2", LLAMA | {
        "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }),
    "gemma3_text": ("Gemma3Text", LLAMA | {
        "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 10,
        "sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_theta": 1000.0, "rope_local_base_freq": 100.0,
    }),
}  # fmt: skip
"""Case to the name of its classes in `transformers`, and what differs from their defaults."""


LLAMA_MODULES = {
    "attn_in": ("input_layernorm", "output"), "attn_heads": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn", "output"), "resid_mid": ("post_attention_layernorm", "input"),
    "mlp_in": ("post_attention_layernorm", "output"), "mlp_pre": ("mlp.gate_proj", "output"),
    "mlp_act": ("mlp.down_proj", "input"), "mlp_out": ("mlp", "output"),
}  # fmt: skip
GEMMA_2_MODULES = LLAMA_MODULES | {
    "attn_out": ("post_attention_layernorm", "output"), "resid_mid": ("pre_feedforward_layernorm", "input"),
    "mlp_in": ("pre_feedforward_layernorm", "output"), "mlp_out": ("post_feedforward_layernorm", "output"),
}  # fmt: skip
GPT_2_MODULES = {
    "attn_in": ("ln_1", "output"), "attn_heads": ("attn.c_proj", "input"), "attn_out": ("attn", "output"),
    "resid_mid": ("ln_2", "input"), "mlp_in": ("ln_2", "output"), "mlp_pre": ("mlp.c_fc", "output"),
    "mlp_act": ("mlp.c_proj", "input"), "mlp_out": ("mlp", "output"),
}  # fmt: skip
MODULES: dict[str, dict[str, tuple[str, str]]] = {
    "GPT2": GPT_2_MODULES,
    "GPTNeo": GPT_2_MODULES | {
        "attn_heads": ("attn.attention.out_proj", "input"), "q": ("attn.attention.q_proj", "output"),
        "k": ("attn.attention.k_proj", "output"), "v": ("attn.attention.v_proj", "output"),
    },
    "GPTNeoX": {
        "attn_in": ("input_layernorm", "output"), "attn_heads": ("attention.dense", "input"),
        "attn_out": ("attention", "output"), "resid_mid": ("post_attention_layernorm", "input"),
        "mlp_in": ("post_attention_layernorm", "output"), "mlp_pre": ("mlp.dense_h_to_4h", "output"),
        "mlp_act": ("mlp.dense_4h_to_h", "input"), "mlp_out": ("mlp", "output"),
    },
    "Gemma2": GEMMA_2_MODULES,
    "Gemma3Text": GEMMA_2_MODULES,
}  # fmt: skip
"""For each class, where in a layer each site is. Queries and keys after rotary come from the attention function."""


def random_tensors(shapes: dict[str, list[int]], case: str) -> dict[str, np.ndarray]:
    """Weights large enough that every part matters; norms' scales are around 1 and biases are not 0."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    tensors = {}
    for name in sorted(shapes):
        is_scale = ("norm" in name or ".ln_" in name) and name.endswith("weight")
        draw = rng.normal(float(is_scale and not case.startswith("gemma")), 0.3, shapes[name])
        tensors[name] = draw.astype(np.float32)
    return tensors


def run_pytorch(case: str):
    """Runs a case in PyTorch.

    Returns:
        The fields of its config.json, its tensors' shapes, and what it computes: logits; `hidden`, the stream before
        each block and last after the final norm; `attentions`; `sites/NAME` of the last layer.
    """
    import torch
    import transformers

    class_name, fields = CASES[case]
    found: dict[str, np.ndarray] = {}

    def attention(module, query, key, value, *args, **kwargs):
        """The eager one, with what it is given noted: the last layer's stays."""
        found.update(zip("qkv", (each.transpose(1, 2).numpy() for each in (query, key, value)), strict=True))
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register("noted", attention)
    transformers.AttentionMaskInterface.register("noted", transformers.masking_utils.eager_mask)
    kind = "eager" if class_name == "GPTNeo" else "noted"
    config = getattr(transformers, f"{class_name}Config")(**fields, attn_implementation=kind)
    suffix = "LMHeadModel" if class_name == "GPT2" else "ForCausalLM"
    name = class_name.removesuffix("Text") if class_name == "Gemma3Text" else class_name
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
        state.pop("embed_out.weight", None)
    tensors = random_tensors(state, case)
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=False)
    model.tie_weights()

    def noted(site, side):
        def hook(module, inputs, output):
            value = inputs[0] if side == "input" else output[0] if isinstance(output, tuple) else output
            found[site] = value.numpy()

        return hook

    layers = next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList))
    for site, (path, side) in MODULES.get(class_name, LLAMA_MODULES).items():
        layers[-1].get_submodule(path).register_forward_hook(noted(site, side))
    with torch.no_grad():
        out = model(torch.tensor(TOKENS), output_hidden_states=True, output_attentions=True, use_cache=False)
    if class_name == "GPTNeoX" and fields.get("use_parallel_residual", True):
        del found["resid_mid"]  # What goes into the second norm there is the block's input.
    results = {
        "logits": out.logits.numpy(),
        "hidden": np.stack([each.numpy() for each in out.hidden_states]),
        "attentions": np.stack([each.numpy() for each in out.attentions]),
        **{f"sites/{site}": value for site, value in found.items()},
    }
    fields = json.loads(config.to_json_string(use_diff=False))
    return {key: fields[key] for key in sorted(fields) if not key.startswith("_")}, state, results


def read() -> dict[str, dict]:
    """The stored cases: name to `config`, `shapes`, `logits`, `hidden`, `attentions`, and `sites` of the last layer."""
    stored = json.loads((HERE / "pytorch_reference.json").read_text())
    with np.load(HERE / "pytorch_reference.npz") as arrays:
        for case, entry in stored.items():
            entry.update({key: arrays[f"{case}/{key}"] for key in ("logits", "hidden", "attentions")})
            prefix = f"{case}/sites/"
            entry["sites"] = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
    return stored


def main() -> None:
    """Writes both files."""
    stored, arrays = {}, {}
    for case in CASES:
        config, shapes, results = run_pytorch(case)
        stored[case] = {"config": config, "shapes": shapes}
        arrays.update({f"{case}/{key}": value for key, value in results.items()})
        print(case, float(np.abs(results["logits"]).max()))
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(entry)}" for case, entry in stored.items())
    (HERE / "pytorch_reference.json").write_text(f"{{\n{lines}\n}}\n")
    np.savez_compressed(HERE / "pytorch_reference.npz", **arrays)


if __name__ == "__main__":
    main()

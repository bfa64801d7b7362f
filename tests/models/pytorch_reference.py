"""What PyTorch's `transformers` computes with small random models of every family: written once, compared ever after.

`python tests/models/pytorch_reference.py`, where PyTorch is installed (extra `peers`), writes `pytorch_reference.json`
(configs, tensor shapes) and `pytorch_reference.npz` (logits, hidden states, attention patterns). The weights are not
stored: both sides draw them from the same NumPy seed, tensor by tensor in the order of their names. So the comparison
runs in every CI run, without PyTorch.
"""

import json
import pathlib
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
    "llama": ("Llama", LLAMA | {"rope_theta": 500.0}),
    "llama_3": ("Llama", LLAMA | {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 4}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2_windows": ("Qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 10, "tie_word_embeddings": True}),
    "gemma": ("Gemma", LLAMA | {"head_dim": 8}),
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
        each block and last after the final norm; `attentions`.
    """
    import torch
    import transformers

    class_name, fields = CASES[case]
    config = getattr(transformers, f"{class_name}Config")(**fields, attn_implementation="eager")
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
    with torch.no_grad():
        out = model(torch.tensor(TOKENS), output_hidden_states=True, output_attentions=True, use_cache=False)
    results = {
        "logits": out.logits.numpy(),
        "hidden": np.stack([each.numpy() for each in out.hidden_states]),
        "attentions": np.stack([each.numpy() for each in out.attentions]),
    }
    fields = json.loads(config.to_json_string(use_diff=False))
    return {key: fields[key] for key in sorted(fields) if not key.startswith("_")}, state, results


def read() -> dict[str, dict]:
    """The stored cases: name to `config`, `shapes`, `logits`, `hidden`, `attentions`."""
    stored = json.loads((HERE / "pytorch_reference.json").read_text())
    with np.load(HERE / "pytorch_reference.npz") as arrays:
        for case, entry in stored.items():
            entry.update({key: arrays[f"{case}/{key}"] for key in ("logits", "hidden", "attentions")})
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

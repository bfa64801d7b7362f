"""Gemma 3's weights from a small GGUF file: names, layout, and the one that llama.cpp adds to each norm."""

import pathlib

import gguf
import numpy as np
import pytest

from interp_jax import installed_data
from interp_jax.models.gemma3_gguf import hugging_face_weights
from interp_jax.models.gguf_file import GgufFile

D_MODEL, D_HEAD, HEADS, D_MLP, VOCAB = 12, 6, 4, 20, 9
LAYER = {
    "attn_norm": ("input_layernorm", (D_MODEL,)),
    "attn_q": ("self_attn.q_proj", (HEADS * D_HEAD, D_MODEL)),
    "attn_k": ("self_attn.k_proj", (D_HEAD, D_MODEL)),
    "attn_v": ("self_attn.v_proj", (D_HEAD, D_MODEL)),
    "attn_q_norm": ("self_attn.q_norm", (D_HEAD,)),
    "attn_k_norm": ("self_attn.k_norm", (D_HEAD,)),
    "attn_output": ("self_attn.o_proj", (D_MODEL, HEADS * D_HEAD)),
    "post_attention_norm": ("post_attention_layernorm", (D_MODEL,)),
    "ffn_norm": ("pre_feedforward_layernorm", (D_MODEL,)),
    "ffn_gate": ("mlp.gate_proj", (D_MLP, D_MODEL)),
    "ffn_up": ("mlp.up_proj", (D_MLP, D_MODEL)),
    "ffn_down": ("mlp.down_proj", (D_MODEL, D_MLP)),
    "post_ffw_norm": ("post_feedforward_layernorm", (D_MODEL,)),
}


def _write(path: pathlib.Path, *, n_layers: int = 2, architecture: str = "gemma3") -> dict[str, np.ndarray]:
    """Two layers' tensors; `n_layers` is what the metadata say. Returns what a checkpoint would have."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32(f"{architecture}.block_count", n_layers)
    expected = {}
    names = {"token_embd": ("embed_tokens", (VOCAB, D_MODEL)), "output_norm": ("norm", (D_MODEL,))} | {
        f"blk.{layer}.{ours}": (f"layers.{layer}.{theirs}", shape)
        for layer in range(2)
        for ours, (theirs, shape) in LAYER.items()
    }
    for ours, (theirs, shape) in names.items():
        weight = rng.normal(size=shape).astype(np.float32)
        expected[f"model.{theirs}.weight"] = weight
        writer.add_tensor(f"{ours}.weight", weight + 1 if len(shape) == 1 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_weights_have_hugging_face_s_names_and_layout(tmp_path):
    expected = _write(tmp_path / "small.gguf")
    weights = hugging_face_weights(GgufFile(tmp_path / "small.gguf"))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, expected[name], atol=1e-6)


def test_another_model_is_refused(tmp_path):
    _write(tmp_path / "llama.gguf", architecture="llama")
    with pytest.raises(ValueError, match="architecture 'llama', expected 'gemma3'"):
        hugging_face_weights(GgufFile(tmp_path / "llama.gguf"))
    _write(tmp_path / "short.gguf", n_layers=3)
    with pytest.raises(ValueError, match=r"Missing: blk\.2\.attn_k\.weight, .*Unknown: none"):
        hugging_face_weights(GgufFile(tmp_path / "short.gguf"))


@pytest.mark.slow
def test_the_real_file():
    if installed_data.status("gemma3")[0].path is None:
        pytest.skip("Only the tests of patch sets need it: `make test-patches` gets it.")
    gguf_file = GgufFile(installed_data.find("gemma3"))
    weights = hugging_face_weights(gguf_file)
    assert len(weights) == 2 + 18 * len(LAYER)
    assert weights["model.embed_tokens.weight"].shape == (262144, 640)
    stored = gguf_file.tensor("blk.0.attn_q_norm.weight")
    np.testing.assert_array_equal(weights["model.layers.0.self_attn.q_norm.weight"], stored - 1)

"""GGUF files of every architecture, written as llama.cpp's converter lays them out, against PyTorch's logits."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_reference

from interp_jax import installed_data
from interp_jax.models.gguf_model import GgufCheckpoint, load_gguf
from interp_jax.models.transformer import apply

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

CASES = pytorch_reference.read()
TOKENS = jnp.asarray(pytorch_reference.TOKENS)

ARCHITECTURES = {
    "llama": "llama", "llama_3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gpt2": "gpt2", "gpt_neox": "gptneox",
}  # fmt: skip


def converted(name, tensor, case, config):
    """A tensor as llama.cpp writes it: its name there, and its values."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    if "layernorm" in name and case.startswith("gpt_neox"):
        name = name.replace("post_attention_layernorm", "ln_2")
    pieces = [
        ("model.embed_tokens", "token_embd"), ("transformer.wte", "token_embd"), ("gpt_neox.embed_in", "token_embd"),
        ("transformer.wpe", "position_embd"), ("lm_head", "output"), ("embed_out", "output"),
        ("model.norm", "output_norm"), ("transformer.ln_f", "output_norm"),
        ("gpt_neox.final_layer_norm", "output_norm"),
        ("model.layers.", "blk."), ("transformer.h.", "blk."), ("gpt_neox.layers.", "blk."),
        ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"), ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"), ("ln_1", "attn_norm"), ("ln_2", "ffn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_attention_layernorm", "post_attention_norm" if case in ("gemma2", "gemma3_text") else "ffn_norm"),
        ("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"), ("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down"),
        ("attention.query_key_value", "attn_qkv"), ("attention.dense", "attn_output"),
        ("mlp.dense_h_to_4h", "ffn_up"), ("mlp.dense_4h_to_h", "ffn_down"),
    ]  # fmt: skip
    for theirs, ours in pieces:
        name = name.replace(theirs, ours)
    if case.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    if ARCHITECTURES.get(case) == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
        of = heads if "attn_q" in name else config["num_key_value_heads"]
        d_head = tensor.shape[0] // of
        split = tensor.reshape(of, d_head, -1)
        halves = np.stack([split[:, : d_head // 2], split[:, d_head // 2 :]], 2)
        tensor = halves.reshape(tensor.shape)
    if case == "gpt2" and tensor.ndim == 2 and "embd" not in name:
        tensor = tensor.T
    if case == "gpt_neox" and "attn_qkv" in name:
        d_head = tensor.shape[0] // heads // 3
        order = [3 * head + which for which in range(3) for head in range(heads)]
        tensor = np.concatenate([tensor[at * d_head : (at + 1) * d_head] for at in order])
    return name, tensor


def llama_3_divisors(config):
    """What llama.cpp's converter writes for Llama 3.1: short waves stay, long ones are stretched, others in between."""
    scaling, n = config["rope_scaling"], config["head_dim"]
    divisors = []
    for i in range(0, n, 2):
        wave = 2 * np.pi * config["rope_theta"] ** (i / n)
        turns = scaling["original_max_position_embeddings"] / wave
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = min(max((turns - low) / (high - low), 0), 1)
        divisors.append(1 / (share + (1 - share) / scaling["factor"]))
    assert len(set(divisors)) > 1
    return np.asarray(divisors, np.float32)


def write_gguf(path, case):
    config, name = CASES[case]["config"], ARCHITECTURES[case]
    get = config.get
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(get("num_hidden_layers", get("n_layer")))
    writer.add_context_length(get("max_position_embeddings", get("n_positions")))
    writer.add_embedding_length(get("hidden_size", get("n_embd")))
    writer.add_feed_forward_length(get("intermediate_size", 4 * get("n_embd", 0)))
    writer.add_head_count(get("num_attention_heads", get("n_head")))
    if get("num_key_value_heads"):
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(get("rope_theta", 10000.0))
        if get("head_dim"):
            writer.add_key_length(config["head_dim"])
    else:
        writer.add_layer_norm_eps(get("layer_norm_epsilon", get("layer_norm_eps")))
    if name == "gptneox":
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_rope_dimension_count(4)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if name == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
    if case == "llama_3":
        writer.add_tensor("rope_freqs.weight", llama_3_divisors(config))
    for tensor_name, tensor in pytorch_reference.random_tensors(CASES[case]["shapes"], case).items():
        written, values = converted(tensor_name, tensor, case, config)
        writer.add_tensor(written, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What the metadata cannot say in the cases of `pytorch_reference`: Gemma's query scale and its local base and pattern.
SAYABLE = [case for case in ARCHITECTURES if case not in ("gemma2", "gemma3_text")]


@pytest.mark.parametrize("case", SAYABLE)
def test_logits_are_pytorch_s(case, tmp_path):
    model = load_gguf(write_gguf(tmp_path / "model.gguf", case))
    np.testing.assert_allclose(jax.jit(apply)(model, TOKENS), CASES[case]["logits"], atol=3e-5)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text"])
def test_tensors_are_those_of_the_checkpoint(case, tmp_path):
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", case))
    expected = pytorch_reference.random_tensors(CASES[case]["shapes"], case)
    assert set(checkpoint.names) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(checkpoint.tensor(name), tensor, atol=1e-6, err_msg=name)
    config = load_gguf(tmp_path / "model.gguf").config
    assert (config.window, config.post_norms, config.norm_offset) == (4, True, 1.0)


def test_quantised_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in {
        "block_count": 1,
        "context_length": 8,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    q8 = gguf.GGMLQuantizationType.Q8_0
    drawn = {f"blk.0.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    drawn["token_embd.weight"] = rng.normal(size=(60, 32)).astype(np.float32)
    for name, values in drawn.items():
        writer.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v"):
        writer.add_tensor(f"blk.0.{name}.bias", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_gguf(path, layers="unrolled")
    np.testing.assert_allclose(model.W_embed[...], drawn["token_embd.weight"], atol=0.02)
    np.testing.assert_allclose(model.blocks[0].mlp.W_out[...], drawn["blk.0.ffn_down.weight"].T, atol=0.02)
    assert model.config.qkv_bias


def metadata_only(path, architecture="qwen2", under="rope.scaling.", **more):
    writer = gguf.GGUFWriter(path, architecture)
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"{architecture}.{key}", 64)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in more.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add.get(type(value), writer.add_array)(f"{architecture}.{under}{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint(path)


def test_rotary_scaling_by_metadata(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    assert metadata_only(tmp_path / "a.gguf", **yarn).fields["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    assert metadata_only(tmp_path / "b.gguf", type="none").fields["rope_scaling"] is None
    with pytest.raises(ValueError, match=r"by 'longrope'; supported in GGUF are 'linear' and 'yarn'"):
        _ = metadata_only(tmp_path / "c.gguf", type="longrope", factor=2.0).fields


def test_a_factor_alone_scales_as_llama_cpp_reads_it(tmp_path):
    assert metadata_only(tmp_path / "a.gguf", factor=4.0).fields["rope_scaling"] == {
        "rope_type": "linear", "factor": 4.0,
    }  # fmt: skip


def test_settings_that_are_not_known_are_refused(tmp_path):
    harmless = {"vocab_size": 60, "attention.causal": True, "expert_count": 0, "rope.dimension_count": 1}
    assert metadata_only(tmp_path / "a.gguf", under="", **harmless).fields["num_hidden_layers"] == 64
    refused = {
        "attention.causal": False, "attention.scale": 1.0, "rope.scaling.yarn_beta_fast": 16.0, "logit_scale": 0.5,
        "attention.sliding_window": 8,
    }  # fmt: skip
    for number, (key, value) in enumerate(refused.items()):
        checkpoint = metadata_only(tmp_path / f"{number}.gguf", under="", **{key: value})
        with pytest.raises(ValueError, match=rf"not known for the architecture 'qwen2', .*: {key}={value}"):
            _ = checkpoint.fields
    checkpoint = metadata_only(tmp_path / "b.gguf", under="rope.", dimension_count=2)
    with pytest.raises(ValueError, match=r"has rope.dimension_count=2; only a head's width, 1, is supported"):
        _ = checkpoint.fields


def test_newer_files_say_what_the_older_ones_of_gemma_leave_out(tmp_path):
    # A bool for each layer, or how many layers there are to one that is not local.
    older = metadata_only(tmp_path / "a.gguf", "gemma3", "attention.", sliding_window=8).fields
    assert [layer for layer, kind in enumerate(older["layer_types"]) if kind == "full_attention"] == [*range(5, 64, 6)]
    assert (older["rope_local_base_freq"], older["final_logit_softcapping"]) == (10000.0, None)
    newer = {
        "attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False] * 32,
        "rope.freq_base_swa": 500.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    fields = metadata_only(tmp_path / "b.gguf", "gemma3", "", **newer).fields
    assert fields["layer_types"] == ["sliding_attention", "full_attention"] * 32
    assert (fields["rope_local_base_freq"], fields["final_logit_softcapping"]) == (500.0, 30.0)
    third = metadata_only(tmp_path / "c.gguf", "gemma2", "attention.", sliding_window=8, sliding_window_pattern=3)
    assert third.fields["layer_types"] == (["sliding_attention"] * 2 + ["full_attention"]) * 21 + ["sliding_attention"]


def test_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("x", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"of the architecture 'mamba'; known are llama, qwen2"):
        load_gguf(tmp_path / "model.gguf")


def test_a_tensor_too_many_is_listed(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(ValueError, match=r"Missing: model.layers.1.mlp.up_proj.weight. Unknown: blk.1.ffn_ap.weight"):
        load_gguf(path)


@pytest.mark.slow
@pytest.mark.demo
def test_smollm2_is_the_same_in_our_code_and_in_the_patched_library(tmp_path):
    from interp_jax.models.flax_llama import load_smollm2

    library = load_smollm2()
    tokens = jnp.asarray([library.tokenizer.encode("The city is one of the largest in the United States.")])
    model = load_gguf(installed_data.find("smollm2"))
    np.testing.assert_allclose(
        jax.jit(apply)(model, tokens), jax.jit(library.forward)(library.params, tokens), atol=2e-4
    )

"""Every family from a Hugging Face directory, against what PyTorch's `transformers` computed with the same weights."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import pytorch_reference
import safetensors.numpy

import interp_jax as ij
from interp_jax.models import saved_model, transformer
from interp_jax.models.hugging_face import FAMILIES, config_from_hugging_face, load_hugging_face
from interp_jax.models.transformer import apply

# The leak checker bypasses the trace caches and would trace every small operation of every layer anew.
pytestmark = pytest.mark.caches

CASES = pytorch_reference.read()
TOKENS = jnp.asarray(pytorch_reference.TOKENS)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param


def write_directory(folder, case, *, change=lambda tensors: tensors, n_shards=1, dtype=np.float32, **fields):
    """A directory as `save_pretrained` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = CASES[case]
    (folder / "config.json").write_text(json.dumps(entry["config"] | fields))
    tensors = pytorch_reference.random_tensors(entry["shapes"], case)
    tensors = change({name: np.ascontiguousarray(each.astype(dtype)) for name, each in tensors.items()})
    if n_shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def directory(case, tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp(case), case)


def assert_close(actual, expected, what=""):
    """Within rounding of the largest value, which sums of many terms are as far off as."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * max(1, np.abs(expected).max()), err_msg=what)


def test_logits_and_sites_are_pytorch_s(case, directory):
    model = load_hugging_face(directory)
    expected = CASES[case]
    logits, at = jax.jit(ij.fetch(apply))(model, TOKENS)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5)
    np.testing.assert_allclose(at[None, "embed"], expected["hidden"][0], atol=2e-6)
    assert_close(at[None, "final_norm"], expected["hidden"][-1])
    for layer in range(model.config.n_layers):
        assert_close(at[layer, "resid_pre"], expected["hidden"][layer])
        np.testing.assert_allclose(at[layer, "attn_probs"], expected["attentions"][layer], atol=5e-6)
        total = at[layer, "resid_pre"] + at[layer, "attn_out"] + at[layer, "mlp_out"]
        assert_close(at[layer, "resid_post"], total)
    last = model.config.n_layers - 1
    of_layer = {name for at_layer, name in at if at_layer == last}
    assert of_layer - expected["sites"].keys() == {"resid_pre", "resid_post", "attn_probs", "attn_logits"}
    for name, value in expected["sites"].items():
        assert_close(at[last, name].reshape(value.shape), value, name)


@pytest.mark.slow
def test_unrolled_eager_and_rematerialised_are_the_same(case, directory):
    unrolled = load_hugging_face(directory, layers="unrolled")
    logits, at = ij.fetch(apply)(unrolled, TOKENS)
    np.testing.assert_allclose(logits, CASES[case]["logits"], atol=2e-5)
    stacked = load_hugging_face(directory, remat=True)
    assert list(at) == [(row.layer, row.name) for row in ij.list_sites(apply)(stacked, TOKENS)]
    assert ((0, "resid_mid") in at) is not unrolled.config.parallel_residual
    np.testing.assert_allclose(jax.jit(apply)(stacked, TOKENS), CASES[case]["logits"], atol=2e-5)


@pytest.mark.slow
def test_a_cache_gives_the_same_as_the_whole_row(case, directory):
    for layers in ("stacked", "unrolled"):
        model = load_hugging_face(directory, layers=layers)
        extend = jax.jit(lambda model, cache, tokens: model.extend(cache, tokens))
        cache = transformer.empty_cache(model, batch=2, slots=12)
        first, cache = extend(model, cache, TOKENS[:, :5])
        logits = [first]
        for at in range(5, 9):
            one, cache = extend(model, cache, TOKENS[:, at : at + 1])
            logits.append(one)
        np.testing.assert_allclose(jnp.concatenate(logits, axis=1), CASES[case]["logits"], atol=2e-5)
        assert int(cache.n_filled) == 9


@pytest.mark.slow
def test_padding_left_or_right_changes_nothing(case, directory):
    model = load_hugging_face(directory)
    clean = CASES[case]["logits"]
    for before in (0, 3):
        padded = jnp.full((2, 12), 5).at[:, before : before + 9].set(TOKENS)
        is_token = jnp.zeros((2, 12), bool).at[:, before : before + 9].set(True)
        logits = jax.jit(lambda model, padded, is_token: model(padded, is_token=is_token))(model, padded, is_token)
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits[:, before : before + 9], clean, atol=3e-5)


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
BOUNDS = {"float32": 2e-5, "bfloat16": 0.05}


def errors(directory, case):
    """How far logits are from PyTorch's: largest difference in f32; root mean square in bf16, as a share of theirs."""
    expected = CASES[case]["logits"]
    found = {}
    for dtype in BOUNDS:
        logits = jax.jit(apply)(load_hugging_face(directory, compute_dtype=dtype), TOKENS)
        assert logits.dtype == dtype
        off = np.asarray(logits, np.float32) - expected
        found[dtype] = np.abs(off).max() if dtype == "float32" else np.sqrt(np.mean(off**2) / np.mean(expected**2))
    return found


@pytest.mark.slow
def test_errors_in_both_dtypes_are_within_the_bounds_of_the_page(case, directory):
    found = errors(directory, case)
    assert all(found[dtype] <= bound for dtype, bound in BOUNDS.items()), found
    assert f"| `{case}` |" in PAGE.read_text()


def test_shards_are_the_same_as_one_file(tmp_path):
    whole = load_hugging_face(write_directory(tmp_path / "whole", "llama"))
    shards = load_hugging_face(write_directory(tmp_path / "shards", "llama", n_shards=3))
    jax.tree.map(np.testing.assert_array_equal, whole, shards)


def test_bfloat16_files(tmp_path):
    model = load_hugging_face(write_directory(tmp_path, "llama", dtype=ml_dtypes.bfloat16), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_old_gpt2_checkpoints_lack_the_prefix_and_hold_buffers(tmp_path):
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return bare | {f"h.{i}.attn.bias": np.ones((1, 1, 32, 32), np.float32) for i in range(3)}

    model = load_hugging_face(write_directory(tmp_path, "gpt2", change=change))
    np.testing.assert_allclose(apply(model, TOKENS), CASES["gpt2"]["logits"], atol=2e-5)


@pytest.mark.parametrize(("case_name", "prefix"), [("qwen3", "model."), ("gpt_neox", "gpt_neox.")])
def test_a_checkpoint_of_the_model_without_its_head_lacks_the_prefix(case_name, prefix, tmp_path):
    def change(tensors):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    model = load_hugging_face(write_directory(tmp_path, case_name, change=change))
    np.testing.assert_allclose(apply(model, TOKENS), CASES[case_name]["logits"], atol=BOUNDS["float32"])


@pytest.mark.parametrize(
    ("case_name", "given", "absent", "field", "default"),
    [
        ("gemma2", {}, "attn_logit_softcapping", "attn_soft_cap", 50.0),
        ("gemma2", {}, "final_logit_softcapping", "logit_soft_cap", 30.0),
        ("gemma3_text", {}, "final_logit_softcapping", "logit_soft_cap", None),
        ("mistral", {}, "sliding_window", "window", 4096),
        ("qwen2_windows", {}, "sliding_window", "window", 4096),
        ("qwen2_windows", {"num_hidden_layers": 30, "layer_types": None}, "max_window_layers", "is_local", None),
    ],
)
def test_what_a_config_leaves_out_is_transformers_default(case_name, given, absent, field, default):
    fields = CASES[case_name]["config"] | given
    del fields[absent]
    found = getattr(config_from_hugging_face(fields), field)
    assert found == (default if field != "is_local" else tuple(layer >= 28 for layer in range(30)))


def test_the_logits_of_gemma_3_with_vision_are_not_capped():
    text = CASES["gemma3_text"]["config"] | {"final_logit_softcapping": 30.0}
    assert config_from_hugging_face(text).logit_soft_cap == 30.0
    assert config_from_hugging_face({"model_type": "gemma3", "text_config": text}).logit_soft_cap is None


def test_gemma_3_with_a_vision_tower(tmp_path):
    def change(tensors):
        inner = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        return inner | {"vision_tower.patches.weight": np.ones(3, np.float32)}

    folder = write_directory(tmp_path, "gemma3_text", change=change)
    config = {"model_type": "gemma3", "text_config": CASES["gemma3_text"]["config"]}
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(apply(load_hugging_face(folder), TOKENS), CASES["gemma3_text"]["logits"], atol=2e-5)


def test_gemma_3_with_vision_leaves_out_what_is_usual():
    # The whole text_config of the file that its authors give for 4B.
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    c = config_from_hugging_face({"model_type": "gemma3", "text_config": text})
    assert (c.vocab_size, c.context, c.n_heads, c.n_kv_heads, c.d_head) == (262208, 131072, 8, 4, 256)
    assert (c.scale, c.window, c.rotary_base, c.rotary_base_local) == (1 / 16, 1024, 1e6, 1e4)
    assert (c.norm_epsilon, c.tied_embeddings, c.activation) == (1e-6, True, "gelu_tanh")
    assert [layer for layer in range(34) if not c.is_local[layer]] == [5, 11, 17, 23, 29]


def test_a_tied_head_that_is_stored_too_is_left_alone(tmp_path):
    def change(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    model = load_hugging_face(write_directory(tmp_path, "qwen3", change=change))
    np.testing.assert_allclose(apply(model, TOKENS), CASES["qwen3"]["logits"], atol=2e-5)


def test_loading_what_was_loaded_and_saved(tmp_path, case, directory):
    model = load_hugging_face(directory)
    saved_model.save(model, tmp_path)
    again = saved_model.load(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again, model)


# ---------------------------------------------------------------- what can be wrong


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.extra_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        return tensors

    with pytest.raises(ValueError, match=r"(?s)Missing: model.layers.0.mlp.up_proj.weight. Unknown: .*extra_proj"):
        load_hugging_face(write_directory(tmp_path, "llama", change=change))


def test_a_tensor_of_another_shape(tmp_path):
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight gives W_embed the shape \[60, 24\].* makes it \[61, 24\]"
    ):
        load_hugging_face(write_directory(tmp_path, "llama", vocab_size=61))


def test_nans_are_reported_by_name_on_request(tmp_path):
    def change(tensors):
        tensors["model.norm.weight"][3] = np.nan
        return tensors

    folder = write_directory(tmp_path, "llama", change=change)
    load_hugging_face(folder)
    with pytest.raises(ValueError, match=r"model.norm.weight holds 1 values that are not finite"):
        load_hugging_face(folder, check_finite=True)


def test_a_file_cut_short(tmp_path):
    folder = write_directory(tmp_path, "llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged"):
        load_hugging_face(folder)


def test_an_index_may_not_lead_elsewhere(tmp_path):
    folder = write_directory(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"secret.safetensors is not there"):
        load_hugging_face(folder)


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is not there; a model is a directory"):
        load_hugging_face(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("case_name", "fields", "message"),
    [
        ("llama", {"model_type": "mamba"}, "no family 'mamba' .* there are gpt2, gpt_neo"),
        ("llama", {"hidden_act": "mish"}, "activation 'mish' is not known"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "'longrope'; supported are linear, llama3, yarn and dynamic",
        ),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True; only False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1.0"),
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, "only 1.0 is supported"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"weights are quantized \('fp8'\)"),
        (
            "qwen2_windows",
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            "layer_types hold chunked_attention; supported are full_attention and sliding_attention",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "scales the rotary positions of sliding_attention",
        ),
        ("llama", {"num_key_value_heads": 3}, "multiple of n_kv_heads"),
    ],
)
def test_configs_that_cannot_be(case_name, fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hugging_face(CASES[case_name]["config"] | fields)


def test_a_config_that_lacks_a_field():
    fields = dict(CASES["llama"]["config"])
    del fields["hidden_size"]
    with pytest.raises(ValueError, match=r"config.json of a 'llama' lacks the field 'hidden_size'"):
        config_from_hugging_face(fields)


def test_newer_files_hold_rotary_settings_in_one_table():
    fields = dict(CASES["gemma3_text"]["config"])
    for name in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
        fields.pop(name, None)
    fields["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    assert config_from_hugging_face(fields) == config_from_hugging_face(CASES["gemma3_text"]["config"])


def test_dynamic_scaling_changes_nothing_within_the_context():
    fields = CASES["llama"]["config"]
    dynamic = fields | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert config_from_hugging_face(dynamic) == config_from_hugging_face(fields)


def test_gemma_s_activation_before_and_after_the_release_that_heeds_it():
    fields = CASES["gemma"]["config"] | {"hidden_act": "gelu", "hidden_activation": None}
    for version, activation in (("4.38.0.dev0", "gelu_tanh"), ("4.48.0", "gelu"), ("5.0.1", "gelu")):
        assert config_from_hugging_face(fields | {"transformers_version": version}).activation == activation
    del fields["transformers_version"]
    assert config_from_hugging_face(fields).activation == "gelu_tanh"
    assert config_from_hugging_face(fields | {"hidden_activation": "relu"}).activation == "relu"


def test_every_family_is_compared():
    families = {entry["config"]["model_type"] for entry in CASES.values()}
    assert families | {"gemma3"} == set(FAMILIES)


def test_options_that_cannot_be_are_refused_before_a_tensor_is_read(tmp_path):
    folder = write_directory(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"mesh has the axes 'data'; parameters are laid over one named 'model'"):
        load_hugging_face(folder, mesh=jax.make_mesh((1,), ("data",)))
    with pytest.raises(ValueError, match="dtype=int8; it must be a floating-point one"):
        load_hugging_face(folder, dtype=jnp.int8)


SHARDED = """
import sys
import jax, numpy as np
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.transformer import apply

tokens = np.load(sys.argv[2])
mesh = jax.make_mesh((4, 2), ("data", "model"))
model = load_hugging_face(sys.argv[1], mesh=mesh)
shards = {shard.data.shape for shard in model.blocks.attn.W_q[...].addressable_shards}
assert shards == {(3, 24, 2, 6)}, shards
print(float(np.abs(jax.jit(apply)(model, tokens) - np.load(sys.argv[3])).max()))
try:
    load_hugging_face(sys.argv[1], mesh=jax.make_mesh((2, 4), ("data", "model")))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_parameters_over_a_mesh_of_eight_devices(tmp_path):
    folder = write_directory(tmp_path / "model", "llama")
    np.save(tmp_path / "tokens.npy", pytorch_reference.TOKENS)
    np.save(tmp_path / "logits.npy", CASES["llama"]["logits"])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, folder, tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference, message = done.stdout.splitlines()
    assert float(difference) < 2e-5
    assert "blocks.attn.W_k[3, 24, 2, 6] cannot be split over the 4 devices of the mesh's axis 'model'" in message


def main():
    """Writes the table of errors into the page."""
    rows = ["| case | float32, largest difference | bfloat16, share of the logits' size |", "|---|---|---|"]
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = errors(write_directory(pathlib.Path(folder), name), name)
        rows.append(f"| `{name}` | {found['float32']:.1e} | {found['bfloat16']:.1%} |")
    before, rest = PAGE.read_text().split("<!-- parity table -->\n")
    _, after = rest.split("<!-- end of parity table -->")
    table = "\n".join(rows)
    PAGE.write_text(f"{before}<!-- parity table -->\n{table}\n<!-- end of parity table -->{after}")


if __name__ == "__main__":
    main()

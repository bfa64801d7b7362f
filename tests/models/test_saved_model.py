"""Our own files: what is loaded is what was saved, and what is damaged is told."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import CONFIGS, LLAMA, random_model

from interp_jax import whole_file
from interp_jax.models.saved_model import is_saved_model, load, save
from interp_jax.models.transformer import named_parameters

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def saved(tmp_path):
    save(random_model(LLAMA), tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change):
    """Writes a safetensors file again with changed tensors, as someone else's tool would."""
    import safetensors.numpy
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def test_what_is_loaded_is_what_was_saved(config, tmp_path):
    model = random_model(config)
    save(model, tmp_path / "deep" / "model")
    loaded = load(tmp_path / "deep" / "model", layers="unrolled")
    assert loaded.config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_stored_narrow_loaded_wide(tmp_path, dtype):
    model = random_model(LLAMA)
    save(model, tmp_path, dtype=dtype)
    loaded = named_parameters(load(tmp_path, layers="unrolled"))
    for name, value in named_parameters(model).items():
        assert loaded[name].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[name], value.astype(dtype).astype(jnp.float32))


def test_a_parameter_that_does_not_fit_the_stored_dtype_is_refused(tmp_path):
    model = random_model(LLAMA)
    model.final_norm.scale[...] = jnp.full(LLAMA.d_model, 1e6)
    with pytest.raises(ValueError, match=r"final_norm.scale does not fit into float16"):
        save(model, tmp_path, dtype=jnp.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_weights_cut_short_are_refused(saved, kept):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(saved)


def test_a_damaged_header_is_refused(saved):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(saved)


def test_missing_and_unknown_tensors_are_listed_together(saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update(extra=tensors.pop("W_embed")))
    with pytest.raises(ValueError, match=r"Missing: W_embed. Unknown: extra"):
        load(saved)


def test_a_misshapen_tensor_is_named(saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update({"final_norm.scale": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match=r"final_norm.scale the shape \[3\], and the config makes it \[12\]"):
        load(saved)


def test_ours_and_others_are_told_apart(saved, tmp_path):
    assert is_saved_model(saved)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_saved_model(tmp_path)
    assert not is_saved_model(tmp_path / "nothing")


def test_a_config_of_another_save_is_refused(saved, tmp_path):
    # Every shape agrees, so without the check this would compute the wrong thing in silence.
    save(random_model(dataclasses.replace(LLAMA, rotary_base=7.0)), tmp_path / "other")
    (saved / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="not the config"):
        load(saved)


@pytest.mark.parametrize("text", ["", '{"vocab_size": 23,', "[]"])
def test_a_config_that_is_not_one_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(saved)


def test_a_config_with_missing_and_unknown_fields_names_them(saved):
    fields = json.loads((saved / "config.json").read_text())
    fields["n_expert"] = fields.pop("d_mlp")
    (saved / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"missing \['d_mlp'\], unknown \['n_expert'\]"):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(saved)


def test_an_interrupted_write_leaves_the_old_file(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_file.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(random_model(LLAMA, seed=3), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]

"""SAELens' layout: read back as written, and computing by its own formula what ours computes."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from interp_jax.sae import TopKSAE, load_saelens, save_saelens


@pytest.fixture
def written(tmp_path):
    sae = TopKSAE.random(6, 20, 3, key=jax.random.key(0))
    sae.b_enc[...] = jax.random.normal(jax.random.key(1), (20,))
    sae.b_dec[...] = jax.random.normal(jax.random.key(2), (6,))
    return sae, save_saelens(sae, tmp_path / "sae", model_name="tiny", hook_name="resid_post", layer=2)


def test_read_back_it_is_the_same(written):
    sae, directory = written
    x = jax.random.normal(jax.random.key(3), (5, 6))
    np.testing.assert_array_equal(load_saelens(directory)(x), sae(x))
    assert sorted(path.name for path in directory.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_the_layout_is_saelens(written):
    sae, directory = written
    config = json.loads((directory / "cfg.json").read_text())
    wanted = {
        "d_in": 6,
        "d_sae": 20,
        "k": 3,
        "dtype": "float32",
        "architecture": "topk",
        "normalize_activations": "none",
    }
    assert wanted.items() <= config.items()
    assert {"sae_lens_version", "model_name", "hook_name", "layer"} <= config["metadata"].keys()
    weights = safetensors.numpy.load_file(directory / "sae_weights.safetensors")
    shapes = {name: array.shape for name, array in weights.items()}
    assert shapes == {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    # SAELens' formula, in NumPy.
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    threshold = np.sort(pre, axis=1)[:, -3:-2]
    output = np.where(pre >= threshold, np.maximum(pre, 0), 0) @ weights["W_dec"] + weights["b_dec"]
    np.testing.assert_allclose(sae(jax.numpy.asarray(x)), output, atol=1e-5)


def test_what_cannot_be_read_is_refused(written):
    _, directory = written
    config = json.loads((directory / "cfg.json").read_text())
    (directory / "cfg.json").write_text(json.dumps({**config, "architecture": "gated"}))
    with pytest.raises(ValueError, match="architecture is 'gated'"):
        load_saelens(directory)
    (directory / "cfg.json").write_text(json.dumps(config))
    weights = directory / "sae_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_saelens(directory)
    arrays = safetensors.numpy.load(content)
    del arrays["b_enc"]
    weights.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(ValueError, match="lacks b_enc"):
        load_saelens(directory)

"""Gemma Scope's layouts: files as SAELens reads them, and ours; pickles and damage are refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from interp_jax.sae import JumpReLUSAE, ReLUSAE, TopKSAE, load_sae, save_sae
from interp_jax.sae.gemma_scope import load_gemma_scope, save_gemma_scope, save_gemma_scope_2

THEIRS = pathlib.Path(__file__).parent / "data" / "saelens"
EXPECTED = dict(np.load(THEIRS / "expected.npz", allow_pickle=False))
X = jnp.asarray(EXPECTED["x"])
D_IN, D_SAE = 8, 32


def jumprelu(*, d_out=D_IN, has_skip=False, is_centred=False):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_enc": (D_SAE,), "b_dec": (d_out,)}
    if has_skip:
        shapes["W_skip"] = (d_out, D_IN)
    arrays = {name: jnp.asarray((0.4 * rng.normal(size=shape)).astype(np.float32)) for name, shape in shapes.items()}
    return JumpReLUSAE(**arrays, threshold=jnp.full(D_SAE, 0.3), apply_b_dec_to_input=is_centred)


@pytest.mark.parametrize("case", ["gemma_scope", "gemma_scope_2", "gemma_scope_2_transcoder"])
def test_files_compute_what_saelens_computes_by_them(case):
    sae = load_sae(THEIRS / case)
    codes = sae.encode(X)
    np.testing.assert_allclose(codes, EXPECTED[f"{case}/codes"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(sae.decode(codes) + sae.skipped(X), EXPECTED[f"{case}/output"], rtol=0, atol=1e-5)
    assert isinstance(sae, JumpReLUSAE)
    assert not sae.apply_b_dec_to_input


def test_the_formula():
    # The codes of Gemma Scope's tutorial, in NumPy.
    with np.load(THEIRS / "gemma_scope" / "params.npz") as file:
        arrays = dict(file)
    pre = np.asarray(X) @ arrays["W_enc"] + arrays["b_enc"]
    codes = (pre > arrays["threshold"]) * np.maximum(pre, 0)
    sae = load_gemma_scope(THEIRS / "gemma_scope" / "params.npz")
    np.testing.assert_allclose(sae.encode(X), codes, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sae(X), codes @ arrays["W_dec"] + arrays["b_dec"], rtol=0, atol=1e-5)


def test_ours_in_the_first_layout(tmp_path):
    sae = jumprelu(is_centred=True)
    folder = save_sae(sae, tmp_path / "sae", layout="gemma_scope")
    with np.load(folder / "params.npz", allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
    assert shapes == {"W_enc": (8, 32), "W_dec": (32, 8), "b_enc": (32,), "b_dec": (8,), "threshold": (32,)}
    again = load_sae(folder)
    np.testing.assert_allclose(again(X), sae(X), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="use the layout gemma_scope_2"):
        save_gemma_scope(jumprelu(d_out=5, has_skip=True), tmp_path)
    with pytest.raises(ValueError, match="TopKSAE cannot be written as a JumpReLU"):
        save_gemma_scope(TopKSAE.random(D_IN, D_SAE, 3, key=jax.random.key(0)), tmp_path)


@pytest.mark.parametrize(
    "shape", [{}, {"d_out": 5}, {"d_out": 5, "has_skip": True}, {"has_skip": True, "is_centred": True}]
)
def test_ours_in_the_second_layout(shape, tmp_path):
    sae = jumprelu(**shape)
    facts = {"model_name": "tiny", "hook_name": "mlp_in", "hook_name_out": "mlp_out", "layer": 3}
    folder = save_sae(sae, tmp_path, layout="gemma_scope_2", **facts)
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architecture": "jump_relu", "model_name": "tiny", "hf_hook_point_in": "mlp_in", "hf_hook_point_out": "mlp_out",
        "layer": 3, "affine_connection": "has_skip" in shape,
    }  # fmt: skip
    assert expected.items() <= config.items()
    weights = safetensors.numpy.load_file(folder / "params.safetensors")
    assert ("affine_skip_connection" in weights) == ("has_skip" in shape)
    assert weights["w_enc"].shape == (8, 32)
    if "has_skip" in shape:
        assert weights["affine_skip_connection"].shape == (8, sae.d_out)
    np.testing.assert_allclose(load_sae(folder)(X), sae(X), rtol=0, atol=1e-5)


def test_a_relu_is_a_jumprelu_of_threshold_zero(tmp_path):
    sae = ReLUSAE.random(D_IN, D_SAE, key=jax.random.key(0))
    save_gemma_scope_2(sae, tmp_path, model_name="tiny", hook_name="x")
    np.testing.assert_allclose(load_gemma_scope(tmp_path).encode(X), sae.encode(X), rtol=0, atol=1e-6)


def test_other_spellings_are_read(tmp_path):
    with np.load(THEIRS / "gemma_scope" / "params.npz") as file:
        arrays = {name.lower(): array.astype(np.float16) for name, array in file.items()}
    np.savez_compressed(tmp_path / "layer_5.npz", **arrays, scaling_factor=np.ones(32))
    sae = load_sae(tmp_path / "layer_5.npz")
    np.testing.assert_array_equal(sae.b_dec[...], arrays["b_dec"].astype(np.float32))
    shutil.copy(THEIRS / "gemma_scope_2" / "params.safetensors", tmp_path / "layer_5.safetensors")
    np.testing.assert_array_equal(load_sae(tmp_path / "layer_5.safetensors")(X), load_sae(THEIRS / "gemma_scope_2")(X))


def test_damaged_archives_are_told(tmp_path):
    path = tmp_path / "params.npz"
    content = (THEIRS / "gemma_scope" / "params.npz").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 64
    for damaged in (content[:-10], content[: len(content) // 2], content[:4], b"", bytes(flipped), b"PK" + content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"params\.npz (is cut short or altered|is no NPZ file).*again"):
            load_sae(tmp_path)
    for change, message in (
        ({"threshold": None}, r"lacks threshold\[d_sae\]"),
        ({"odd": np.zeros(3)}, r"also has odd\[3\]"),
        ({"W_dec": np.zeros((8, 32))}, r"W_dec|w_dec has shape \[8, 32\]"),
        ({"w_enc": np.zeros((8, 32))}, "twice"),
        ({"b_enc": np.zeros(32, np.int32)}, "int32; expected floating-point"),
    ):
        with np.load(THEIRS / "gemma_scope" / "params.npz") as file:
            arrays = dict(file) | change
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path)


class Touch:
    """What a pickle could do: run something when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_pickles_are_refused_and_not_run(tmp_path):
    harmed = tmp_path / "harmed"
    objects = np.empty(1, dtype=object)
    objects[0] = Touch(harmed)
    np.savez(tmp_path / "params.npz", W_enc=objects)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_sae(tmp_path)
    assert not harmed.exists()
    with open(tmp_path / "params.npz", "wb") as file:
        file.write(objects.dumps())
    with pytest.raises(ValueError, match="no NPZ file"):
        load_sae(tmp_path)
    assert not harmed.exists()


def test_what_the_second_layout_refuses(tmp_path):
    shutil.copytree(THEIRS / "gemma_scope_2", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for fields, message in (
        ({"architecture": "topk"}, "'topk' cannot be read; only 'jump_relu'"),
        ({"affine_connection": True}, r"lacks affine_skip_connection\[d_in, d_out\]"),
        ({"affine_connection": "no"}, "affine_connection is 'no'; expected bool"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path)
    (tmp_path / "config.json").unlink()
    load_sae(tmp_path)
    weights = safetensors.numpy.load_file(tmp_path / "params.safetensors")
    weights["w_dec"] = np.zeros((D_SAE, 3, D_IN), np.float32)
    (tmp_path / "params.safetensors").write_bytes(safetensors.numpy.save(weights))
    with pytest.raises(ValueError, match="cross-layer"):
        load_sae(tmp_path)
    shutil.copy(THEIRS / "gemma_scope" / "params.npz", tmp_path)
    with pytest.raises(ValueError, match=r"params\.npz and params\.safetensors"):
        load_sae(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected params\.npz"):
        load_gemma_scope(THEIRS / "standard")


def test_a_changed_byte_in_ours_is_told(tmp_path):
    save_gemma_scope_2(jumprelu(), tmp_path, model_name="tiny", hook_name="x")
    path = tmp_path / "params.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        load_sae(tmp_path)

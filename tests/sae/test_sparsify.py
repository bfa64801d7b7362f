"""sparsify's layout: its own files give its codes and outputs, ours give ours in it."""

import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from interp_jax.sae import ReLUSAE, TopKSAE, load_sae, save_sae
from interp_jax.sae.sparsify import load_sparsify, save_sparsify

pytestmark = pytest.mark.caches  # files are compared: tracing every small operation anew would take a minute

HERE = pathlib.Path(__file__).parent
THEIRS = HERE / "data" / "sparsify"
EXPECTED = dict(np.load(THEIRS / "expected.npz", allow_pickle=False))
CASES = sorted(path.name for path in THEIRS.iterdir() if path.is_dir())
PEER = HERE.parents[1] / ".venv-sparsify" / "bin" / "python"
X = jnp.asarray(EXPECTED["x"])
D_IN, D_SAE, K = 8, 32, 4
SHAPES = {  # whether b_dec is subtracted from the input, whether there is a skip
    "autoencoder": (True, False),
    "transcoder": (False, False),
    "skip_transcoder": (False, True),
    "centred_skip": (True, True),
}


def topk(shape="autoencoder"):
    is_centred, has_skip = SHAPES[shape]
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    if has_skip:
        shapes["W_skip"] = (D_IN, D_IN)
    arrays = {name: jnp.asarray((0.4 * rng.normal(size=shape)).astype(np.float32)) for name, shape in shapes.items()}
    return TopKSAE(**arrays, k=K, apply_b_dec_to_input=is_centred)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("case", CASES)
def test_sparsify_own_files_compute_what_sparsify_computes(case):
    sae = load_sae(THEIRS / case)
    codes = sae.encode(X)
    np.testing.assert_allclose(codes, EXPECTED[f"{case}/codes"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(sae.decode(codes) + sae.skipped(X), EXPECTED[f"{case}/output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_read_back(shape, tmp_path):
    sae = topk(shape)
    folder = save_sae(sae, tmp_path / "layers.2", layout="sparsify")
    assert_same(load_sae(folder), sae)
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    weights = safetensors.numpy.load_file(folder / "sae.safetensors")
    assert weights["encoder.weight"].shape == (D_SAE, D_IN)
    assert ("W_skip" in weights) == ("skip" in shape)


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason=f"sparsify is not installed in {PEER.parents[1]}")
@pytest.mark.parametrize("peer", [PEER], ids=["sparsify 1.3.3"])
def test_sparsify_computes_ours(peer, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.asarray(X))
    saes = {shape: topk(shape) for shape in SHAPES}
    for shape, sae in saes.items():
        save_sparsify(sae, tmp_path / shape)
    script = HERE / "peers_reference.py"
    subprocess.run([peer, script, "check", "sparsify", tmp_path], check=True)
    computed = np.load(tmp_path / "computed.npz", allow_pickle=False)
    for shape, sae in saes.items():
        np.testing.assert_allclose(computed[f"{shape}/codes"], sae.encode(X), rtol=0, atol=1e-5, err_msg=shape)
        np.testing.assert_allclose(computed[f"{shape}/output"], sae(X), rtol=0, atol=1e-5, err_msg=shape)
        assert_same(load_sparsify(tmp_path / shape / "again"), sae)


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="this is a ReLUSAE"):
        save_sparsify(ReLUSAE.random(D_IN, D_SAE, key=jax.random.key(0)), tmp_path)
    with pytest.raises(ValueError, match="d_in = 8 and d_out = 5"):
        save_sparsify(TopKSAE.random(D_IN, D_SAE, K, key=jax.random.key(0), d_out=5), tmp_path)
    with pytest.raises(TypeError):
        save_sae(topk(), tmp_path, layout="sparsify", model_name="has no place")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; only an unsigned 'topk'"),
        ({"signed": True}, "signed"),
        ({"num_latents": 31}, r"encoder.weight has shape \[32, 8\], not \[d_sae = 31, d_in = 8\]"),
        ({"d_in": None}, "has no d_in"),
        ({"k": 64}, "k is 64"),
        ({"skip_connection": True}, r"lacks W_skip\[d_in, d_in\]"),
        ({"transcode": "yes"}, "transcode is 'yes'; expected bool"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(fields, message, tmp_path):
    shutil.copytree(THEIRS / "topk", tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message) as refusal:
        load_sparsify(tmp_path / "sae")
    assert str(tmp_path / "sae") in str(refusal.value)


def test_an_older_config_has_fewer_fields(tmp_path):
    shutil.copytree(THEIRS / "topk", tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({"d_in": D_IN, "expansion_factor": 4, "k": K}))
    assert_same(load_sparsify(tmp_path / "sae"), load_sparsify(THEIRS / "topk"))


def test_damaged_files_are_told(tmp_path):
    save_sparsify(topk(), tmp_path)
    path = tmp_path / "sae.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"sae\.safetensors is cut short or altered"):
        load_sae(tmp_path)
    flipped = bytearray(content)
    flipped[-5] ^= 64
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="SHA-256"):
        load_sae(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors is not there"):
        load_sparsify(tmp_path)

"""SAELens' layout: its own files of every form give its codes and outputs, ours give ours in it; damage is told."""

import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from interp_jax.sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
    load_sae,
    load_saelens,
    save_sae,
    save_saelens,
    weights_files,
)
from interp_jax.whole_file import write_whole

pytestmark = pytest.mark.caches  # files are compared: tracing every small operation anew would take a minute

HERE = pathlib.Path(__file__).parent
THEIRS = HERE / "data" / "saelens"
EXPECTED = dict(np.load(THEIRS / "expected.npz", allow_pickle=False))
CASES = sorted(path.name for path in THEIRS.iterdir() if path.is_dir() and (path / "cfg.json").exists())
PEER = HERE.parents[1] / ".venv-saelens" / "bin" / "python"

D_IN, D_SAE, D_OUT, K = 8, 32, 6, 4
X = jnp.asarray(EXPECTED["x"])
KINDS = {
    "relu": (ReLUSAE, ("b_enc",), {}),
    "gated": (GatedSAE, ("b_gate", "b_mag", "r_mag"), {}),
    "topk": (TopKSAE, ("b_enc",), {"k": K}),
    "batch_topk": (BatchTopKSAE, ("b_enc", "threshold"), {"k": K}),
    "matryoshka": (MatryoshkaSAE, ("b_enc", "threshold"), {"k": K, "widths": (4, 12, 32)}),
    "jumprelu": (JumpReLUSAE, ("b_enc", "threshold"), {"bandwidth": 0.25}),
    "jumprelu_log": (JumpReLUSAE, ("b_enc", "threshold"), {"bandwidth": 0.25, "parameter": "log_threshold"}),
}
SHAPES = {  # width of the output, whether there is a skip, whether b_dec is subtracted from the input
    "autoencoder": (D_IN, False, True),
    "uncentred": (D_IN, False, False),
    "transcoder": (D_OUT, False, False),
    "skip": (D_OUT, True, False),
    "centred_skip": (D_IN, True, True),
}
OURS = [(kind, shape) for kind in KINDS for shape in SHAPES if kind != "topk" or shape in ("autoencoder", "uncentred")]
"""All that SAELens has a name for."""


def sae_of(kind, shape="autoencoder", seed=0):
    """Random in every parameter, some of each row's codes zero."""
    cls, vectors, options = KINDS[kind]
    d_out, has_skip, is_centred = SHAPES[shape]
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_dec": (d_out,), **dict.fromkeys(vectors, (D_SAE,))}
    if has_skip:
        shapes["W_skip"] = (d_out, D_IN)
    arrays = {name: (0.4 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    if "threshold" in arrays:
        arrays["threshold"] = np.abs(arrays["threshold"])
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    return cls(**arrays, **options, apply_b_dec_to_input=is_centred)


def codes_and_output(sae):
    codes = sae.encode(X)
    return codes, sae.decode(codes) + sae.skipped(X)


def assert_computes(sae, expected_codes, expected_output):
    codes, output = codes_and_output(sae)
    np.testing.assert_allclose(codes, expected_codes, rtol=0, atol=1e-5)
    np.testing.assert_allclose(output, expected_output, rtol=0, atol=1e-5)


def metadata(shape):
    return {"hook_name_out": "mlp_out"} if shape == "uncentred" else {}


@pytest.mark.parametrize("case", CASES)
def test_saelens_own_files_compute_what_saelens_computes(case):
    sae = load_sae(THEIRS / case)
    assert_computes(sae, EXPECTED[f"{case}/codes"], EXPECTED[f"{case}/output"])
    assert {leaf.dtype for leaf in jax.tree.leaves(sae)} == {jnp.dtype("float32")}


def test_kinds_and_options_come_back():
    assert isinstance(load_saelens(THEIRS / "batchtopk_trained"), JumpReLUSAE)
    matryoshka = load_saelens(THEIRS / "matryoshka_checkpoint")
    assert isinstance(matryoshka, MatryoshkaSAE)
    assert (matryoshka.k, matryoshka.widths) == (4, (8, 32))
    jumprelu = load_saelens(THEIRS / "jumprelu_checkpoint")
    assert isinstance(jumprelu, JumpReLUSAE)
    assert jumprelu.bandwidth == 0.25


# A Matryoshka is written as a BatchTopK is.
@pytest.mark.parametrize(("kind", "shape"), [case for case in OURS if case[0] != "matryoshka"])
def test_ours_read_back(kind, shape, tmp_path):
    sae = sae_of(kind, shape)
    facts = {"model_name": "tiny", "hook_name": "resid_post"} | metadata(shape)
    again = load_sae(save_sae(sae, tmp_path / "sae", **facts))
    assert_computes(again, *codes_and_output(sae))
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    if shape == "autoencoder" and kind in ("relu", "topk", "gated", "jumprelu"):
        assert jax.tree.structure(again) == jax.tree.structure(sae)
        jax.tree.map(np.testing.assert_array_equal, again, sae)


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason=f"SAELens is not installed in {PEER.parents[1]}")
@pytest.mark.parametrize("peer", [PEER], ids=["SAELens 6.54.12"])
def test_saelens_computes_ours(peer, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.asarray(X))
    saes = {f"{kind}-{shape}": sae_of(kind, shape) for kind, shape in OURS}
    for name, sae in saes.items():
        shape = name.split("-")[1]
        save_saelens(sae, tmp_path / name, model_name="tiny", hook_name="blocks.2.hook_resid_post", **metadata(shape))
    for name in ("jumprelu-autoencoder", "relu-autoencoder", "gated-autoencoder"):
        save_sae(saes[name], tmp_path / f"{name}-gemma_scope", layout="gemma_scope")
    # SAELens takes Gemma Scope's to be as wide as the input, in what it reads from the folder's name.
    for name in ("jumprelu-autoencoder", "jumprelu-centred_skip"):
        place = tmp_path / f"{name}-gemma_scope_2"
        save_sae(saes[name], place, layout="gemma_scope_2", model_name="gemma-v3-270m-pt", hook_name="layer")
    script = HERE / "peers_reference.py"
    subprocess.run([peer, script, "check", "saelens", tmp_path], check=True)
    computed = np.load(tmp_path / "computed.npz", allow_pickle=False)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(names) == len(OURS) + 5
    for name in names:
        codes, output = codes_and_output(saes["-".join(name.split("-")[:2])])
        np.testing.assert_allclose(computed[f"{name}/codes"], codes, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(computed[f"{name}/output"], output, rtol=0, atol=1e-5, err_msg=name)
        if (tmp_path / name / "again").exists():
            assert_computes(load_saelens(tmp_path / name / "again"), codes, output)


def test_the_layout_is_saelens(tmp_path):
    sae = sae_of("topk")
    save_saelens(sae, tmp_path, model_name="tiny", hook_name="resid_post", layer=2, sae_lens_version="5.0.0")
    config = json.loads((tmp_path / "cfg.json").read_text())
    expected = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "architecture": "topk",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    assert expected.items() <= config.items()
    facts = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": "resid_post", "layer": 2}
    assert config["metadata"] == facts
    weights = safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors")
    shapes = {name: array.shape for name, array in weights.items()}
    assert shapes == {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}


@pytest.mark.parametrize(
    ("kind", "shape", "architecture", "tensors"),
    [
        ("relu", "autoencoder", "standard", {"b_enc"}),
        ("gated", "autoencoder", "gated", {"b_gate", "b_mag", "r_mag"}),
        ("batch_topk", "autoencoder", "jumprelu", {"b_enc", "threshold"}),
        ("matryoshka", "autoencoder", "jumprelu", {"b_enc", "threshold"}),
        ("jumprelu_log", "autoencoder", "jumprelu", {"b_enc", "threshold"}),
        ("relu", "transcoder", "transcoder", {"b_enc"}),
        ("relu", "skip", "skip_transcoder", {"b_enc", "W_skip"}),
        ("batch_topk", "transcoder", "jumprelu_transcoder", {"b_enc", "threshold"}),
        ("gated", "skip", "jumprelu_skip_transcoder", {"b_enc", "threshold", "W_skip"}),
    ],
)
def test_architectures_and_tensors(kind, shape, architecture, tensors, tmp_path):
    save_saelens(sae_of(kind, shape), tmp_path, model_name="tiny", hook_name="resid_post")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == architecture
    assert ("d_out" in config) == ("transcoder" in architecture)
    weights = safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors")
    assert set(weights) == {"W_enc", "W_dec", "b_dec"} | tensors
    if kind == "matryoshka":
        assert config["metadata"]["training_architecture"] == "matryoshka_batchtopk"
        assert config["metadata"]["training_architecture_details"] == {"k": K, "matryoshka_widths": [4, 12, 32]}


def test_half_precision_is_kept_on_disk_and_widened_on_reading(tmp_path):
    sae = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sae_of("relu"))
    save_saelens(sae, tmp_path, model_name="tiny", hook_name="resid_post")
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "bfloat16"
    with safetensors.safe_open(tmp_path / "sae_weights.safetensors", framework="numpy") as file:
        assert file.get_tensor("W_dec").dtype == ml_dtypes.bfloat16
    again = load_saelens(tmp_path)
    assert again.W_dec.dtype == jnp.float32
    np.testing.assert_array_equal(again.W_dec[...], sae.W_dec[...].astype(jnp.float32))


def test_what_saelens_has_no_name_for_is_refused(tmp_path):
    for shape in ("transcoder", "skip"):
        with pytest.raises(ValueError, match=r"no transcoder with TopK codes.*sparsify"):
            save_saelens(sae_of("topk", shape), tmp_path / "sae", model_name="tiny", hook_name="x")
    with pytest.raises(TypeError):
        save_saelens(sae_of("topk"), tmp_path / "sae", model_name="tiny", hook_name="x", odd=object())
    assert not (tmp_path / "sae").exists()


def changed(source, folder, *, remove=(), **fields):
    """A copy of one of SAELens' folders with another config."""
    shutil.copytree(THEIRS / source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "cfg.json").read_text())
    config = {name: value for name, value in (config | fields).items() if name not in remove}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("standard", {"architecture": "temporal"}, r"'temporal' cannot be read; those that can are standard, gated"),
        ("standard", {"architecture": "gated"}, r"lacks b_gate\[d_sae\], .*also has b_enc\[32\]"),
        ("standard", {"d_sae": 31}, r"W_enc has shape \[8, 32\], not \[d_in = 8, d_sae = 31\]"),
        ("standard", {"d_in": "8"}, "d_in is '8'; expected int"),
        (
            "standard",
            {"normalize_activations": "layer_norm"},
            r"'layer_norm', which cannot be folded.*set it to 'none'",
        ),
        ("standard", {"normalize_activations": "constant_norm_rescale"}, "cannot be folded"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, r"cfg.json.*norm_scaling_factor"),
        (
            "standard",
            {"normalize_activations": "covariance_whitening"},
            r"activation_whitening.safetensors is not there",
        ),
        ("transcoder", {"normalize_activations": "expected_average_only_in"}, "in a transcoder"),
        ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input is true"),
        ("standard", {"reshape_activations": "other"}, "reshape_activations is 'other'"),
        ("standard", {"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1; expected bool"),
        ("topk", {"k": 33}, r"k is 33; expected 1 to d_sae = 32"),
        ("topk", {"k": "4"}, "k is '4'; expected int"),
        ("topk", {"k": True}, "k is True; expected int"),
        ("topk", {"k": None}, "has no k; expected int"),
        ("batchtopk_checkpoint", {"k": 4.5}, "k is 4.5; expected int"),
        ("matryoshka_checkpoint", {"matryoshka_widths": [8, 4]}, r"widths are \(8, 4, 32\)"),
        ("standard", {"metadata": []}, "metadata is"),
        ("standard", {"metadata": {"sae_lens_version": "new"}}, "sae_lens_version is 'new'"),
        ("before_6_bare", {"activation_fn_str": "tanh-relu"}, "'tanh-relu' cannot be read"),
        ("before_6_topk", {"activation_fn_kwargs": {}}, "has no k"),
        ("before_6_bare", {"normalize_activations": True}, "norm_scaling_factor"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(source, fields, message, tmp_path):
    folder = changed(source, tmp_path / "sae", **fields)
    with pytest.raises(ValueError, match=message) as refusal:
        load_saelens(folder)
    assert str(folder) in str(refusal.value)


def test_a_known_scale_is_folded(tmp_path):
    name = "gated_expected_average_only_in"
    shutil.copytree(THEIRS / name, tmp_path / "sae")
    (tmp_path / "sae" / "activation_scaler.json").unlink()
    sae = load_saelens(tmp_path / "sae", norm_scaling_factor=1.7)
    assert_computes(sae, EXPECTED[f"{name}/codes"], EXPECTED[f"{name}/output"])
    with pytest.raises(ValueError, match="scaled by -1"):
        load_saelens(tmp_path / "sae", norm_scaling_factor=-1.0)
    with pytest.raises(ValueError, match="would scale twice"):
        load_saelens(THEIRS / "gated", norm_scaling_factor=1.7)


def test_a_finetuning_scale_multiplies_the_codes_that_are_decoded(tmp_path):
    folder = changed("before_6_standard", tmp_path / "sae", finetuning_scaling_factor=True)
    weights = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    scales = np.linspace(0.5, 2, D_SAE, dtype=np.float32)
    weights["scaling_factor"] = scales
    (folder / "sae_weights.safetensors").write_bytes(safetensors.numpy.save(weights))
    codes = EXPECTED["before_6_standard/codes"]
    assert_computes(load_saelens(folder), codes, (codes * scales) @ weights["W_dec"] + weights["b_dec"])
    changed("before_6_standard", tmp_path / "other")
    shutil.copy(folder / "sae_weights.safetensors", tmp_path / "other")
    with pytest.raises(ValueError, match=r"not all ones.*Set it to true"):
        load_saelens(tmp_path / "other")


def test_a_zero_row_of_a_rescaled_dictionary_stays_finite(tmp_path):
    shutil.copytree(THEIRS / "topk_rescaled", tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    weights = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    weights["W_dec"][5] = 0
    path.write_bytes(safetensors.numpy.save(weights))
    assert np.all(np.isfinite(load_saelens(tmp_path / "sae")(X)))


def test_damaged_files_are_told(tmp_path):
    save_saelens(sae_of("topk"), tmp_path, model_name="tiny", hook_name="resid_post")
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    content, text = weights.read_bytes(), config.read_text()
    flipped = bytearray(content)
    flipped[-5] ^= 64
    for damaged, message in (
        (content[:-10], "not a whole safetensors file"),
        (content[:40], "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
        (bytes(flipped), "SHA-256"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as refusal:
            load_saelens(tmp_path)
        assert str(weights) in str(refusal.value)
    arrays = safetensors.numpy.load(content)
    for change, message in (
        ({"b_enc": None}, r"lacks b_enc\[d_sae\]"),
        ({"odd": np.zeros(3, np.float32)}, r"also has odd\[3\]"),
        ({"W_dec": np.zeros((D_IN, D_SAE), np.float32)}, r"W_dec has shape \[8, 32\], not \[d_sae = 32, d_in = 8\]"),
        ({"b_enc": np.zeros(D_SAE, np.int8)}, "b_enc is of int8; expected floating-point"),
        ({"b_enc": np.full(D_SAE, np.nan, np.float32)}, "SHA-256"),
    ):
        kept = {name: array for name, array in (arrays | change).items() if array is not None}
        weights.write_bytes(safetensors.numpy.save(kept))
        with pytest.raises(ValueError, match=message):
            load_saelens(tmp_path)
    weights.write_bytes(content)
    for damaged in (text[:50], "", "[1]", "\x00", "[" * 100_000):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"cfg\.json"):
            load_saelens(tmp_path)
    # Weights of one save beside the config of another.
    config.write_text(text)
    save_saelens(sae_of("topk", seed=5), tmp_path / "other", model_name="tiny", hook_name="resid_post")
    shutil.copy(tmp_path / "other" / "sae_weights.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"of another save.*remove weights_sha256"):
        load_saelens(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"sae_weights\.safetensors is not there"):
        load_saelens(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is not there"):
        load_saelens(tmp_path / "nowhere")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    shutil.copytree(THEIRS / "standard", tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    weights = safetensors.numpy.load_file(path)
    for name, value in (("W_dec", np.nan), ("b_enc", 1e300)):
        array = weights[name].astype(np.float64)
        array.flat[3] = value
        path.write_bytes(safetensors.numpy.save(weights | {name: array}))
        with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite"):
            load_saelens(tmp_path / "sae")


def test_a_save_that_is_interrupted_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    def interrupted(path, content):
        if path.name == "cfg.json":
            raise KeyboardInterrupt
        return write_whole(path, content)

    monkeypatch.setattr(weights_files, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_saelens(sae_of("topk"), tmp_path, model_name="tiny", hook_name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["sae_weights.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is not there"):
        load_sae(tmp_path)
    # Over an older one: its config does not fit the new weights.
    monkeypatch.undo()
    save_saelens(sae_of("topk"), tmp_path, model_name="tiny", hook_name="x")
    monkeypatch.setattr(weights_files, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_saelens(sae_of("topk", seed=1), tmp_path, model_name="tiny", hook_name="x")
    with pytest.raises(ValueError, match="of another save"):
        load_sae(tmp_path)


def test_a_folder_of_no_known_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there"):
        load_sae(tmp_path / "nowhere")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=r"holds pickle\.pt; expected sae_weights\.safetensors \(saelens\)"):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match="Pickled weights are never read"):
        load_sae(tmp_path / "pickle.pt")
    shutil.copytree(THEIRS / "standard", tmp_path / "inside")
    with pytest.raises(FileNotFoundError, match=r"Autoencoders are in .*inside"):
        load_sae(tmp_path)
    by_file = load_sae(tmp_path / "inside" / "sae_weights.safetensors")
    np.testing.assert_array_equal(by_file(X), load_sae(tmp_path / "inside")(X))
    shutil.copy(tmp_path / "inside" / "sae_weights.safetensors", tmp_path / "inside" / "sae.safetensors")
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors and sae\.safetensors"):
        load_sae(tmp_path / "inside")
    # The tests' run-time type checks come before the library's own.
    with pytest.raises((ValueError, TypeError), match="other"):
        save_sae(sae_of("topk"), tmp_path / "sae", layout="other")

"""`interp-jax sae`: from text to a judged autoencoder, swept, evaluated and converted, on the tiny model."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import interp_jax as ij
from interp_jax.activations import model_and_rows
from interp_jax.activations.wikipedia import articles
from interp_jax.sae import JumpReLUSAE, ReLUSAE, TopKSAE, load_sae, save_sae
from interp_jax.sae_command import TrainOptions, from_file, main

pytestmark = [pytest.mark.demo, pytest.mark.caches]

SMALL = ["--model", "tiny", "--d-sae", "64", "--n-tokens", "2048", "--n-held-out", "1024", "--context", "64",
         "--batch-size", "128", "--n-steps", "12", "--log-every", "4", "--checkpoint-every", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few articles, one a line."""
    path = tmp_path_factory.mktemp("text") / "articles.jsonl"
    path.write_text("".join(json.dumps({"text": article.text}) + "\n" for article in articles()[:8]))
    return str(path)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "run"
    main(["train", *SMALL, "--k", "5", "--text", text, "--out", str(out)])
    return out


def test_a_run_leaves_an_autoencoder_that_can_be_loaded_with_its_options_and_numbers(run, text):
    sae = load_sae(run / "sae")
    assert isinstance(sae, TopKSAE)
    assert (sae.d_in, sae.d_sae, sae.k) == (128, 64, 5)
    options = json.loads((run / "run.json").read_text())
    assert options["layer"] == 2
    assert options["text"] == text
    assert options["d_in"] == 128
    found = json.loads((run / "evaluation.json").read_text())
    assert 0 < found["l0"] <= 5
    assert found["clean"] < found["spliced"] < found["zero_ablated"]
    config = json.loads((run / "sae" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "resid_post.2"
    lines = [json.loads(line) for line in (run / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]


@pytest.mark.slow
def test_the_resolved_options_are_a_config_for_the_same_run(run, tmp_path):
    again = tmp_path / "again"
    main(["train", "--config", str(run / "run.json"), "--out", str(again)])
    first, second = load_sae(run / "sae"), load_sae(again / "sae")
    np.testing.assert_array_equal(first.W_dec[...], second.W_dec[...])
    assert json.loads((again / "run.json").read_text())["out"] == str(again), "an option goes before the file"


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(run, text, tmp_path):
    """Killed while the store is written, before the first checkpoint, and twice between or in checkpoints."""
    out = tmp_path / "cut"
    options = [*SMALL, "--k", "5", "--text", text, "--checkpoint-every", "1"]
    command = [sys.executable, "-m", "interp_jax.cli", "sae", "train", *options, "--out", str(out), "--resume"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    for seen in ("activations/*", "training/metrics.jsonl", "training/step_00000002", "training/step_00000006"):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(out.glob(seen)):
            assert child.poll() is None, f"it ended before {seen} was there"
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    np.testing.assert_array_equal(load_sae(out / "sae").W_dec[...], load_sae(run / "sae").W_dec[...])
    assert (out / "training" / "metrics.jsonl").read_text() == (run / "training" / "metrics.jsonl").read_text()


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_on_a_mesh_train_as_one_does(run, text, tmp_path):
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    out = tmp_path / "together"
    command = [sys.executable, "-m", "interp_jax.cli", "sae", "train", *SMALL, "--k", "5", "--text", text, "--out",
               str(out), "--mesh", "data=2,latent=2", "--log-to", "tensorboard", "--distributed", "--coordinator",
               f"localhost:{port}", "--n-processes", "2", "--process-id"]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [*command, process], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for process in "01"
    ]
    found = [one.communicate(timeout=400) for one in running]
    assert [one.returncode for one in running] == [0, 0], found
    said = f"The autoencoder is in {out / 'sae'}."
    assert [said in printed for printed, _ in found] == [True, False]  # JAX's own collectives print in both
    assert ["Training" in errors for _, errors in found] == [True, False]
    for ours, theirs in zip(metrics_of(out), metrics_of(run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(load_sae(out / "sae").W_dec[...], load_sae(run / "sae").W_dec[...], atol=1e-4)
    assert json.loads((out / "run.json").read_text())["mesh"] == "data=2,latent=2"
    assert len(list((out / "tensorboard").glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
def test_a_sweep_trains_every_combination_on_one_store(run, text, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(
        yaml.safe_dump({"architecture": "jumprelu", "text": text, "activations": str(run / "activations")})
    )
    out = tmp_path / "sweep"
    main(["sweep", "--config", str(config), *SMALL, "--out", str(out), "--vary", "l0_coefficient=0.1,30", "--vary",
          "seed=0,1"])  # fmt: skip
    table = json.loads((out / "sweep.json").read_text())
    assert [(line["l0_coefficient"], line["seed"]) for line in table] == [(0.1, 0), (0.1, 1), (30, 0), (30, 1)]
    assert not (out / "activations").exists(), "the store that was given is used"
    saes = [load_sae(out / f"run_{number:03d}" / "sae") for number in range(4)]
    assert all(isinstance(sae, JumpReLUSAE) for sae in saes)
    assert float(jnp.mean(saes[2].thresholds())) > float(jnp.mean(saes[0].thresholds()))
    assert not (saes[0].W_dec[...] == saes[1].W_dec[...]).all()


@pytest.mark.slow
def test_evaluate_and_convert(run, text, tmp_path, capsys):
    main(["convert", str(run / "sae"), str(tmp_path / "other"), "--layout", "sparsify"])
    assert (tmp_path / "other" / "sae.safetensors").exists()
    options = ["--model", "tiny", "--text", text, "--n-held-out", "1024", "--context", "64"]
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "other"), *options, "--out", str(tmp_path / "numbers.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "numbers.json").read_text())
    trained = json.loads((run / "evaluation.json").read_text())
    for name in ("l0", "fvu", "spliced", "kurtosis"):
        assert found[name] == pytest.approx(trained[name], rel=1e-3)
        assert name in printed


def test_a_run_is_not_begun_over_another_and_a_refused_one_leaves_its_options(run, text, tmp_path):
    options = (run / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a run \(training, sae\). Go on with it by --resume"):
        main(["train", *SMALL, "--k", "5", "--text", text, "--out", str(run)])
    with pytest.raises(FileExistsError, match="holds a run"):
        main(["sweep", *SMALL, "--k", "5", "--text", text, "--out", str(run), "--vary", "seed=0,1"])
    with pytest.raises(ValueError, match="another configuration"):
        main(["train", *SMALL, "--k", "5", "--text", text, "--out", str(run), "--learning-rate", "0.5", "--resume"])
    assert (run / "run.json").read_bytes() == options


def test_converting_keeps_names_and_what_is_there(run, tmp_path):
    main(["convert", str(run / "sae"), str(tmp_path / "again")])
    for name in ("model_name", "hook_name"):
        said = [
            json.loads((each / "cfg.json").read_text())["metadata"][name] for each in (run / "sae", tmp_path / "again")
        ]
        assert said[0] == said[1] != "unknown"
    with pytest.raises(FileExistsError, match=r"holds an autoencoder, sae_weights.safetensors. Give a new folder"):
        main(["convert", str(run / "sae"), str(tmp_path / "again"), "--layout", "sparsify"])
    sae = JumpReLUSAE.random(6, 12, key=jax.random.key(0))
    save_sae(sae, tmp_path / "jumprelu", model_name="m", hook_name="h")
    main(["convert", str(tmp_path / "jumprelu"), str(tmp_path / "scope"), "--layout", "gemma_scope_2"])
    assert json.loads((tmp_path / "scope" / "config.json").read_text())["model_name"] == "m"
    np.testing.assert_array_equal(load_sae(tmp_path / "scope").W_dec[...], sae.W_dec[...])
    main(["convert", str(tmp_path / "scope"), str(tmp_path / "back")])
    about = json.loads((tmp_path / "back" / "cfg.json").read_text())["metadata"]
    assert (about["model_name"], about["hook_name"]) == ("m", "h")
    with pytest.raises(FileExistsError, match="of the layout saelens; give another folder"):
        save_sae(TopKSAE.random(6, 12, 3, key=jax.random.key(0)), tmp_path / "jumprelu", layout="sparsify")


def test_an_autoencoder_is_judged_where_it_is_from(run, text, tmp_path):
    options = ["--model", "tiny", "--text", text, "--n-held-out", "512", "--context", "64"]
    with pytest.raises(ValueError, match=r"of resid_post of layer 2, not of resid_post of layer 1. Pass --site"):
        main(["evaluate", str(run / "sae"), *options, "--layer", "1"])
    with pytest.raises(ValueError, match="expected at least 1 token"):
        main(["evaluate", str(run / "sae"), "--model", "tiny", "--n-held-out", "0"])
    transcoder = ReLUSAE.random(128, 256, key=jax.random.key(0))
    save_sae(transcoder, tmp_path, model_name="m", hook_name="mlp_in.2")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(
        json.dumps(config | {"architecture": "transcoder", "apply_b_dec_to_input": False})
    )
    with pytest.raises(ValueError, match="is a transcoder, and the command reads one site"):
        main(["evaluate", str(tmp_path), *options, "--layer", "2", "--site", "mlp_in"])


def test_options_come_from_yaml_and_toml_alike(tmp_path):
    (tmp_path / "a.yaml").write_text("d_sae: 128\narchitecture: matryoshka\nwidths: [32, 128]\nout: there\n")
    (tmp_path / "a.toml").write_text('d_sae = 128\narchitecture = "matryoshka"\nwidths = [32, 128]\nout = "there"\n')
    options = from_file(tmp_path / "a.yaml")
    assert options == from_file(tmp_path / "a.toml")
    (tmp_path / "b.yaml").write_text(
        "learning_rate: 1e-4\nnorm_cap: .inf\nl1_coefficient: 3\nlayer: null\nlog_to: [tensorboard]\n"
    )
    numbers = from_file(tmp_path / "b.yaml")
    assert numbers.log_to == ("tensorboard",)
    assert (numbers.learning_rate, numbers.norm_cap, numbers.layer) == (1e-4, float("inf"), None)
    assert type(numbers.l1_coefficient) is float
    assert options == TrainOptions(d_sae=128, architecture="matryoshka", widths=(32, 128), out=pathlib.Path("there"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "d_sea: 128", "no such options: d_sea"),
        ("a.yaml", "- 1", "holds a list; expected options by name"),
        ("a.yaml", "{", "does not parse"),
        ("a.toml", "d_sae =", "does not parse"),
        ("a.ini", "x", r"expected a \.toml"),
        ("a.yaml", "d_sae: '128'", "d_sae is '128'; expected int"),
        ("a.yaml", "architecture: topp", "architecture is 'topp'; expected 'topk' or"),
        ("a.toml", "k = true", "k is True; expected int"),
        ("a.yaml", "widths: 3", "widths is 3"),
        ("a.yaml", "learning_rate: fast", "learning_rate is 'fast'; expected float"),
    ],
)
def test_a_config_with_a_fault_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer", "9"], "tiny.* has no layer 9; its layers are 0 to 3"),
        (["--n-tokens", "9000000"], "9,000,000 were asked for"),
        (["--k", "65"], "k is 65; expected 1 to d_sae = 64"),
        (["--architecture", "relu", "--k", "7"], "k is 7, but architecture='relu'"),
    ],
)
def test_what_cannot_be_trained_is_told(text, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(["train", *SMALL, "--text", text, "--out", str(tmp_path / "run"), *more])


def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(model_and_rows, "load", lambda name: pytest.fail("the model was loaded"))
    (tmp_path / "options.yaml").write_text("d_out: 128")
    with pytest.raises(ValueError, match="reads one site"):
        main(["train", *SMALL, "--config", str(tmp_path / "options.yaml")])
    with pytest.raises(ValueError, match="k is 65"):
        main(["train", *SMALL, "--k", "65"])
    with pytest.raises(ValueError, match=r"learning_rate is -1\.0"):
        main(["sweep", *SMALL, "--vary", "learning_rate=1e-3,-1"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        main(["train", *SMALL, "--text", str(tmp_path / "empty.txt")])
    monkeypatch.setitem(sys.modules, "wandb", None)
    for more, message in (
        (["--mesh", "data=2,model=4"], "mesh is 'data=2,model=4'; expected `data=2,latent=4`"),
        (["--mesh", "latent=1024"], "data=1, latent=1024 needs 1024 devices; there are"),
        (["--distributed"], "needs --mesh"),
        (["--process-id", "1"], "of use with --distributed alone"),
        (["--mesh", "data=2", "--distributed", "--process-id", "1"], "go together: give all three, or none"),
        (["--log-to", "wandb"], r"wandb is not installed .*interp-jax\[wandb\]"),
    ):
        with pytest.raises((ValueError, ModuleNotFoundError), match=message):
            main(["train", *SMALL, *more])


def test_the_model_may_be_in_bfloat16(run, text, tmp_path, capsys):
    narrow = ["--model-dtype", "bfloat16", "--text", text]
    main(["train", *SMALL, "--k", "5", *narrow, "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model_dtype"] == "bfloat16"
    losses = [json.loads((each / "evaluation.json").read_text())["clean"] for each in (run, tmp_path / "run")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_site_that_is_not_there_and_a_store_of_another_text_are_told(run, text, tmp_path):
    with pytest.raises(ij.SiteError, match="no site 'nonsense' at layer 2; there are resid_pre, "):
        main(["train", *SMALL, "--text", text, "--out", str(tmp_path / "run"), "--site", "nonsense"])
    other = tmp_path / "other.txt"
    other.write_text("".join(article.text for article in articles()[10:14]))
    with pytest.raises(ValueError, match="of other activations: provenance"):
        main(["train", *SMALL, "--text", str(other), "--activations", str(run / "activations"), "--out",
              str(tmp_path / "run")])  # fmt: skip


def test_a_sweep_over_something_else_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="expected NAME=VALUE,VALUE with a name of learning_rate"):
        main(["sweep", *SMALL, "--text", text, "--out", str(tmp_path / "run"), "--vary", "d_sae=1,2"])
    with pytest.raises(ValueError, match="names a value twice"):
        main(["sweep", *SMALL, "--text", text, "--out", str(tmp_path / "run"), "--vary", "seed=1,2,1"])
    with pytest.raises(ValueError, match="are not all floats"):
        main(["sweep", *SMALL, "--text", text, "--out", str(tmp_path / "run"), "--vary", "learning_rate=1e-3,x"])

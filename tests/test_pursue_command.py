"""`interp-jax pursue` on the tiny model: its numbers against those of evaluation and splicing, called by hand."""

import json

import jax
import jax.numpy as jnp
import pytest

from interp_jax import cli, pursue_command
from interp_jax.activations.model_and_rows import model_and_rows
from interp_jax.activations.splice_losses import splice_losses
from interp_jax.sae import ReLUSAE, load_sae, save_sae


@pytest.fixture
def folder(tmp_path):
    sae = ReLUSAE.random(128, 96, key=jax.random.key(0)).replace(b_enc=jnp.full(96, -0.5))
    save_sae(sae, tmp_path / "sae", layout="saelens", model_name="tiny", hook_name="resid_post.2")
    return tmp_path / "sae"


@pytest.mark.slow
@pytest.mark.caches
def test_the_numbers_are_those_of_evaluation_and_splicing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [*f"interp-jax pursue {folder} --model tiny --n-held-out 1024".split(),
                                     *f"--context 64 --l0 2 6 --layer 2 --out {tmp_path / 'out'}".split()])  # fmt: skip
    cli.main()
    found = json.loads((tmp_path / "out" / "pursue.json").read_text())
    ways = [(point["dictionary"], point["way"]) for point in found["points"]]
    assert len(ways) == 1 + 2 * 3 + 2
    own, largest, gradient, orthogonal = found["points"][:4]

    model, _, _, rows = model_and_rows("tiny", 2, "wikipedia", context=64, n_tokens=0, n_held_out=1024)
    by_hand = splice_losses(model, rows, load_sae(folder), site="resid_post", layer=2, batch_size=8)
    assert found["loss_clean"] == pytest.approx(by_hand.clean, abs=1e-4)
    assert found["loss_zero_ablated"] == pytest.approx(by_hand.zero_ablated, abs=1e-3)
    assert own["loss"] == pytest.approx(by_hand.spliced, abs=1e-3)
    # At the same sparsity a code that is searched for leaves no more than the encoder's largest.
    assert orthogonal["fvu"] <= gradient["fvu"] * 1.001 <= largest["fvu"]
    assert gradient["l0"] <= 2
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('<svg class="picture"') == 2
    assert page.count('<td class="token">') == 3 * 32
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<svg xmlns=")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "recovered" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.caches
def test_what_was_measured_is_kept_when_the_command_is_interrupted(folder, tmp_path, monkeypatch, capsys):
    measured = []

    def evaluate(*args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(args)
        return pursue_evaluate(*args)

    pursue_evaluate = pursue_command.evaluate
    monkeypatch.setattr(pursue_command, "evaluate", evaluate)
    monkeypatch.setattr("sys.argv", [*f"interp-jax pursue {folder} --model tiny --n-held-out 512".split(),
                                     *["--model-dtype", "bfloat16", "--context", "64", "--l0", "2", "--layer", "2"],
                                     "--out", str(tmp_path / "out")])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    found = json.loads((tmp_path / "out" / "pursue.json").read_text())
    assert [point["way"] for point in found["points"]] == ["encoder", "encoder's largest"]
    model, _, _, rows = model_and_rows("tiny", 2, "wikipedia", context=64, n_tokens=0, n_held_out=512, dtype="bfloat16")
    by_hand = splice_losses(model, rows, load_sae(folder), site="resid_post", layer=2, batch_size=8)
    assert found["loss_clean"] == pytest.approx(by_hand.clean, abs=1e-4)
    assert ": encoder's largest" in capsys.readouterr().out


def test_what_cannot_be_pursued_is_told_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pursue_command, "model_and_rows", lambda *_, **__: pytest.fail("the model was loaded"))
    options = {
        "model_dtype": "float32",
        "layer": None,
        "site": "resid_post",
        "text": "wikipedia",
        "n_held_out": 64,
        "context": 32,
        "out": tmp_path,
    }
    with pytest.raises(ValueError, match="one autoencoder or more"):
        pursue_command.run([], model_name="tiny", l0s=(4,), **options)
    with pytest.raises(ValueError, match="--n-held-out 0 leaves nothing to judge by"):
        pursue_command.run([folder], model_name="tiny", l0s=(4,), **options | {"n_held_out": 0})
    with pytest.raises(ValueError, match="--l0 4 0: expected numbers of latents"):
        pursue_command.run([folder], model_name="tiny", l0s=(4, 0), **options)
    with pytest.raises(ValueError, match="has 96 latents, fewer than the l0 of 97"):
        pursue_command.run([folder], model_name="tiny", l0s=(4, 97), **options)
    transcoder = ReLUSAE.random(128, 96, key=jax.random.key(0), d_out=32)
    save_sae(transcoder, tmp_path / "transcoder", layout="saelens", model_name="tiny", hook_name="mlp")
    with pytest.raises(ValueError, match="Pursue its targets"):
        pursue_command.run([tmp_path / "transcoder"], model_name="tiny", l0s=(4,), **options)
    assert not (tmp_path / "index.html").exists()

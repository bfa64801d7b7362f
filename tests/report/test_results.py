import dataclasses
import json

import numpy as np

from interp_jax.report import write_results


def test_holds_every_number_of_the_report(report, tmp_path):
    data = json.loads(write_results(tmp_path / "results.json", report).read_text(encoding="utf-8"))
    assert data["setting"]["n_tokens_streamed"] == 262144
    assert [score["l0"] for score in data["scores"]] == [32.0, 31.9]
    assert data["training_curve"]["values"] == list(report.training_curve.values)
    assert data["latents"][3]["snippets"][0]["activations"] == list(report.latents[3].snippets[0].activations)
    assert len(data["sites"]) == len(report.sites)


def test_is_strict_json_whatever_the_numbers_are(report, tmp_path):
    score = dataclasses.replace(report.scores[0], fvu=float("nan"), l0=np.float64(3.5), dead_share=None)
    text = write_results(tmp_path / "r.json", dataclasses.replace(report, scores=(score,))).read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(constant)

    (found,) = json.loads(text, parse_constant=refuse)["scores"]
    assert (found["fvu"], found["l0"], found["dead_share"]) == (None, 3.5, None)

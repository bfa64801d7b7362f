"""The page of `interp-jax attribute`, and its pictures: what is text stays text, and colours say what numbers say."""

import dataclasses
import io

import matplotlib.image
import numpy as np

from interp_jax.report.attribution_page import attribution_page
from interp_jax.report.heat_map import HeatMap, heat_map_picture

VALUES = np.array([[0.0, -4.0, 2.0], [0.01, 1.0, -0.5]])


def heat_map(values=VALUES, columns=("<b>The", "$x_1$", "·city → ·war")):
    layers = tuple(str(layer) for layer in range(len(values)))
    return HeatMap("Effect of resid_post <em>", values, layers, tuple(columns), "position")


def test_all_text_is_escaped_and_nothing_is_asked_for():
    setting = {
        "model": "<script>", "model_dtype": "bfloat16", "method": "atp", "site": "resid_post", "question": "Each <u>.",
        "metric": "logit of '<'", "clean": 1.5, "corrupted": -0.5, "tokens": [("<a", "<a"), ("·city", "·war")],
    }  # fmt: skip
    page = attribution_page(setting=setting, ranked=[("L0 <img src=x>", -4.0)], heat_maps=[heat_map()])
    for raw in ("<script", "<b>The", "<em>", "<u>", "<img", "<a<"):
        assert raw not in page
    assert "of &lt;script&gt; in bfloat16</h1>" in page
    assert "&lt;script&gt;" in page
    assert "://" not in page
    assert page.count('class="token differs"') == 2
    assert page.count('class="up"') + page.count('class="down"') == VALUES.size
    assert 'style="--share: 100%" title="layer 0, position 1, $x_1$: -4"' in page
    assert "-4.0000" in page


def test_cells_say_what_the_numbers_are():
    (_, first), (label, second) = heat_map().cells()
    assert label == "1"
    assert [cell.percent for cell in first] == [0, 100, 50]
    assert [cell.is_positive for cell in first] == [False, False, True]
    assert [cell.text for cell in first + second] == ["", "-4.00", "2.00", "", "1.00", "-0.50"]
    wide = heat_map(np.ones((1, 40)), ["t"] * 40)
    assert {cell.text for _, row in wide.cells() for cell in row} == {""}
    assert all(cell.percent == 0 for _, row in heat_map(np.zeros((1, 3))).cells() for cell in row)


def test_what_is_not_finite_stands_out_and_spoils_no_other_cell():
    values = np.array([[1.0, np.nan], [-2.0, np.inf]])
    (_, first), (_, second) = heat_map(values, "ab").cells()
    assert [cell.percent for cell in first + second] == [50, 0, 100, 100]
    assert [cell.text for cell in first + second] == ["1.00", "nan", "-2.00", "inf"]
    assert "layer 0, position 1, b: +nan" in attribution_page_of(heat_map(values, "ab"))
    picture = matplotlib.image.imread(io.BytesIO(heat_map_picture(heat_map(values, "ab")).content))[..., :3]
    assert (np.abs(picture - 0.6).max(-1) < 0.01).mean() > 0.05  # grey, where white is zero


def attribution_page_of(shown):
    setting = {
        "model": "m", "model_dtype": "float32", "method": "atp", "site": "resid_post", "question": "", "metric": "",
        "clean": 1.5, "corrupted": -0.5, "tokens": [],
    }  # fmt: skip
    return attribution_page(setting=setting, ranked=[], heat_maps=[shown])


def test_a_title_is_no_formula():
    title = "change of the logit of '$\\\\' less that of '$', which is a long title that needs a second line at least"
    assert heat_map_picture(dataclasses.replace(heat_map(), title=title)).content[:4] == b"\x89PNG"


def test_the_picture_is_centred_at_zero():
    """With one positive column and one negative column, red and blue are there; with zeros alone, neither is."""

    def colours(values):
        picture = matplotlib.image.imread(io.BytesIO(heat_map_picture(heat_map(values)).content))
        left = picture[:, : picture.shape[1] * 7 // 10, :3].reshape(-1, 3)  # without the scale at the right
        return (left[:, 0] - left[:, 2] > 0.2).mean(), (left[:, 2] - left[:, 0] > 0.2).mean()

    red, blue = colours(np.array([[1.0, -0.6, 0.0]] * 4))
    assert red > 0.05
    assert blue > 0.05
    assert max(colours(np.zeros((4, 3)))) < 0.01

import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest

from interp_jax.report import TrainingCurve
from interp_jax.report.pictures import (
    density_histogram,
    on_white,
    score_against_l0,
    steering_frontier,
    training_curve,
)
from interp_jax.steering.frontier import FrontierPoint


def pictures(report):
    return [
        training_curve(report.training_curve),
        score_against_l0(report.scores, "loss_recovered_zero", "loss recovered"),
        score_against_l0(report.scores, "fvu", "fraction of variance unexplained"),
        density_histogram(report.densities),
    ]


def test_take_every_colour_from_the_page(report):
    for picture in pictures(report):
        assert not re.search(r"#[0-9a-fA-F]{6}|rgba?\(|\bblack\b|\bwhite\b", picture)
        assert "var(--ink)" in picture or "var(--muted)" in picture


def test_are_well_formed_and_leave_matplotlib_as_it_was(report):
    before = dict(matplotlib.rcParams)
    for picture in pictures(report):
        assert xml.etree.ElementTree.fromstring(picture).tag == "svg"
    assert dict(matplotlib.rcParams) == before


def test_points_are_named_with_their_values(report):
    texts = "".join(xml.etree.ElementTree.fromstring(pictures(report)[1]).itertext())
    assert "SAE encoder: 0.925" in texts
    assert "gradient pursuit: 0.945" in texts


def test_every_method_on_a_frontier_has_a_mark_of_its_own():
    points = [FrontierPoint(f"way {i}", 1.0, 0.5, (0.4, 0.6), 3.0 + i, (2.9, 3.1), False) for i in range(12)]
    shapes = set(re.findall(r'<path id="[^"]*-m\w+" d="([^"]*)"', steering_frontier(points)))
    assert len(shapes) == 2 * 12 + 2  # hollow and in the legend, and a tick of each axis


def test_control_characters_leave_a_picture_well_formed():
    point = FrontierPoint("a\x1b\x00b & <c>", 1.0, 0.5, (0.2, 0.8), 3.0, (2.9, 3.1), True)
    content = str(steering_frontier([point]))
    xml.etree.ElementTree.fromstring(content)
    assert "a\ufffd\ufffdb &amp; &lt;c&gt;" in content


def test_histogram_says_how_many_latents_are_dead():
    picture = density_histogram([0.0] * 3 + [0.01] * 7)
    assert "density of 7 latents; 3 of 10 are never active" in picture


@pytest.mark.parametrize("values", [(), (float("nan"),), (1.0,), (0.0, -1.0), (5.0, float("inf"), 0.001)])
def test_curves_of_any_numbers(values):
    training_curve(TrainingCurve(tuple(range(len(values))), values, "loss of $batch_1"))


def test_curve_is_drawn_where_its_values_are():
    # A straight line on linear axes: the path's points must lie on a line too.
    picture = training_curve(TrainingCurve(tuple(range(5)), tuple(1.0 + 0.1 * i for i in range(5))))
    path = next(p for p in re.findall(r'<path d="([^"]*)"[^>]*var\(--first\)', picture) if p.count("L") == 4)
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)
    assert len(points) == 5
    slopes = np.diff(points[:, 1]) / np.diff(points[:, 0])
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-4)
    assert slopes[0] < 0  # SVG's y axis points down, and the values rise


def test_a_picture_is_a_file_of_its_own_in_fixed_colours():
    text = on_white(density_histogram([0.0, 1e-3, 0.02, 0.5])).content.decode()
    root = xml.etree.ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert "#635f58" in text

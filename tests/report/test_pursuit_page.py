"""The page of `interp-jax pursue`: what is text in it stays text."""

import numpy as np

from interp_jax.report.coding_point import CodingPoint
from interp_jax.report.pursuit_page import pursuit_page, side_by_side


def test_tokens_and_names_are_escaped_and_shared_latents_marked():
    token = side_by_side("<script>alert(1)</script>", {3: 2.0, 5: 1.0}, {5: 4.0, 7: 0.5}, most=2)
    assert [(code.latent, code.is_shared) for code in token.encoder] == [(3, False), (5, True)]
    assert [(code.latent, code.is_shared) for code in token.pursuit] == [(5, True), (7, False)]
    points = [
        CodingPoint("<b>$x$", "encoder", 4.0, 0.5, 3.2, 0.9),
        CodingPoint("<b>$x$", "encoder", 8.0, 0.4, 3.1, 0.95),
    ]
    codes = np.array([[0.0, 1.0, 2.0]])
    setting = {"model": "<i>", "model_dtype": "bfloat16", "site": "resid_post", "layer": 2, "text": "t", "tokens": 1024}
    page = pursuit_page(setting=setting, clean=3.0, zero=9.0, points=points, encoded=codes, pursued=codes[:, ::-1],
                        latents=[7], first="<u>", k=4, texts=[[token]])  # fmt: skip
    assert page.count('<svg class="picture"') == 2
    for raw in ("<script", "<b>", "<i>", "<u>"):
        assert raw not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count('class="latent shared"') == 2

"""Pictures that a notebook shows: what they hold is what the numbers say, and they are files of their kind."""

import io
import xml.etree.ElementTree

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.attribution import Nodes, atp, attention_patterns, logit_lens, prompt_pair
from interp_jax.report import Picture, attention_picture, effects_picture, frontier_picture, logit_lens_picture
from interp_jax.report.heat_map import HeatMap
from interp_jax.steering import frontier


@pytest.fixture(scope="module")
def tiny():
    return ij.load("tiny")


@pytest.fixture(scope="module")
def effects(tiny):
    pair = prompt_pair(
        tiny, "The city is the capital of the", "The war is the cause of the", answer=" United", wrong=" war"
    )
    return atp(tiny, pair, [Nodes("resid_post"), Nodes("attn_heads", by=("head", "position"))])


def pixels(picture):
    image = matplotlib.image.imread(io.BytesIO(picture.content))[..., :3]
    return image[:, : image.shape[1] * 88 // 100]  # without the scale at the right


def share_of_blue(picture):
    image = pixels(picture)
    return (image[..., 2] - image[..., 0] > 0.3).mean()


def test_effects_are_drawn_with_their_own_labels(effects):
    found = HeatMap.of(effects, "resid_post")
    assert found.columns == effects.labels
    assert found.layers == ("0", "1", "2", "3")
    np.testing.assert_array_equal(found.values, [effects[layer, "resid_post"] for layer in range(4)])
    by_head = HeatMap.of(effects, "attn_heads", "head")
    assert by_head.title.endswith("by layer and head, summed over position")
    np.testing.assert_allclose(by_head.values[2], effects[2, "attn_heads"].sum(0), rtol=1e-6)
    image = pixels(effects_picture(effects, "attn_heads"))
    assert (image[..., 0] - image[..., 2] > 0.2).any()  # red is there, or blue: effects are
    with pytest.raises(ValueError, match="say which site"):
        effects_picture(effects)
    with pytest.raises(ValueError, match="mlp_out was not attributed to"):
        effects_picture(effects, "mlp_out")
    with pytest.raises(ValueError, match="not by unit"):
        effects_picture(effects, "resid_post", "unit")


def test_a_notebook_shows_the_picture_and_a_file_keeps_it(effects, tmp_path):
    picture = effects_picture(effects, "resid_post")
    shown = picture._repr_mimebundle_()
    assert shown["image/png"][:8] == b"\x89PNG\r\n\x1a\n"
    assert "bytes of PNG" in repr(picture) == shown["text/plain"]
    assert picture.save(tmp_path / "new" / "effects.png").read_bytes() == picture.content
    with pytest.raises(ValueError, match=r"call it effects\.png"):
        picture.save(tmp_path / "effects.svg")
    drawn = Picture(b"<svg/>", "svg")
    assert drawn._repr_mimebundle_()["image/svg+xml"] == "<svg/>"


def test_the_lens_is_darker_where_the_model_is_surer(tiny):
    tokens = jnp.array([tiny.encode_prompt("The city is one of the largest in the United")])
    states = tiny.tokenizer.encode(" States")[0]
    rare = tiny.tokenizer.encode(" volcano")[0]
    lenses = [logit_lens(tiny, tokens), *(logit_lens(tiny, tokens, target=target) for target in (states, rare))]
    sure, of_target, of_rare = (share_of_blue(logit_lens_picture(lens)) for lens in lenses)
    assert sure > of_target > 0.02 > 0.001 > of_rare
    with pytest.raises(IndexError, match="there is no prompt 1: the lens has 1"):
        logit_lens_picture(logit_lens(tiny, tokens), row=1)


@pytest.mark.usefixtures("without_type_checks")
def test_attention_is_a_square_a_head(tiny):
    ids = tiny.encode_prompt("The city is one of the largest")
    patterns = attention_patterns(tiny, jnp.array([ids]))
    labels = tiny.tokenizer.readable(ids)
    assert share_of_blue(attention_picture(patterns[0, 0], labels, title="layer 0")) > 0.01
    assert share_of_blue(attention_picture(np.zeros_like(patterns[0, 0]))) < 0.001
    with pytest.raises(ValueError, match=r"expected \[heads, query, key\]"):
        attention_picture(patterns[0])
    with pytest.raises(ValueError, match="2 labels"):
        attention_picture(patterns[0, 0], ["a", "b"])
    for wrong in ([5, 7], "ab"):
        with pytest.raises(ValueError, match=r"labels must be texts, one a token: model.tokenizer.readable"):
            attention_picture(np.ones((1, 2, 2)), wrong)
    for empty in (np.zeros((0, 2, 2)), np.zeros((2, 0, 0))):
        with pytest.raises(ValueError, match="patterns have shape"):
            attention_picture(empty)


def test_a_frontier_stands_alone():
    successes, losses = np.array([[False] * 4, [True] * 4]), np.array([3.0, 3.5])[:, None] + np.zeros((2, 4))
    picture = frontier_picture(frontier("a <way>", (0.0, 2.0), successes, losses))
    root = xml.etree.ElementTree.fromstring(picture.content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "a <way>" in " ".join(root.itertext())
    assert "var(--" not in picture._repr_mimebundle_()["image/svg+xml"]

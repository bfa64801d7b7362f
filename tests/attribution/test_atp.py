"""Attribution patching against patching, finite differences, and gradients taken by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import LAYERS, counting, linear_model, pair_of

import interp_jax as ij
from interp_jax.attribution.activation_patching import activation_patching
from interp_jax.attribution.atp import atp, integrated_gradients
from interp_jax.attribution.metric import LogitDifference
from interp_jax.attribution.nodes import Nodes

pytestmark = pytest.mark.caches

CLEAN, CORRUPTED = (0, 3, 1, 2), (0, 4, 1, 5)
NODES = [Nodes("resid_post"), Nodes("attn_out", by=()), Nodes("mlp_out", by=("position", "unit"), layers=(0, 2))]
ALL = [Nodes("attn_heads"), Nodes("mlp_act"), Nodes("resid_pre", layers=(1, 3)), Nodes("k", by="head")]


@pytest.mark.parametrize("attribute", [atp, integrated_gradients])
def test_on_a_linear_model_it_is_patching(attribute):
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    found, exact = attribute(model, pair, NODES), activation_patching(model, pair, NODES)
    assert list(found) == list(exact)
    for key in exact:
        np.testing.assert_allclose(found[key], exact[key], atol=2e-5)
    assert (found.clean, found.corrupted) == pytest.approx((exact.clean, exact.corrupted), abs=1e-5)


@pytest.fixture(scope="module")
def slopes(tiny, pair):
    """The metric's slope as a site's nodes move towards the corrupted prompt's values, by central differences."""
    clean, corrupted = jnp.asarray(pair.clean)[None], jnp.asarray(pair.corrupted)[None]
    names = ["attn_heads", "mlp_act", "resid_pre", "k"]

    @jax.jit
    def moved(params, masks, step):
        _, here = ij.fetch(tiny.forward, names)(params, clean)
        _, there = ij.fetch(tiny.forward, names)(params, corrupted)
        given = {key: (here[key] + step * (there[key] - here[key]), masks[key]) for key in masks}
        return LogitDifference(pair.answer, pair.wrong)(ij.inject(tiny.forward)(given, params, clean))[0]

    shapes = jax.eval_shape(lambda: ij.fetch(tiny.forward, names)(tiny.params, clean)[1])

    def slope(key, place, step=0.05):
        masks = ij.SiteValues({key: np.zeros(each.shape[1:], bool) for key, each in shapes.items()})
        masks[key][place] = True
        return float(moved(tiny.params, masks, step) - moved(tiny.params, masks, -step)) / (2 * step)

    return slope


def test_it_is_the_slope_of_patching(tiny, pair, slopes):
    effects = atp(tiny, pair, ALL)
    for key, index, place in (
        ((0, "attn_heads"), (6, 2), (6, 2)),
        ((3, "attn_heads"), (6, 0), (6, 0)),
        ((1, "resid_pre"), (1,), (1,)),
        ((3, "resid_pre"), (6,), (6,)),
        ((2, "k"), (1,), (slice(None), 1)),
        ((1, "mlp_act"), (5, 17), (5, 17)),
    ):
        assert effects[key][index] == pytest.approx(slopes(key, place), rel=0.03, abs=2e-4)


def test_it_is_difference_times_gradient(tiny, pair):
    effects = atp(tiny, pair, ALL)
    clean, corrupted = jnp.asarray(pair.clean)[None], jnp.asarray(pair.corrupted)[None]
    names = sorted({nodes.site for nodes in ALL})

    @jax.jit
    def by_hand(params):
        _, here = ij.fetch(tiny.forward, names)(params, clean)
        _, there = ij.fetch(tiny.forward, names)(params, corrupted)
        metric = LogitDifference(pair.answer, pair.wrong)
        _, gradients = ij.gradients(tiny.forward, names, objective=lambda logits: metric(logits)[0])(params, clean)
        return ij.SiteValues({key: ((there[key] - here[key]) * gradients[key])[0] for key in gradients})

    products = by_hand(tiny.params)
    for key, found in effects.items():
        held = {"attn_heads": (2,), "mlp_act": (), "resid_pre": (1,), "k": (0, 2)}[key[1]]
        expected = np.asarray(products[key]).sum(held)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_integrated_gradients_add_up_where_the_path_is_laid(tiny, pair):
    effects = integrated_gradients(tiny, pair, [Nodes("resid_pre", layers=0)], n_steps=32)
    assert effects[0, "resid_pre"].sum() == pytest.approx(effects.corrupted - effects.clean, rel=0.02)
    plain = atp(tiny, pair, Nodes("resid_pre", layers=0))[0, "resid_pre"].sum()
    assert abs(plain - (effects.corrupted - effects.clean)) > 0.1


@pytest.mark.slow
def test_integrated_gradients_are_the_mean_slope_along_the_path(tiny, pair):
    """By central differences at each of the points between the two embeddings."""
    clean, corrupted = jnp.asarray(pair.clean)[None], jnp.asarray(pair.corrupted)[None]
    names = ["embed", "attn_heads", "mlp_act"]

    @jax.jit
    def moved(params, masks, share, step):
        _, here = ij.fetch(tiny.forward, names)(params, clean)
        _, there = ij.fetch(tiny.forward, names)(params, corrupted)
        at = (None, "embed")
        embedding = {at: here[at] + share * (there[at] - here[at])}

        def between(params, tokens):
            return ij.inject(tiny.forward)(embedding, params, tokens)

        _, values = ij.fetch(between, names[1:])(params, clean)
        given = {key: (values[key] + step * (there[key] - here[key]), masks[key]) for key in masks}
        return LogitDifference(pair.answer, pair.wrong)(ij.inject(tiny.forward)({**embedding, **given}, params, clean))[
            0
        ]

    found = integrated_gradients(tiny, pair, [Nodes("attn_heads"), Nodes("mlp_act", by="position")], n_steps=2)
    shapes = jax.eval_shape(lambda: ij.fetch(tiny.forward, names[1:])(tiny.params, clean)[1])
    for key, place, node in [
        ((1, "attn_heads"), np.s_[-1, 2], (-1, 2)),
        ((2, "attn_heads"), np.s_[-2, 0], (-2, 0)),
        ((0, "mlp_act"), np.s_[-1], -1),
        ((3, "mlp_act"), np.s_[-1], -1),
    ]:
        masks = {each: np.zeros(shape.shape[1:], bool) for each, shape in shapes.items()}
        masks[key][place] = True
        runs = [[moved(tiny.params, masks, share, sign * 0.02) for sign in (1, -1)] for share in (0.25, 0.75)]
        slope = np.mean([(float(up) - float(down)) / 0.04 for up, down in runs])
        assert abs(slope) > 1e-3
        # f32 logits of about 10, a step of 0.02 to either side: rounding alone is 1e-4 of a slope.
        np.testing.assert_allclose(found[key][node], slope, rtol=0.01, atol=2e-4)


def test_compiled_once_a_shape():
    model, traces = counting(linear_model())
    for attribute in (atp, integrated_gradients):
        attribute(model, pair_of(CLEAN, CORRUPTED, 1, 4), NODES)
        before = len(traces)
        attribute(model, pair_of((5, 3, 2, 2), (5, 4, 1, 0), 2, 3), NODES)
        assert len(traces) == before


def test_bad_input_is_refused():
    model, pair = linear_model(), pair_of(CLEAN, CORRUPTED, 1, 4)
    with pytest.raises(ValueError, match="no site 'q'"):
        atp(model, pair, Nodes("q"))
    with pytest.raises(ValueError, match="does not tell them apart"):
        atp(model, pair, Nodes("resid_post"), metric=_first)
    counted, traces = counting(model)
    with pytest.raises(ValueError, match="does not tell them apart"):
        integrated_gradients(counted, pair, Nodes("resid_post"), metric=_first)
    assert len(traces) == 2  # its sites, and both prompts' metric: nothing else is compiled before
    with pytest.raises(ValueError, match="where the path is laid"):
        integrated_gradients(model, pair, Nodes("embed"))
    with pytest.raises(ValueError, match="'resid_pre' stands in 3 layers"):
        integrated_gradients(model, pair, Nodes("resid_post"), embedding="resid_pre")
    with pytest.raises(ValueError, match="at least 1"):
        integrated_gradients(model, pair, Nodes("resid_post", layers=LAYERS - 1), n_steps=0)


def _first(logits):
    return logits[:, 0, 0]

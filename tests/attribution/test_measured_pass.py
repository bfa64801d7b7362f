"""The pass that a metric needs beside the model's whole one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import pair_of
from small_models import foreign, small_model, small_tokens

from interp_jax.attribution.atp import atp
from interp_jax.attribution.atp_star import atp_star
from interp_jax.attribution.measured_pass import measured_pass
from interp_jax.attribution.metric import KL, LogitDifference, LogProbability, Loss, metric_of
from interp_jax.attribution.nodes import Nodes, resolve
from interp_jax.models import transformer

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]

TOKENS = small_tokens()
PAIR = pair_of(*np.asarray(TOKENS), 3, 11)
REFERENCE = jax.nn.log_softmax(jnp.arange(23.0))


@pytest.mark.parametrize("metric", [None, LogProbability(4, 2), KL(REFERENCE, -3), LogitDifference(1, 2, 0)])
def test_logits_are_of_the_metrics_position_alone(metric):
    model = small_model("neox", layers="stacked")
    wanted = metric_of(metric, PAIR, 23)
    run = measured_pass(model, resolve(model, Nodes("resid_post"), 7), wanted)
    logits = jax.jit(run.forward)(run.params, TOKENS)
    assert logits.shape == (2, 1, model.vocab_size)
    expected = wanted(jax.jit(model.forward)(model.params, TOKENS))
    np.testing.assert_allclose(run.metric(logits), expected, rtol=1e-5, atol=1e-5)


def test_what_needs_all_logits_has_them():
    model = small_model()
    families, loss = resolve(model, Nodes("resid_post"), 7), metric_of(Loss(TOKENS[0]), PAIR, 23)
    assert measured_pass(model, families, loss)[:3] == (transformer.apply, model.params, loss)
    ends, own = resolve(model, [Nodes("resid_post"), Nodes("final_norm")], 7), metric_of(None, PAIR, 23)
    assert measured_pass(model, ends, own)[:3] == (transformer.apply, model.params, own)
    other = foreign(model)
    assert measured_pass(other, families, own) == (other.forward, model.params, own, None)
    wrapped = dataclasses.replace(model, forward=jax.jit(transformer.apply))
    assert measured_pass(wrapped, families, own).enter is None


@pytest.mark.parametrize("method", [atp, pytest.param(atp_star, marks=pytest.mark.slow)])
def test_attribution_is_that_of_the_whole_pass(method):
    model, nodes = small_model("gemma", layers="stacked"), [Nodes("q"), Nodes("mlp_act")]
    found, whole = (method(each, PAIR, nodes) for each in (model, foreign(model)))
    np.testing.assert_allclose(found.flat, whole.flat, rtol=1e-4, atol=1e-5 * abs(whole.flat).max())
    assert (found.clean, found.corrupted) == pytest.approx((whole.clean, whole.corrupted), abs=1e-4)

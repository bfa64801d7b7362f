"""Metrics against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.attribution.metric import (
    KL,
    LogitDifference,
    LogProbability,
    Loss,
    at_one_position,
    check_varies,
    metric_of,
)
from interp_jax.attribution.prompt_pair import PromptPair

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, 11)).astype(np.float32)
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(-1, keepdims=True))


def pair(answer=None, wrong=None):
    return PromptPair(np.arange(5), np.arange(5) + 1, answer, wrong, ("a",) * 5, ("b",) * 5)


def test_metrics_are_what_their_names_say():
    logits = jnp.asarray(LOGITS)
    np.testing.assert_allclose(LogitDifference(3, 7)(logits), LOGITS[:, -1, 3] - LOGITS[:, -1, 7], rtol=1e-6)
    np.testing.assert_allclose(LogitDifference(3, 7, 1)(logits), LOGITS[:, 1, 3] - LOGITS[:, 1, 7], rtol=1e-6)
    np.testing.assert_allclose(LogProbability(2)(logits), LOG_PROBS[:, -1, 2], rtol=1e-5)
    reference = LOG_PROBS[0, -1]
    expected = (np.exp(reference) * (reference - LOG_PROBS[:, -1])).sum(-1)
    np.testing.assert_allclose(KL(jnp.asarray(reference, jnp.float32))(logits), expected, rtol=1e-4, atol=1e-6)
    tokens = np.array([4, 1, 0, 10, 2])
    losses = [-LOG_PROBS[:, place, tokens[place + 1]] for place in range(4)]
    np.testing.assert_allclose(Loss(jnp.asarray(tokens))(logits), np.mean(losses, axis=0), rtol=1e-5)


@pytest.mark.parametrize("kind", [LogitDifference(3, 7, 1), LogProbability(2), KL(LOG_PROBS[0, -1], -2)])
def test_a_metric_of_one_position_is_the_same_of_that_position_alone(kind):
    metric = metric_of(kind, pair())
    alone, position = at_one_position(metric)
    np.testing.assert_array_equal(alone(jnp.asarray(LOGITS[:, int(position)][:, None])), metric(jnp.asarray(LOGITS)))


def test_a_metric_that_may_read_more_is_not_narrowed():
    @dataclasses.dataclass(frozen=True)
    class Summed(LogitDifference):
        def __call__(self, logits):
            return logits.sum((1, 2))

    for kind in (Loss(jnp.arange(5)), Summed(3, 7), LogitDifference(3, 7, np.array([1, 2])), _largest):
        metric = kind if isinstance(kind, Summed) else metric_of(kind, pair())
        assert at_one_position(metric) is None


def _largest(logits):
    return logits[:, -1].max(-1)


@pytest.mark.caches
def test_another_answer_needs_no_other_program():
    traces = []

    @jax.jit
    def value(metric, logits):
        traces.append(None)
        return metric(logits)

    for answer in (1, 2):
        metric = metric_of(None, pair(answer, 5))
        np.testing.assert_allclose(value(metric, LOGITS), LOGITS[:, -1, answer] - LOGITS[:, -1, 5], rtol=1e-6)
    assert len(traces) == 1
    for _ in range(2):
        np.testing.assert_allclose(value(metric_of(_largest, pair()), LOGITS), LOGITS[:, -1].max(-1))
    assert len(traces) == 2


def test_a_pair_has_its_own_metric():
    assert isinstance(metric_of(None, pair(1, 2)), LogitDifference)
    assert isinstance(metric_of(None, pair(1)), LogProbability)
    with pytest.raises(ValueError, match="nothing to measure"):
        metric_of(None, pair())


def test_a_constant_metric_is_refused_and_shown():
    check_varies(1.0, 1.1)
    with pytest.raises(ValueError, match=r"1\.25 on the clean prompt and 1\.25 on the corrupted"):
        check_varies(1.25, 1.25)
    with pytest.raises(ValueError, match="must be finite"):
        check_varies(1.25, float("nan"))

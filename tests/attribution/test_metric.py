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
    metric = metric_of(kind, pair(), 11)
    alone, position = at_one_position(metric)
    np.testing.assert_array_equal(alone(jnp.asarray(LOGITS[:, int(position)][:, None])), metric(jnp.asarray(LOGITS)))


def test_a_metric_that_may_read_more_is_not_narrowed():
    @dataclasses.dataclass(frozen=True)
    class Summed(LogitDifference):
        def __call__(self, logits):
            return logits.sum((1, 2))

    several = LogitDifference(3, 7, np.array([1, 2]))
    assert at_one_position(several) is None
    for kind in (Loss(jnp.arange(5)), Summed(3, 7), _largest):
        assert at_one_position(metric_of(kind, pair(), 11)) is None


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
        metric = metric_of(None, pair(answer, 5), 11)
        np.testing.assert_allclose(value(metric, LOGITS), LOGITS[:, -1, answer] - LOGITS[:, -1, 5], rtol=1e-6)
    assert len(traces) == 1
    for _ in range(2):
        np.testing.assert_allclose(value(metric_of(_largest, pair(), 11), LOGITS), LOGITS[:, -1].max(-1))
    assert len(traces) == 2


def test_a_pair_has_its_own_metric():
    assert isinstance(metric_of(None, pair(1, 2), 11), LogitDifference)
    assert isinstance(metric_of(None, pair(1), 11), LogProbability)
    with pytest.raises(ValueError, match="nothing to measure"):
        metric_of(None, pair(), 11)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (LogitDifference(3, 11), "wrong is 11; it can be 0 to 10"),
        (LogProbability(-1), "answer is -1; it can be 0 to 10"),
        (LogProbability(3, 5), "position is 5; it can be -5 to 4"),
        (KL(LOG_PROBS[0, -1], -6), "position is -6; it can be -5 to 4"),
        (lambda logits: logits[:, -1, :3], r"gives float32\[2, 3\]; it must give .* \[2\]"),
        (lambda logits: logits[0, -1, 0], r"logits \[2, 5, 11\] of two rows the metric gives float32\[\]"),
        (lambda logits: logits[:, -1].argmax(-1), r"gives int32\[2\]; it must give one floating-point number a row"),
        (lambda logits: (logits[:, -1, 0], logits[:, -1, 1]), "gives tuple; it must give"),
    ],
)
def test_a_metric_that_reads_what_is_not_there_or_gives_no_number_a_row_is_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        metric_of(metric, pair(), 11)


def test_a_constant_metric_is_refused_and_shown():
    check_varies(1.0, 1.1)
    with pytest.raises(ValueError, match=r"1\.25 on the clean prompt and 1\.25 on the corrupted"):
        check_varies(1.25, 1.25)
    with pytest.raises(ValueError, match="must be finite"):
        check_varies(1.25, float("nan"))

"""Probes, against scikit-learn and against data whose answer is known."""

import builtins

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from interp_jax.attribution.probes import held_out_split, train_probes

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def data(n=160, d=12, places=(2, 3), signal=1.0, seed=0):
    """At place (i, j) the classes' means are i + j signals apart; at (0, 0) there is nothing to find."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) < n // 3)
    direction = rng.normal(size=d) / d**0.5
    strength = np.add.outer(np.arange(places[0]), np.arange(places[1])) * signal
    values = rng.normal(size=(*places, n, d)) + strength[..., None, None] * labels[:, None] * direction + 5.0
    return values.astype(np.float32), labels


@pytest.mark.parametrize(
    ("n", "d"), [pytest.param(160, 12, marks=pytest.mark.slow), (60, 80)]
)  # the second is separable
def test_the_solver_in_jax_agrees_with_scikit_learn(n, d):
    values, labels = data(n, d)
    ours = train_probes(values, labels, seeds=(0, 1), l2=0.3)
    theirs = train_probes(values, labels, seeds=(0, 1), l2=0.3, solver="scikit-learn")
    scale = np.abs(theirs.weights).max()
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-3 * scale)
    np.testing.assert_allclose(ours.bias, theirs.bias, atol=1e-3 * np.abs(theirs.bias).max())
    np.testing.assert_allclose(ours.accuracies, theirs.accuracies, atol=1.01 / held_out_split(labels, 0).sum())


def test_one_probe_by_scikit_learn_itself():
    values, labels = data()
    found = train_probes(values, labels, seeds=[4, 5], held_out=0.4)
    tests = held_out_split(labels, 4, 0.4)
    x = values[1, 2] - values[1, 2][~tests].mean(0)
    x = x / np.sqrt((x[~tests] ** 2).mean())
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(x[~tests], labels[~tests])
    assert found.accuracies[0, 1, 2] == pytest.approx(theirs.score(x[tests], labels[tests]))
    assert found.train_accuracies[0, 1, 2] == pytest.approx(theirs.score(x[~tests], labels[~tests]))
    scores = values[1, 2] @ found.weights[0, 1, 2] + found.bias[0, 1, 2]
    np.testing.assert_allclose(scores, theirs.decision_function(x), atol=1e-2)


def test_mean_differences():
    values, labels = data()
    found = train_probes(values, labels, kind="mean_difference", seeds=[0])
    trains = ~held_out_split(labels, 0)
    means = [values[1, 1][trains & (labels == label)].mean(0) for label in (True, False)]
    np.testing.assert_allclose(found.weights[0, 1, 1], means[0] - means[1], atol=1e-5)
    middle = (means[0] + means[1]) / 2
    assert middle @ found.weights[0, 1, 1] + found.bias[0, 1, 1] == pytest.approx(0, abs=1e-4)


def test_accuracy_and_its_errors():
    values, labels = data(n=400, signal=3.0)
    found = train_probes(values, labels, seeds=range(8))
    assert found.majority == pytest.approx(1 - labels.mean())
    assert found.accuracy[1, 2] > 0.95
    assert abs(found.accuracy[0, 0] - found.majority) < 0.08  # nothing to find
    assert (found.low <= found.accuracy).all()
    assert (found.accuracy <= found.high).all()
    np.testing.assert_allclose((found.high - found.low) / 3.92, found.standard_error, rtol=0.3, atol=2e-3)
    np.testing.assert_allclose(found.accuracies.mean(0), found.accuracy, atol=1e-6)
    assert found.table([3, 7][: len(found.accuracy)]).splitlines()[1].split()[0] == "3"
    with pytest.raises(ValueError, match="4 names of layers"):
        found.table([0, 1, 2, 3])
    lines = found.table().splitlines()
    assert f"{found.accuracy[1, 0]:.3f} ± {found.standard_error[1, 0]:.3f}" in lines[2]


def test_the_interval_covers_at_its_confidence():
    """Many data sets from one law: the accuracy that a fixed threshold has on all of them lies in 95 % of intervals."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        labels = rng.permutation(np.arange(120) < 60)
        values = (labels * 2 - 1.0)[:, None] * 0.8 + rng.normal(size=(120, 1))
        found = train_probes(values.astype(np.float32), labels, kind="mean_difference", seeds=range(4))
        covered += found.low <= 0.7881 <= found.high  # P(N(0.8, 1) > 0)
    assert covered >= 50


def test_splits_hold_out_a_share_of_both_classes_and_keep_origins_together():
    labels = np.arange(40) % 4 == 0
    one, other = held_out_split(labels, 0), held_out_split(labels, 1)
    assert (one.sum(), labels[one].sum()) == (10, 2)
    assert (one != other).any()
    np.testing.assert_array_equal(one, held_out_split(labels, 0))
    groups = np.arange(40) // 4
    chosen = held_out_split(labels, 0, 0.3, groups=groups)
    assert {len(set(chosen[groups == group])) for group in range(10)} == {1}
    assert chosen.sum() == 12


def test_rows_of_one_origin_do_not_help_across_the_split():
    """Every origin has a vector of its own and a label that it says nothing of: only memory helps."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 8)
    labels = (np.arange(30) % 2 == 0)[groups]
    values = (rng.normal(size=(30, 40))[groups] + 0.1 * rng.normal(size=(240, 40))).astype(np.float32)
    assert train_probes(values, labels).accuracy > 0.95
    found = train_probes(values, labels, groups=groups)
    assert found.accuracy < 0.7
    # 30 origins of 8 rows that share their fate are 30 draws, not 240.
    assert 0.5 < float(found.standard_error) / (0.25 / 30) ** 0.5 < 1.2


def test_bad_input_is_told(monkeypatch):
    values, labels = data()
    for message, arguments in [
        (r"tells two classes apart, 0 and 1", (values, np.arange(160))),
        (r"labels have shape \(3,\); values of shape \(2, 3, 160, 12\) have 160 rows", (values, [0, 1, 1])),
        (r"not finite", (values * np.nan, labels)),
        (r"rows of one class only are held out", (values, np.arange(160) == 0)),
    ]:
        with pytest.raises(ValueError, match=message):
            train_probes(*arguments)
    with pytest.raises(ValueError, match=r"l2=0\.0 and 5 seeds"):
        train_probes(values, labels, l2=0.0)
    with pytest.raises(ValueError, match=r"held_out=1\.5"):
        train_probes(values, labels, held_out=1.5)
    with pytest.raises(ValueError, match="2 groups for 160 rows"):
        train_probes(values, labels, groups=[1, 2])
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"interp-jax\[probes\]"):
        train_probes(values, labels, solver="scikit-learn")

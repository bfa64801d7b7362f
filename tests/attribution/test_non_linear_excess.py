"""The excess over a sum: none where there is none, the planted one where there is one, at the stated confidence."""

import numpy as np
import pytest

from interp_jax.attribution.non_linear_excess import linear_structure, non_linear_excess


def rows(n, excess, rng, noise=1.0):
    a, b = rng.random(n) < 0.4, rng.random(n) < 0.6
    values = 2.0 + 3.0 * a - 1.5 * b + excess * (a & b) + noise * rng.normal(size=n) * (1 + a)
    return values, a, b


def test_a_planted_excess_is_found_and_a_sum_has_none():
    rng = np.random.default_rng(0)
    values, a, b = rows(4000, 0.7, rng)
    of_sum, *_ = rows(1, 0.0, rng)
    assert len(of_sum) == 1
    found = non_linear_excess(np.stack([values, 2.0 * a - b + 0.0 * values], axis=1), a, b)
    assert abs(found.excess[0] - 0.7) < 4 * found.standard_error[0]
    assert found.p[0] < 1e-4
    np.testing.assert_allclose(found.excess[1], 0, atol=1e-12)
    assert found.p[1] == pytest.approx(1)


def test_it_is_the_formula_and_the_interaction_of_least_squares():
    rng = np.random.default_rng(1)
    values, a, b = rows(200, 1.0, rng)
    found = non_linear_excess(values, a, b)
    parts = [values[x & y].mean() for x in (a, ~a) for y in (b, ~b)]
    assert found.excess == pytest.approx(parts[0] - parts[1] - parts[2] + parts[3])
    design = np.stack([np.ones(200), a, b, a & b], axis=1).astype(float)
    assert found.excess == pytest.approx(np.linalg.lstsq(design, values, rcond=None)[0][3])
    assert found.t == pytest.approx(found.excess / found.standard_error)


def test_the_interval_covers_at_its_confidence():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        found = non_linear_excess(*rows(60, 0.5, rng))
        covered += found.low <= 0.5 <= found.high
    assert 0.92 < covered / 400 < 0.98


def table(rng, excess, noise=0.1):
    first, second = rng.normal(size=(8, 1, 2)), rng.normal(size=(1, 6, 2))
    is_real = np.eye(8, 6, dtype=bool)
    return 1.0 + first + second + excess * is_real[..., None] + noise * rng.normal(size=(8, 6, 2)), is_real


def test_a_sum_is_all_linear():
    values, _ = table(np.random.default_rng(0), 0.0, noise=0.0)
    found = linear_structure(values)
    np.testing.assert_allclose(found.interaction, 0, atol=1e-12)
    np.testing.assert_allclose(found.interaction_share, 0, atol=1e-12)
    np.testing.assert_allclose(found.first_share + found.second_share, 1)
    np.testing.assert_allclose(found.first.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(found.mean + found.first[:, None] + found.second, values, atol=1e-12)
    assert found.excess is None


def test_a_whole_table_is_taken_apart_by_its_means():
    values, _ = table(np.random.default_rng(1), 0.0)
    found = linear_structure(values)
    np.testing.assert_allclose(found.mean, values.mean((0, 1)))
    np.testing.assert_allclose(found.first, values.mean(1) - values.mean((0, 1)))
    np.testing.assert_allclose(found.first_share + found.second_share + found.interaction_share, 1)


def test_a_readout_that_does_not_vary_has_no_shares():
    values, _ = table(np.random.default_rng(1), 0.0)
    values = values.reshape(*values.shape[:2], -1)
    values[..., 0] = 0.1
    found = linear_structure(values)
    for shares in (found.first_share, found.second_share, found.interaction_share):
        assert shares[0] == 0
        assert (shares[1:] > 0).all()


@pytest.mark.usefixtures("without_type_checks")
def test_numbers_do_for_booleans():
    rng = np.random.default_rng(0)
    values, is_real = table(rng, 0.8)
    of_numbers = linear_structure(values, is_real.astype(int))
    np.testing.assert_array_equal(of_numbers.interaction, linear_structure(values, is_real).interaction)
    readout, a, b = rng.normal(size=40), rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    assert non_linear_excess(readout, a, b) == non_linear_excess(readout, a > 0, b > 0)


def test_what_only_real_pairs_have_is_their_excess():
    values, is_real = table(np.random.default_rng(2), 0.8)
    found = linear_structure(values, is_real)
    assert found.excess is not None
    assert (np.abs(found.excess.excess - 0.8) < 4 * found.excess.standard_error).all()
    assert (found.excess.p < 1e-3).all()
    assert (found.interaction_share < 0.05).all()


def test_without_an_excess_the_interval_covers_zero_at_its_confidence():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        excess = linear_structure(*table(rng, 0.0)).excess
        assert excess is not None
        covered.append((excess.low <= 0) & (excess.high >= 0))
    assert 0.92 < np.mean(covered) < 0.99


def test_bad_input_is_told():
    a, b = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 1], bool)
    with pytest.raises(ValueError, match="fewer: A alone 1, B alone 1, neither 1"):
        non_linear_excess(np.arange(5.0), a, b)
    with pytest.raises(ValueError, match="an interaction needs at least two of each"):
        linear_structure(np.ones((1, 5)))
    with pytest.raises(ValueError, match="stands in no pair that is not real"):
        linear_structure(np.ones((2, 3)), np.array([[1, 0, 0], [1, 0, 0]], bool))
    with pytest.raises(ValueError, match="1 real pairs"):
        linear_structure(np.ones((3, 3)), np.eye(3, dtype=bool) & (np.arange(3) == 0))
    with pytest.raises(ValueError, match="fall into groups that share no part"):
        linear_structure(np.ones((2, 2)), np.array([[0, 1], [1, 0]], bool))

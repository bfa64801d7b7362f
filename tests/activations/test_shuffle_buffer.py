"""The shuffle buffer: every row once, far from its neighbours, the same after an interruption."""

import itertools

import numpy as np
import pytest

from interp_jax.activations.shuffle_buffer import ShuffleBuffer


def source(n_batches=40, rows=25, start=0):
    """Row number i holds i."""
    for number in range(start, n_batches):
        first = number * rows
        yield np.repeat(np.arange(first, first + rows, dtype=np.float32)[:, None], 3, axis=1)


def test_every_row_comes_once_and_rows_stay_whole():
    batches = list(ShuffleBuffer(capacity=200, batch_size=16, seed=0).batches(source()))
    rows = np.concatenate(batches)
    assert all(batch.shape == (16, 3) for batch in batches)
    assert (rows == rows[:, :1]).all()
    assert len(set(rows[:, 0])) == len(rows)
    # 1000 rows make 62 batches of 16 and a rest that fills none.
    assert len(batches) == 62


def test_a_batch_seldom_holds_neighbours():
    batches = ShuffleBuffer(capacity=400, batch_size=16, seed=1).batches(source())
    neighbours = [np.sum(np.diff(np.sort(batch[:, 0])) == 1) for batch in batches]
    # Unmixed there would be 15 a batch; 16 rows drawn from 400 hold 0.6 neighbouring pairs on average.
    assert np.mean(neighbours) < 1.5


def test_the_source_is_read_only_when_half_is_gone():
    taken = []

    def watched():
        for number, batch in enumerate(source()):
            taken.append(number)
            yield batch

    batches = ShuffleBuffer(capacity=200, batch_size=20, seed=0).batches(watched())
    counts = []
    for _ in range(10):
        next(batches)
        counts.append(len(taken))
    # Full with 8 batches of 25; 200, 180, ..., 100 rows are served from; then the sixth finds fewer than half.
    assert counts[:6] == [8] * 6
    assert counts[6] > 8


@pytest.mark.parametrize("served", [1, 7, 20])
def test_with_another_s_state_it_goes_on_as_if_nothing_had_happened(served):
    whole = list(ShuffleBuffer(capacity=130, batch_size=16, seed=5).batches(source()))
    first = ShuffleBuffer(capacity=130, batch_size=16, seed=5)
    start = list(itertools.islice(first.batches(source()), served))
    second = ShuffleBuffer(capacity=130, batch_size=16, seed=99)
    second.load_state_dict(first.state_dict())
    rest = list(second.batches(source(start=second.n_taken)))
    assert len(start) + len(rest) == len(whole)
    for ours, theirs in zip(start + rest, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_seed_decides_the_order():
    def first(seed):
        return next(ShuffleBuffer(capacity=200, batch_size=16, seed=seed).batches(source()))

    np.testing.assert_array_equal(first(3), first(3))
    assert (first(3) != first(4)).any()


def test_bad_inputs():
    with pytest.raises(ValueError, match="capacity 20 with batch_size 16"):
        ShuffleBuffer(capacity=20, batch_size=16)
    with pytest.raises(ValueError, match="gave no rows"):
        next(ShuffleBuffer(capacity=40, batch_size=16).batches([]))
    with pytest.raises(ValueError, match=r"batch 1 of the source has shape \(4, 2\); expected \[n, 3\]"):
        next(ShuffleBuffer(capacity=40, batch_size=16).batches([np.zeros((4, 3)), np.zeros((4, 2))]))
    with pytest.raises(ValueError, match="from a buffer of capacity 40"):
        ShuffleBuffer(capacity=80, batch_size=16).load_state_dict(
            ShuffleBuffer(capacity=40, batch_size=16).state_dict()
        )

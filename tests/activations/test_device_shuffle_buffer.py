"""The shuffle buffer on a device: every row once, far from its neighbours, the same after an interruption."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.activations.device_shuffle_buffer import DeviceShuffleBuffer

pytestmark = pytest.mark.caches


def source(n_batches=40, rows=25, start=0):
    """Row number i holds i."""
    for number in range(start, n_batches):
        first = number * rows
        yield jnp.repeat(jnp.arange(first, first + rows, dtype=jnp.float32)[:, None], 3, axis=1)


def test_every_row_comes_once_and_rows_stay_whole():
    batches = list(DeviceShuffleBuffer(capacity=200, batch_size=16, seed=0).batches(source()))
    assert all(isinstance(batch, jax.Array) and batch.shape == (16, 3) for batch in batches)
    rows = np.concatenate(batches)
    assert (rows == rows[:, :1]).all()
    assert len(set(rows[:, 0])) == len(rows)
    # 1000 rows make 62 batches of 16 and a rest that fills none.
    assert len(batches) == 62


def test_a_batch_seldom_holds_neighbours():
    batches = DeviceShuffleBuffer(capacity=400, batch_size=16, seed=1).batches(source())
    neighbours = [np.sum(np.diff(np.sort(batch[:, 0])) == 1) for batch in map(np.asarray, batches)]
    # Unmixed there would be 15 a batch; 16 rows drawn from 400 hold 0.6 neighbouring pairs on average.
    assert np.mean(neighbours) < 1.5


def test_the_source_is_read_only_when_half_is_gone():
    buffer = DeviceShuffleBuffer(capacity=200, batch_size=20, seed=0)
    counts = [buffer.n_taken for _ in itertools.islice(buffer.batches(source()), 10)]
    # Full with 8 batches of 25; 200, 180, ..., 100 rows are served from; then the seventh finds fewer than half.
    assert counts == [8] * 6 + [12] * 4


@pytest.mark.parametrize("served", [1, 7, 20])
def test_saved_and_restored_it_goes_on_as_if_nothing_had_happened(served):
    whole = list(DeviceShuffleBuffer(capacity=130, batch_size=16, seed=5).batches(source()))
    first = DeviceShuffleBuffer(capacity=130, batch_size=16, seed=5)
    running = first.batches(source())
    start = list(itertools.islice(running, served))
    state = first.state_dict()
    next(running)  # the one that goes on does not disturb what was saved
    for _ in range(2):
        second = DeviceShuffleBuffer(capacity=130, batch_size=16, seed=99)
        second.load_state_dict(state)
        rest = list(second.batches(source(start=second.n_taken)))
        for ours, theirs in zip(start + rest, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_buffer_compiles_once_for_batches_of_one_length():
    from interp_jax.activations import device_shuffle_buffer as module

    before = module._written._cache_size(), module._read._cache_size()
    list(DeviceShuffleBuffer(capacity=210, batch_size=17, seed=0).batches(source(rows=30)))
    after = module._written._cache_size(), module._read._cache_size()
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1]


def test_bad_inputs():
    with pytest.raises(ValueError, match="capacity 20 with batch_size 16"):
        DeviceShuffleBuffer(capacity=20, batch_size=16)
    with pytest.raises(ValueError, match="gave no rows"):
        next(DeviceShuffleBuffer(capacity=40, batch_size=16).batches([]))
    with pytest.raises(ValueError, match=r"batch 1 of the source has shape \(4, 2\); expected \[n, 3\]"):
        next(DeviceShuffleBuffer(capacity=40, batch_size=16).batches([jnp.zeros((4, 3)), jnp.zeros((4, 2))]))
    with pytest.raises(ValueError, match="batch 0 of the source has 21 rows; a buffer of 40 takes at most half"):
        next(DeviceShuffleBuffer(capacity=40, batch_size=16).batches([jnp.zeros((21, 3))]))
    with pytest.raises(ValueError, match="from a buffer of capacity 40"):
        DeviceShuffleBuffer(capacity=80, batch_size=16).load_state_dict(
            DeviceShuffleBuffer(capacity=40, batch_size=16).state_dict()
        )

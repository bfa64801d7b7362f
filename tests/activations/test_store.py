"""The activation store: what was written is read, interrupted or not, and what was damaged is not."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from interp_jax.activations import store as store_module
from interp_jax.activations.store import ActivationStore

FACTS = {"model": "toy", "site": "resid_post", "layer": 3}


def batches(start=0, stop=10, rows=7):
    return [np.random.default_rng(number).normal(size=(rows, 5)).astype(np.float32) for number in range(start, stop)]


def opened(path, **changes):
    return ActivationStore(path, **{"d_in": 5, "provenance": FACTS, **changes})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rows_come_back(tmp_path, dtype, tolerance):
    store = opened(tmp_path, dtype=dtype)
    store.extend(batches(), shard_rows=20)
    expected = np.concatenate(batches())
    assert (store.n_rows, store.n_batches) == (70, 10)
    assert len(list(tmp_path.glob("shard_*"))) == 4
    indices = np.array([69, 0, 20, 21, 22, 0, 41])
    for reader in (store, opened(tmp_path, dtype=dtype)):
        found = reader.rows(indices).astype(np.float32)
        np.testing.assert_allclose(found, expected[indices], rtol=tolerance, atol=tolerance)
    # Any other tool reads the shards too.
    first = safetensors.numpy.load_file(tmp_path / "shard_00000.safetensors")["activations"].astype(np.float32)
    np.testing.assert_allclose(first, expected[:21], rtol=tolerance, atol=tolerance)
    assert json.loads((tmp_path / "manifest.json").read_text())["provenance"] == FACTS


def test_writing_goes_on_after_the_last_whole_shard(tmp_path):
    def interrupted():
        yield from batches(0, 5)
        raise KeyboardInterrupt

    store = opened(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.extend(interrupted(), shard_rows=20)
    again = opened(tmp_path)
    assert (again.n_rows, again.n_batches) == (21, 3)
    again.extend(batches(again.n_batches), shard_rows=20)
    np.testing.assert_array_equal(again.rows(np.arange(70)), np.concatenate(batches()))


def test_shuffled_gives_each_row_once_an_epoch_and_the_same_for_the_same_step(tmp_path):
    store = opened(tmp_path)
    store.extend(batches(), shard_rows=20)
    batch = store.shuffled(16, seed=3)
    epochs = [np.concatenate([batch(4 * epoch + step) for step in range(4)]) for epoch in range(2)]
    for epoch in epochs:
        assert len(np.unique(epoch, axis=0)) == 64
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(opened(tmp_path).shuffled(16, seed=3)(5), batch(5))
    assert (store.shuffled(16, seed=4)(0) != batch(0)).any()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has .* bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "was altered"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["cut short", "altered", "missing"],
)
def test_a_damaged_shard_is_named_left_out_and_written_again(tmp_path, damage, named):
    opened(tmp_path).extend(batches(), shard_rows=20)
    damage(tmp_path / "shard_00001.safetensors")
    with pytest.warns(UserWarning, match=rf"shard_00001.safetensors {named}.* 2 shards after it"):
        store = opened(tmp_path)
    assert store.n_batches == 3
    store.extend(batches(store.n_batches), shard_rows=20)
    np.testing.assert_array_equal(opened(tmp_path).rows(np.arange(70)), np.concatenate(batches()))


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.extend(batches(0, 3), shard_rows=20)
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.extend(batches(3), shard_rows=20)
    monkeypatch.setattr(store_module.os, "fsync", real)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard_00000.safetensors"]
    np.testing.assert_array_equal(opened(tmp_path).rows(np.arange(21)), np.concatenate(batches(0, 3)))


def test_bad_inputs(tmp_path):
    store = opened(tmp_path)
    with pytest.raises(ValueError, match="batch_size is 4; expected 1 to 0"):
        store.shuffled(4)
    store.extend(batches(), shard_rows=20)
    with pytest.raises(ValueError, match=r"batch 10 has shape \(3, 4\); expected \[n, 5\]"):
        store.extend([np.zeros((3, 4))])
    with pytest.raises(ValueError, match="batch 10 holds NaN"):
        store.extend([np.full((3, 5), np.nan)])
    with pytest.raises(IndexError, match="rows 0 to 70 were asked for; the store holds 70"):
        store.rows(np.array([0, 70]))
    with pytest.raises(ValueError, match="is of other activations: d_in 5, not 6"):
        opened(tmp_path, d_in=6)
    with pytest.raises(ValueError, match="is of other activations: provenance"):
        opened(tmp_path, provenance={**FACTS, "layer": 4})
    with pytest.raises(ValueError, match="expected one of float32"):
        opened(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="too large for float16"):
        opened(tmp_path / "half", dtype="float16").extend([np.full((1, 5), 1e6)])
    pathlib.Path(tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not the manifest"):
        opened(tmp_path)

"""The activation store: what was written is read, interrupted or not, and what was damaged is not."""

import errno
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import uuid

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from interp_jax.activations import store as store_module
from interp_jax.activations.store import ActivationStore

FACTS = {"model": "toy", "site": "resid_post", "layer": 3}


def batches(start=0, stop=10, rows=7):
    return [np.random.default_rng(number).normal(size=(rows, 5)).astype(np.float32) for number in range(start, stop)]


def opened(path, **changes):
    return ActivationStore(path, **{"d_in": 5, "provenance": FACTS, **changes})


def of_all(store):
    return store.rows(np.arange(store.n_rows))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows, 12 rows held: what large stores have."""
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 80)
    monkeypatch.setattr(store_module, "_HELD_BYTES", 240)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rows_come_back(tmp_path, small_chunks, dtype, tolerance):
    store = opened(tmp_path, dtype=dtype)
    store.extend(batches(), shard_rows=20)
    expected = np.concatenate(batches())
    assert (store.n_rows, store.n_batches) == (70, 10)
    assert len(list(tmp_path.glob("part_00000/shard_*"))) == 4
    indices = np.array([69, 0, 20, 21, 22, 0, 41])
    for reader in (store, opened(tmp_path, dtype=dtype), ActivationStore.open(tmp_path)):
        assert reader.rows(indices).dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        for some in (indices, np.arange(70)):
            found = reader.rows(some).astype(np.float32)
            np.testing.assert_allclose(found, expected[some], rtol=tolerance, atol=tolerance)
        assert (reader.d_in, reader.dtype, reader.provenance) == (5, dtype, FACTS)


def test_any_other_tool_reads_the_shards(tmp_path):
    opened(tmp_path).extend(batches(), shard_rows=20)
    where = {"driver": "file", "path": str(tmp_path / "part_00000" / "shard_00000")}
    rows = ts.open({"driver": "zarr3", "kvstore": where}).result().read().result()
    expected = np.concatenate(batches(0, 3))
    assert (rows != expected).any(), "rows lie mixed"
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(expected, axis=0))


@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_a_url_is_as_good_as_a_path(tmp_path, url):
    url = url.format(tmp_path if "file" in url else f"a-store-{uuid.uuid4()}")
    opened(url).extend(batches(0, 5), shard_rows=20)
    store = opened(url)
    assert store.n_batches == 5
    store.extend(batches(5), shard_rows=20)
    np.testing.assert_array_equal(of_all(ActivationStore.open(url)), np.concatenate(batches()))


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
    np.testing.assert_array_equal(of_all(again), np.concatenate(batches()))


def test_statistics_are_known_without_reading(tmp_path):
    store = opened(tmp_path)
    with pytest.raises(ValueError, match="holds no activations"):
        store.statistics()
    store.extend(batches(), shard_rows=20)
    for file in tmp_path.glob("part_00000/shard_*/c/*/*"):
        file.unlink()
    expected = np.concatenate(batches()).astype(np.float64)
    found = ActivationStore.open(tmp_path, verify=False)
    np.testing.assert_allclose(found.norms(), np.linalg.norm(expected, axis=1), rtol=1e-6)
    statistics = found.statistics()
    assert statistics.n_rows == 70
    np.testing.assert_allclose(statistics.mean, expected.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(statistics.mean_square, np.mean(expected**2), rtol=1e-6)


@pytest.mark.parametrize("among", [None, np.arange(0, 70, 3), np.arange(69, 20, -1)])
def test_shuffled_gives_each_row_once_an_epoch_and_the_same_for_the_same_step(tmp_path, small_chunks, among):
    store = opened(tmp_path)
    store.extend(batches(), shard_rows=20)
    expected = np.concatenate(batches())[slice(None) if among is None else among]
    size = 3
    per_epoch = len(expected) // size
    batch = store.shuffled(size, seed=3, among=among)
    epochs = [np.concatenate([batch(per_epoch * epoch + step) for step in range(per_epoch)]) for epoch in range(2)]
    rows = {row.tobytes() for row in expected}
    for epoch in epochs:
        assert len(epoch) == per_epoch * size
        assert len({row.tobytes() for row in epoch} & rows) == per_epoch * size
    assert (epochs[0] != epochs[1]).any()
    again = opened(tmp_path).shuffled(size, seed=3, among=among)
    for step in (per_epoch + 2, 0, per_epoch - 1):
        np.testing.assert_array_equal(again(step), batch(step))
    assert (store.shuffled(size, seed=4, among=among)(0) != batch(0)).any()


@pytest.mark.parametrize("among", [None, np.arange(0, 70, 3)])
def test_batches_taken_on_the_device_are_those_read_from_the_disk(tmp_path, small_chunks, among):
    store = opened(tmp_path)
    store.extend(batches(), shard_rows=20)
    read, taken = (store.shuffled(5, seed=3, among=among, on_device=on_device) for on_device in (False, True))
    for step in (0, 1, 2, 40, 3):
        assert isinstance(taken(step), jax.Array)
        np.testing.assert_array_equal(taken(step), read(step))
    assert not store.fits_on_device()  # tests run on a CPU, whose memory is the host's


def test_a_store_for_which_the_device_has_no_room_is_told(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.extend(batches(), shard_rows=20)
    monkeypatch.setattr(store_module, "_device_memory", lambda: 1000.0)  # of a small accelerator; a CPU names none
    with pytest.raises(ValueError, match="leave on_device out"):
        store.shuffled(5, on_device=True)


def test_a_batch_seldom_holds_two_tokens_of_one_prompt(tmp_path, monkeypatch):
    # 64 prompts of 32 tokens in shards of 8 prompts, chunks of 16 rows, an eighth of the store held at a time.
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(store_module, "_HELD_BYTES", 1024)
    prompts = [np.full((32, 1), number, np.float32) for number in range(64)]
    store = ActivationStore(tmp_path, d_in=1)
    store.extend(prompts, shard_rows=256)
    batch = store.shuffled(32)
    pairs = [
        np.sum(counts * (counts - 1)) / 2
        for counts in (np.unique(batch(step), return_counts=True)[1] for step in range(192))
    ]
    # Of 32 rows drawn from all rows, 496 pairs, each of one prompt with probability 31 / 2047.
    perfect = 496 * 31 / 2047
    assert np.mean(pairs) < 1.4 * perfect  # text in its order would have 496


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:30] + b"x" + path.read_bytes()[31:]), "is damaged"),
        (lambda path: path.unlink(), "is damaged.* missing"),
        (lambda path: shutil.copy(str(path).replace("00001", "00002"), path), "was altered.* not those of its summary"),
        (lambda path: (path.parents[2] / "zarr.json").unlink(), "is damaged"),
        (lambda path: (path.parents[2] / "summary.safetensors").write_bytes(b"{}"), "is damaged: summary"),
    ],
    ids=["cut short", "empty", "altered", "missing", "another's", "no metadata", "summary"],
)
def test_a_damaged_shard_is_named_left_out_and_written_again(tmp_path, damage, named):
    opened(tmp_path).extend(batches(), shard_rows=20)
    damage(tmp_path / "part_00000" / "shard_00001" / "c" / "0" / "0")
    with pytest.warns(UserWarning, match=rf"(?s)part_00000/shard_00001 {named}.* 2 shards after it"):
        store = opened(tmp_path)
    assert store.n_batches == 3
    store.extend(batches(store.n_batches), shard_rows=20)
    np.testing.assert_array_equal(of_all(opened(tmp_path)), np.concatenate(batches()))


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damage_is_seen_on_reading_too(tmp_path, small_chunks, damage):
    opened(tmp_path).extend(batches(), shard_rows=20)
    path = tmp_path / "part_00000" / "shard_00001" / "c" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content) if damage == "altered" else path.unlink()
    store = ActivationStore.open(tmp_path, verify=False)
    assert store.n_rows == 70
    for read in (lambda: store.rows(np.arange(70)), lambda: [store.shuffled(7)(step) for step in range(10)]):
        with pytest.raises(OSError, match="part_00000/shard_00001 is damaged"):
            read()


def test_several_processes_write_a_part_each(tmp_path):
    code = """
        import sys
        import numpy as np
        from interp_jax.activations.store import ActivationStore

        number = int(sys.argv[2])
        store = ActivationStore(sys.argv[1], d_in=5, provenance={"model": "toy"}, part=(number, 3))
        for batch in range(number * 4, number * 4 + 4):
            store.extend([np.random.default_rng(batch).normal(size=(7, 5))], shard_rows=14)
        store.finish()
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(number)]) for number in (2, 0)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    with pytest.warns(UserWarning, match="1 of 3 parts are not finished, part 1 among them"):
        assert not ActivationStore.open(tmp_path).is_finished
    own = ActivationStore(tmp_path, d_in=5, provenance={"model": "toy"}, part=(1, 3))
    assert own.n_rows == 0
    own.extend(batches(4, 8))
    own.finish()
    store = ActivationStore.open(tmp_path)
    assert store.is_finished
    np.testing.assert_array_equal(of_all(store), np.concatenate(batches(0, 12)))
    with pytest.raises(ValueError, match="has 3 parts: open the one"):
        store.extend(batches())
    with pytest.raises(ValueError, match="is of other activations: n_parts 3, not 1"):
        ActivationStore(tmp_path, d_in=5, provenance={"model": "toy"})


def test_a_killed_writer_goes_on_to_an_identical_store(tmp_path):
    """SIGKILL at several moments of a real process: while it starts, between shards, in the middle of one."""
    code = """
        import os, signal, sys, threading
        import numpy as np
        from interp_jax.activations.store import ActivationStore

        store = ActivationStore(sys.argv[1], d_in=64, provenance={"model": "toy"})
        after = float(sys.argv[2])
        if after >= 0:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        numbers = range(store.n_batches, 120)
        store.extend((np.random.default_rng(n).normal(size=(100, 64)) for n in numbers), shard_rows=500)
    """
    killed = 0
    for after in (0.0, 0.02, 0.05, 0.1, -1):
        process = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(after)], check=False)
        killed += process.returncode == -9
        store = ActivationStore.open(tmp_path)  # no warning: what is named is whole
        expected = [np.random.default_rng(n).normal(size=(100, 64)) for n in range(store.n_batches)]
        if expected:
            np.testing.assert_array_equal(of_all(store), np.concatenate(expected).astype(np.float32))
    assert killed >= 2
    assert store.n_batches == 120
    shards = sorted(path.name for path in (tmp_path / "part_00000").glob("shard_*"))
    assert shards == [f"shard_{number:05d}" for number in range(24)]


def test_what_a_killed_writer_left_is_no_part_of_what_is_written_next(tmp_path):
    opened(tmp_path).extend(batches(0, 3), shard_rows=20)
    part = tmp_path / "part_00000"
    shard = part / "shard_00001" / "c" / "0"
    shard.mkdir(parents=True)
    for path in (part / "manifest.json.__lock", part / ".manifest.json.abc", shard / "0.__lock"):
        path.write_text("x" * 100_000)
    opened(tmp_path).extend(batches(3), shard_rows=20)
    np.testing.assert_array_equal(of_all(ActivationStore.open(tmp_path)), np.concatenate(batches()))
    assert not list(part.glob(".*")) + list(shard.glob("*.__lock"))


def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    """A real failure of the system to write: no file may grow beyond 16 kB. Small ones, as the manifest, still can."""
    code = """
        import resource, sys
        import numpy as np
        from interp_jax.activations.store import ActivationStore

        store = ActivationStore(sys.argv[1], d_in=5, provenance={"model": "toy", "site": "resid_post", "layer": 3})
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
        store.extend([np.random.default_rng(n).normal(size=(7, 5)) for n in range(3)], shard_rows=20)
        store.extend([np.ones((1000, 5))], shard_rows=1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    message = process.stderr.splitlines()[-1]
    assert message.startswith("OSError: ")
    assert "shard_00001 cannot be written; it needs 20.0 kB, and " in message
    assert "are free: " in message
    assert sorted(path.name for path in (tmp_path / "part_00000").iterdir()) == ["manifest.json", "shard_00000"]
    store = opened(tmp_path)
    np.testing.assert_array_equal(of_all(store), np.concatenate(batches(0, 3)))
    store.extend(batches(3))
    np.testing.assert_array_equal(of_all(opened(tmp_path)), np.concatenate(batches()))


def test_no_shard_is_begun_without_room_for_it(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.extend(batches(0, 3), shard_rows=20)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        OSError, match=r"the next shard, of 21 activations, takes up to 1\.0 MB, and 1\.0 MB are free"
    ) as full:
        store.extend(batches(3), shard_rows=20)
    assert full.value.errno == errno.ENOSPC
    np.testing.assert_array_equal(of_all(ActivationStore.open(tmp_path)), np.concatenate(batches(0, 3)))


def test_a_batch_may_be_used_again_by_its_owner(tmp_path):
    store = opened(tmp_path)
    with store.appending() as append:
        array = np.ones((7, 5), np.float32)
        append(array)
        array[:] = 9
    np.testing.assert_array_equal(of_all(store), np.ones((7, 5)))


def test_bad_inputs(tmp_path):
    store = opened(tmp_path)
    with pytest.raises(ValueError, match="batch_size is 4; expected 1 to 0"):
        store.shuffled(4)
    store.extend(batches(), shard_rows=20)
    with pytest.raises(ValueError, match=r"batch 10 has shape \(3, 4\); expected \[n, 5\]"):
        store.extend([np.zeros((3, 4))])
    with pytest.raises(ValueError, match="batch 11 holds NaN"):
        store.extend([np.zeros((3, 5)), np.full((3, 5), np.nan)])
    assert store.n_rows == 70
    for read in (store.rows, lambda among: store.shuffled(1, among=among)):
        with pytest.raises(IndexError, match="rows 0 to 70 were asked for; the store holds 70"):
            read(np.array([0, 70]))
    with pytest.raises(ValueError, match="names a row twice"):
        store.shuffled(1, among=np.array([3, 3]))
    with pytest.raises(ValueError, match="is of other activations: d_in 5, not 6"):
        opened(tmp_path, d_in=6)
    with pytest.raises(ValueError, match="is of other activations: provenance"):
        opened(tmp_path, provenance={**FACTS, "layer": 4})
    with pytest.raises(ValueError, match="expected one of float32"):
        opened(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"part is \(2, 2\)"):
        opened(tmp_path, part=(2, 2))
    with pytest.raises(ValueError, match="too large for float16"):
        opened(tmp_path / "half", dtype="float16").extend([np.full((1, 5), 1e6)])
    large = opened(tmp_path / "large")
    large.extend([np.full((1, 5), 1e30)])  # whose square float32 does not hold
    np.testing.assert_allclose(large.norms(), 5**0.5 * 1e30, rtol=1e-6)
    with pytest.raises(FileNotFoundError, match="holds no activation store"):
        ActivationStore.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot be opened as a store"):
        opened("nothing://here")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(ValueError, match="has format 1; this version reads 2"):
        ActivationStore.open(tmp_path)
    pathlib.Path(tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not the manifest"):
        opened(tmp_path)

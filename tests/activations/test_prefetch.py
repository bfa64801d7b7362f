"""Prefetching: the same batches, made ahead, whatever happens on the way."""

import itertools
import subprocess
import sys
import textwrap
import threading
import time
import types

import numpy as np
import pytest

from interp_jax.activations import prefetch
from interp_jax.activations.prefetch import prefetched
from interp_jax.sae.batch_stream import Restorable


def threads():
    return [one for one in threading.enumerate() if one.name.startswith("interp_jax-prefetch")]


def test_steps_are_those_of_the_function_in_any_order():
    made = []

    def batch(step):
        made.append(step)
        return step * step

    with prefetched(batch, depth=3) as batches:
        assert [batches(step) for step in (0, 1, 2, 7, 8, 3, 3)] == [0, 1, 4, 49, 64, 9, 9]
        assert batches.n_batches == 7
        assert max(made) <= 11, "no more than three ahead"
    assert threads() == []


def test_a_stream_is_the_same_stream():
    with prefetched(iter(range(10)), depth=3) as batches:
        assert list(batches) == list(range(10))
        assert list(batches) == []
    assert list(prefetched([], depth=1)) == []


class Numbers:
    """A stream that tells where it stands."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 10:
            self.at += 1
            yield self.at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state_dict):
        self.at = state_dict["at"]


def test_a_stream_tells_where_it_stands_by_what_was_given_not_by_what_was_made():
    with prefetched(Numbers(), depth=3) as batches:
        assert isinstance(batches, Restorable)
        assert batches.state_dict() == {"at": 0}
        assert [next(batches) for _ in range(4)] == [1, 2, 3, 4]
        state = batches.state_dict()
    assert state == {"at": 4}
    with prefetched(Numbers(), depth=3) as resumed:
        resumed.load_state_dict(state)
        assert list(resumed) == [5, 6, 7, 8, 9, 10]


def test_no_more_than_depth_is_made_ahead():
    made = threading.Semaphore(0)
    source = itertools.count()

    def counted():
        for number in source:
            made.release()
            yield number

    with prefetched(counted(), depth=4) as batches:
        assert next(batches) == 0
        for _ in range(5):
            assert made.acquire(timeout=10)
        time.sleep(0.05)
        assert next(source) == 5


@pytest.mark.parametrize("kind", ["steps", "stream"])
def test_an_exception_of_the_source_comes_in_its_turn(kind):
    def batch(step):
        if step == 2:
            raise OSError("the shard is damaged")
        return step

    with prefetched(batch if kind == "steps" else map(batch, range(9))) as batches:
        following = iter(map(batches, range(9))) if kind == "steps" else batches
        assert [next(following), next(following)] == [0, 1]
        with pytest.raises(OSError, match="the shard is damaged"):
            next(following)
    assert threads() == []


def test_an_exception_of_the_training_ends_the_thread():
    with pytest.raises(KeyError), prefetched(lambda step: np.zeros(step)) as batches:
        batches(0)
        raise KeyError
    assert threads() == []


def test_waiting_is_counted(monkeypatch):
    clock = itertools.accumulate([0, 3, 10, 4, 20, 5])  # waits of 3, 4 and 5 seconds, with work between them
    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with prefetched(iter("abc")) as batches:
        assert [next(batches) for _ in range(3)] == list("abc")
        assert batches.waited_s == 12


def test_a_process_that_never_closes_it_ends():
    code = """
        import itertools
        from interp_jax.activations.prefetch import prefetched

        steps, stream = prefetched(lambda step: step, depth=5), prefetched(itertools.count(), depth=5)
        print(steps(0), next(stream))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "0 0\n"
    assert process.stderr == ""


def test_a_depth_of_none_is_an_error():
    with pytest.raises(ValueError, match="depth is 0"):
        prefetched([], depth=0)

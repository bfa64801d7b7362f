"""Where batches stand is kept, whole, and given back; a plain iterable is run through."""

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import TrainConfig
from interp_jax.sae.batch_stream import BatchStream, Restorable
from interp_jax.sae.nested_state import read_nested_state

CONFIG = TrainConfig(4, 8, k=2)


class Counting:
    """Batches whose state is everything that a state may hold."""

    def __init__(self):
        self.at, self.random, self.buffer = 0, np.random.default_rng(5), np.arange(6).reshape(2, 3).astype(jnp.bfloat16)

    def __iter__(self):
        while True:
            self.at += 1
            self.buffer = self.buffer + 1
            yield self.random.normal(size=(3, 4))

    def state_dict(self):
        nested = [{"buffer": self.buffer, "name": "ü", "none": None}, np.float32(0.5)]
        return {"at": self.at, "random": self.random.bit_generator.state, "nested": nested}

    def load_state_dict(self, state_dict):
        self.at, self.random.bit_generator.state = state_dict["at"], state_dict["random"]
        found, half = state_dict["nested"]
        self.buffer = found["buffer"]
        assert (found["name"], found["none"], half) == ("ü", None, 0.5)


def test_batches_that_tell_where_they_stand_go_on_from_there(tmp_path):
    first = BatchStream(Counting(), CONFIG, 0, np.asarray)
    first.peek()
    read = [first.next(step) for step in range(3)]
    position = first.position()
    assert position is not None
    position.write(tmp_path / "position")
    following = [first.next(step) for step in range(3, 6)]
    again = Counting()
    second = BatchStream(again, CONFIG, 3, np.asarray, read_nested_state(tmp_path / "position"))
    np.testing.assert_array_equal([second.next(step) for step in range(3, 6)], following)
    assert again.at == 6
    np.testing.assert_array_equal(again.buffer, np.arange(6).reshape(2, 3) + 6)
    assert again.buffer.dtype == jnp.bfloat16
    # Without its position it is run through from its start.
    third = BatchStream(Counting(), CONFIG, 3, np.asarray)
    np.testing.assert_array_equal([third.next(step) for step in range(3, 6)], following)
    assert not np.array_equal(read, following)


def test_a_function_and_a_plain_iterable_have_no_position():
    assert isinstance(Counting(), Restorable)
    for batches in (lambda step: np.ones((3, 4)), [np.ones((3, 4))]):
        stream = BatchStream(batches, CONFIG, 0, np.asarray)
        stream.next(0)
        assert stream.position() is None


def test_a_state_that_cannot_be_kept_is_told():
    class Odd(Counting):
        def state_dict(self):
            return {"odd": {1, 2}}

    with pytest.raises(TypeError, match="state_dict of the batches holds a set; expected dictionaries"):
        BatchStream(Odd(), CONFIG, 0, np.asarray).position()

"""A mixed stream goes on from where a checkpoint left it, and reads nothing of the source again."""

import numpy as np
import pytest

from interp_jax.activations.device_shuffle_buffer import DeviceShuffleBuffer
from interp_jax.activations.shuffle_buffer import ShuffleBuffer
from interp_jax.activations.shuffled_stream import ShuffledStream
from interp_jax.sae import TrainConfig, train

pytestmark = [pytest.mark.caches, pytest.mark.slow]


class Source:
    """A hundred batches of different lengths, which remembers the ones that were asked for."""

    def __init__(self):
        self.read = []

    def __call__(self, first):
        for number in range(first, 100):
            self.read.append(number)
            yield np.random.default_rng(number).normal(size=(20 + number % 7, 8)).astype(np.float32)


class Stop(Exception):
    pass


def stop(step, metrics):
    if step == 8:
        raise Stop


@pytest.mark.parametrize("kind", [ShuffleBuffer, DeviceShuffleBuffer])
def test_a_resumed_run_takes_the_buffer_from_the_checkpoint(tmp_path, kind):
    config = TrainConfig(8, 16, architecture="relu", n_steps=12, checkpoint_every=5, log_every=1)

    def stream(source):
        return ShuffledStream(source, kind(capacity=100, batch_size=16, seed=3))

    whole, history = train(config, stream(Source()))
    first, second = Source(), Source()
    with pytest.raises(Stop):
        train(config, stream(first), checkpoint_dir=tmp_path, on_step=stop)
    resumed, resumed_history = train(config, stream(second), checkpoint_dir=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed.W_dec[...], whole.W_dec[...])
    assert resumed_history == history
    assert second.read[0] > 5, "the source was not run through again"
    assert second.read[0] <= first.read[-1] + 1
    with pytest.raises(ValueError, match="is from a buffer of capacity 100"):
        other = ShuffledStream(Source(), kind(capacity=50, batch_size=16))
        train(config, other, checkpoint_dir=tmp_path, resume=True)

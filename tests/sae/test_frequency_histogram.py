"""The histogram of latents' frequencies against counts by hand."""

import dataclasses
import json

import numpy as np
import pytest

from interp_jax.sae import frequency_histogram


def test_every_active_latent_is_in_the_bin_of_its_order_of_magnitude():
    frequencies = np.concatenate([np.zeros(5), np.full(3, 2.1e-5), np.full(2, 0.4), [1e-3, 1.0]])
    found = frequency_histogram(frequencies)
    edges = np.asarray(found.log10_edges)
    np.testing.assert_allclose(edges, np.arange(-20, 1) / 4)
    by_hand = np.zeros(20, int)
    by_hand[1] = 3  # log10 is -4.68
    by_hand[8] = 1  # -3 is the lower edge of the ninth
    by_hand[18] = 2  # -0.40
    by_hand[19] = 1  # 0 closes the last
    np.testing.assert_array_equal(found.counts, by_hand)
    assert found.never == 5


@pytest.mark.parametrize("frequencies", [np.zeros(4), np.ones(4), np.array([3e-9, 0.5])])
def test_nothing_is_lost_at_the_ends(frequencies):
    found = frequency_histogram(frequencies)
    assert sum(found.counts) + found.never == len(frequencies)
    assert found.log10_edges[-1] == 0
    assert len(found.log10_edges) == len(found.counts) + 1
    assert json.loads(json.dumps(dataclasses.asdict(found)))["never"] == np.sum(frequencies == 0)


def test_what_is_no_frequency_is_refused():
    with pytest.raises(ValueError, match=r"between 0\.0 and 7\.0; expected shares"):
        frequency_histogram(np.array([0.0, 7.0]))

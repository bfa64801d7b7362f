"""The leak checker of tests/conftest.py is on, finds what a test leaks, and is off where a test says so."""

import jax
import jax.numpy as jnp
import pytest

OLDER_THAN_THE_TEST = []


def trace(keep):
    def function(x):
        keep.append(jnp.sin(x))
        return x

    jax.jit(function)(1.0)


@pytest.mark.parametrize("keep", [OLDER_THAN_THE_TEST, None], ids=["older than the test", "its own"])
def test_a_leak_is_found(keep):
    keep = [] if keep is None else keep
    with pytest.raises(Exception, match="Leaked"):
        trace(keep)
    keep.clear()


@pytest.mark.caches
def test_a_test_marked_caches_goes_without_it():
    trace([])

"""Settings for every test: one CPU platform, and JAX's leak checker on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(autouse=True)
def _leaks_are_checked(request: pytest.FixtureRequest):
    """A leaked tracer fails a test, unless it is marked `caches`: the leak checker bypasses the trace caches."""
    with jax.check_tracer_leaks(request.node.get_closest_marker("caches") is None):
        yield

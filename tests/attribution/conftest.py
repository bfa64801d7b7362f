"""The tiny model and a pair of prompts for it."""

import jax
import pytest

from interp_jax.attribution.prompt_pair import prompt_pair
from interp_jax.models.tiny import load_tiny


@pytest.fixture(scope="session")
def tiny():
    return load_tiny()


@pytest.fixture(scope="session")
def pair(tiny):
    return prompt_pair(
        tiny, "The city is the capital of the", "The war is the cause of the", answer=" United", wrong=" war"
    )


@pytest.fixture
def quick_compilation():
    """For tests of many small programs, whose time is all compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

"""The tiny model and a pair of prompts for it."""

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

"""Models by name."""

import importlib

from interp_jax.models.language_model import LanguageModel

__all__ = ["KNOWN_MODELS", "load"]

# Imported when asked for: SmolLM2's code needs `transformers`, the tiny model needs nothing.
_HOME = {
    "tiny": ("interp_jax.models.tiny", "load_tiny"),
    "smollm2": ("interp_jax.models.flax_llama", "load_smollm2"),
}

KNOWN_MODELS = tuple(_HOME)
"""The names that `load` takes."""


def load(name: str) -> LanguageModel:
    """A model by name: `tiny`, which comes with the package, or `smollm2` (SmolLM2-135M-Instruct).

    Args:
        name: one of `KNOWN_MODELS`.

    Returns:
        The model, ready to run.

    Raises:
        ValueError: when no model has this name.
        MissingDataError: when its weights are not installed; names the command that gets them.
    """
    if name not in _HOME:
        raise ValueError(f"There is no model {name!r}; there are {', '.join(KNOWN_MODELS)}.")
    module, function = _HOME[name]
    return getattr(importlib.import_module(module), function)()

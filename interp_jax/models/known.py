"""Models by name, or by the path of their files."""

import importlib
import os
import pathlib
from typing import Any

from interp_jax import installed_data
from interp_jax.models.language_model import LanguageModel

__all__ = ["KNOWN_MODELS", "load", "path_of"]

# Imported when asked for.
_HOME = {
    "tiny": ("interp_jax.models.tiny", "load_tiny"),
    "smollm2": ("interp_jax.models.from_files", "load_smollm2"),
    "gemma3": ("interp_jax.models.from_files", "load_gemma3"),
}

KNOWN_MODELS = tuple(_HOME)
"""The names that `load` takes."""


def load(name: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """A model by name, or from files.

    Args:
        name: `tiny`, which comes with the package, `smollm2` (SmolLM2-135M-Instruct), `gemma3` (Gemma 3 270M); or the
            path of a Hugging Face directory or of a GGUF file.
        **options: `dtype` (of the parameters), `compute_dtype`, `layers` ("stacked" or "unrolled"), `remat`, `mesh`,
            `check_finite`: see `interp_jax.models.weights.LoadOptions`.

    Returns:
        The model, ready to run.

    Raises:
        ValueError: No model has this name, and it is no path; or its files are damaged or of an unknown family.
        MissingDataError: Its weights are not installed; names the command that gets them.
    """
    if name in _HOME:
        module, function = _HOME[str(name)]
        return getattr(importlib.import_module(module), function)(**options)
    return importlib.import_module("interp_jax.models.from_files").load_path(path_of(name), **options)


def path_of(name: str | os.PathLike[str]) -> pathlib.Path:
    """Where a model's files lie.

    Args:
        name: As in `load`.

    Returns:
        A directory or a GGUF file.

    Raises:
        ValueError: No model has this name, and it is no path.
        MissingDataError: Its weights are not installed; names the command that gets them.
    """
    if name == "tiny":
        return pathlib.Path(__file__).parent / "tiny_wikipedia"
    if name in _HOME:
        return installed_data.find(str(name))
    if not os.path.exists(name):
        raise ValueError(
            f"There is no model {str(name)!r}; there are {', '.join(KNOWN_MODELS)}, and paths of Hugging Face "
            "directories (config.json, safetensors, tokenizer.json) and of .gguf files."
        )
    return pathlib.Path(name)

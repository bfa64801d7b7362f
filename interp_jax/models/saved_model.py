"""This project's own files for a `Transformer`: a directory with `config.json` and `model.safetensors`.

For models that were trained or changed here. Layers lie in the file one by one, however memory holds them, under the
names that `named_parameters` gives. Models from elsewhere come through `hugging_face.py` and `gguf_model.py`.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import DTypeLike

from interp_jax.models.safetensors_folder import SafetensorsFolder, read_json
from interp_jax.models.transformer import Transformer, named_parameters, parameter_names, unrolled
from interp_jax.models.transformer_config import TransformerConfig
from interp_jax.models.weights import LAYER, Layout, LoadOptions, OpenedModel, assemble
from interp_jax.whole_file import write_whole

__all__ = ["is_saved_model", "load", "open_saved", "save"]


def save(model: Transformer, directory: str | Path, *, dtype: DTypeLike | None = None) -> None:
    """Writes `config.json` and `model.safetensors` into a directory, each whole or not at all.

    Args:
        model: What to write.
        directory: Where; made if it is not there.
        dtype: Dtype of the stored tensors; the parameters' own when None.

    Raises:
        ValueError: `dtype` is too narrow for a parameter, which would be stored as infinite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in named_parameters(unrolled(model)).items():
        host = np.asarray(value)
        with np.errstate(over="ignore"):  # told below, with the parameter's name
            stored = host.astype(host.dtype if dtype is None else jnp.dtype(dtype))
        if not np.array_equal(np.isfinite(stored.astype(np.float32)), np.isfinite(host.astype(np.float32))):
            raise ValueError(f"{name} does not fit into {stored.dtype}; store it in a wider dtype.")
        tensors[name] = stored
    config = json.dumps(model.config.as_json(), indent=2) + "\n"
    # The config rides in the weights' header too, so that a config.json of another model beside it is noticed even
    # where every shape happens to agree (an interrupted save over an older model).
    write_whole(directory / "model.safetensors", safetensors.numpy.save(tensors, metadata={"config": config}))
    write_whole(directory / "config.json", config.encode())


def is_saved_model(directory: str | Path) -> bool:
    """Whether a directory's `config.json` is one of `save`'s, and not Hugging Face's."""
    path = Path(directory) / "config.json"
    return path.is_file() and "d_model" in read_json(path) and "model_type" not in read_json(path)


def load(directory: str | Path, **options: Unpack[LoadOptions]) -> Transformer:
    """Reads a model that `save` wrote.

    Args:
        directory: Holds `config.json` and `model.safetensors`.
        **options: See `LoadOptions`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: A file of the two is not there.
        ValueError: A file is cut short or damaged, the two are not of one save, a field of the config is unknown or
            missing, or a tensor is missing, unknown or of a wrong shape; the message lists which.
    """
    return assemble(open_saved(directory), **options)


def open_saved(directory: str | Path) -> OpenedModel:
    """The same without reading a tensor.

    Args:
        directory: Holds `config.json` and `model.safetensors`.

    Returns:
        The opened files.

    Raises:
        FileNotFoundError: A file of the two is not there.
        ValueError: A file is cut short or damaged, the two are not of one save, or a field of the config is unknown or
            missing.
    """
    config_path = Path(directory) / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{config_path} is not there; a saved model is a directory with config.json and model.safetensors."
        )
    config = _config(config_path, read_json(config_path))
    source = SafetensorsFolder(directory)
    held = source.metadata.get("config")
    if held is None or _config(config_path, json.loads(held)) != config:
        raise ValueError(
            f"{config_path} is not the config that model.safetensors was saved with, {held or 'which holds none'}; "
            "save the model again."
        )
    names = (re.sub(r"^blocks\.\d+\.", f"blocks.{LAYER}.", name) for name in parameter_names(config))
    return OpenedModel(source, config, {name: Layout(name) for name in names})


def _config(path: Path, fields: Mapping[str, Any]) -> TransformerConfig:
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(TransformerConfig)}
    missing = sorted({name for name, is_needed in known.items() if is_needed} - fields.keys())
    unknown = sorted(fields.keys() - known.keys())
    if missing or unknown:
        raise ValueError(f"{path} is not a TransformerConfig: missing {missing}, unknown {unknown}.")
    return TransformerConfig.from_json(dict(fields))

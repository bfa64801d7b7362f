"""SmolLM2's weights and tokenizer as a folder that PyTorch's libraries read, for peers without our package."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from interp_jax import installed_data
from interp_jax.models.gguf_model import GgufCheckpoint
from interp_jax.models.tokenizer import Tokenizer

__all__ = ["write_smollm2"]


def write_smollm2(folder: pathlib.Path) -> None:
    """Writes `config.json` (the fields of transformers' LlamaConfig), `model.safetensors` and `tokenizer.json`.

    Args:
        folder: exists already.
    """
    checkpoint = GgufCheckpoint(installed_data.find("smollm2"))
    fields = {key: value for key, value in checkpoint.fields.items() if key != "model_type" and value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    state = {name: np.ascontiguousarray(checkpoint.tensor(name)) for name in checkpoint.names}
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    Tokenizer.from_gguf(checkpoint.file).save(folder)

"""SmolLM2 in `transformers` on PyTorch, from the folder that `smollm2_folder` writes."""

import importlib
import json
import pathlib
from typing import Any

__all__ = ["load_smollm2"]


def load_smollm2(folder: pathlib.Path, device: str) -> Any:
    """The model on a device, ready to run.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        device: PyTorch's name of it.
    """
    transformers: Any = importlib.import_module("transformers")
    load_file: Any = importlib.import_module("safetensors.torch").load_file
    config = transformers.LlamaConfig(**json.loads((folder / "config.json").read_text()))
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.to(device)

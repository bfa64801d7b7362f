"""SmolLM2 steered by repeng, on PyTorch, in an environment and a process of its own."""

import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np

from benchmarks.peer_process import serve
from benchmarks.pytorch_device import peer_device
from benchmarks.pytorch_smollm2 import load_smollm2


def main(folder: pathlib.Path) -> None:
    """Answers what is asked for.

    Args:
        folder: SmolLM2's, and `layer.json` and `direction.npy`.
    """
    torch: Any = importlib.import_module("torch")
    repeng: Any = importlib.import_module("repeng")

    device = peer_device(torch)
    layer = json.loads((folder / "layer.json").read_text())
    model = repeng.ControlModel(load_smollm2(folder, device), [layer])
    vector = repeng.ControlVector("llama", {layer: np.load(folder / "direction.npy")})

    def decode(prompts: list[list[int]], n_tokens: int, coefficient: float) -> list[list[int]]:
        model.set_control(vector, coefficient)
        rows = torch.tensor(prompts, device=device)
        found = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=n_tokens,
            min_new_tokens=n_tokens, pad_token_id=0,
        )  # fmt: skip
        return found[:, rows.shape[1] :].tolist()

    with torch.no_grad():
        serve({"decode": decode})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

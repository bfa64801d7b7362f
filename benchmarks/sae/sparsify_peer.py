"""sparsify's training step, in a process of its own: its coder, the constraint on its decoder, and Adam, as its trainer
calls them one after another."""

import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peer_process import serve
from benchmarks.pytorch_device import peer_device, wait_for


def main() -> None:
    """Serves the step: `prepare` makes it, `step` runs it."""
    torch: Any = importlib.import_module("torch")
    device = peer_device(torch)
    if device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # or it takes its GPU kernels wherever Triton is installed
    sparsify: Any = importlib.import_module("sparsify")
    config_module: Any = importlib.import_module("sparsify.config")
    batch = torch.tensor(np.load(pathlib.Path(sys.argv[1])), device=device)
    steps: dict[str, Callable[[], None]] = {}

    def prepare(architecture: str, d_sae: int, k: int) -> str:
        config = config_module.SparseCoderConfig(num_latents=d_sae, k=k)
        coder = sparsify.SparseCoder(batch.shape[1], config, device=device, dtype=torch.float32)
        optimiser = torch.optim.Adam(coder.parameters(), lr=1e-3, betas=(0.0, 0.999))

        def run() -> None:
            coder.set_decoder_norm_to_unit_norm()
            found = coder(batch, dead_mask=None)
            found.fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimiser.step()
            optimiser.zero_grad()

        steps[architecture] = run
        return architecture

    def step(architecture: str, n: int) -> None:
        for _ in range(n):
            steps[architecture]()
        wait_for(torch)

    serve({"prepare": prepare, "step": step})


if __name__ == "__main__":
    main()

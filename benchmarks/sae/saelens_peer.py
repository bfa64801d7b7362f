"""SAELens' own training step, in a process of its own; `step` runs one on the batch that it was given."""

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peer_process import serve
from benchmarks.pytorch_device import peer_device, wait_for


def _trainer(architecture: str, batch: Any, d_sae: int, k: int, device: str) -> Callable[[], None]:
    lens: Any = importlib.import_module("sae_lens")
    trainer_module: Any = importlib.import_module("sae_lens.training.sae_trainer")
    config_module: Any = importlib.import_module("sae_lens.config")
    rows, d_in = batch.shape
    kinds = {
        "relu": ("StandardTrainingSAE", {"l1_coefficient": 1.0}),
        "gated": ("GatedTrainingSAE", {"l1_coefficient": 1.0}),
        "topk": ("TopKTrainingSAE", {"k": k}),
        "batch_topk": ("BatchTopKTrainingSAE", {"k": k}),
        "jumprelu": ("JumpReLUTrainingSAE", {"l0_coefficient": 1.0}),
        "matryoshka": (
            "MatryoshkaBatchTopKTrainingSAE",
            {"k": k, "matryoshka_widths": [d_sae // share for share in (16, 8, 4, 2, 1)]},
        ),
    }
    name, options = kinds[architecture]
    cls = getattr(lens, name)
    sae = cls(getattr(lens, f"{name}Config")(d_in=d_in, d_sae=d_sae, device=device, **options))
    config = config_module.SAETrainerConfig(
        total_training_samples=10_000 * rows,
        train_batch_size_samples=rows,
        lr=1e-3,
        lr_end=1e-4,
        adam_beta1=0.0,
        device=device,
    )
    trainer = trainer_module.SAETrainer(config, sae, iter(()))

    def run() -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    return run


def main() -> None:
    """Serves the steps of every kind: `prepare` makes one, `step` runs it."""
    torch: Any = importlib.import_module("torch")
    device = peer_device(torch)
    batch = torch.tensor(np.load(pathlib.Path(sys.argv[1])), device=device)
    steps: dict[str, Callable[[], None]] = {}

    def prepare(architecture: str, d_sae: int, k: int) -> str:
        steps.clear()  # one at a time in memory
        steps[architecture] = _trainer(architecture, batch, d_sae, k, device)
        return architecture

    def step(architecture: str, n: int) -> None:
        for _ in range(n):
            steps[architecture]()
        wait_for(torch)

    serve({"prepare": prepare, "step": step})


if __name__ == "__main__":
    main()

"""SmolLM2 in `transformers` on PyTorch, in a process of its own. Logits go to a file, whose path is in the answer."""

import importlib
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.peer_process import PeerProcess, serve
from benchmarks.pytorch_device import exactly, peer_device, wait_for
from benchmarks.pytorch_smollm2 import load_smollm2
from benchmarks.smollm2_folder import write_smollm2


class Peer:
    """The parent's side."""

    def __init__(self, tokens: np.ndarray):
        """Starts it.

        Args:
            tokens: What `forward` runs on.
        """
        self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name)
        np.save(path / "tokens.npy", tokens)
        write_smollm2(path)
        self._process = PeerProcess(sys.executable, "benchmarks.models.pytorch_peer", str(path))
        self.threads = self._process.ask("threads")

    def forward(self) -> np.ndarray:
        """Logits of a pass over the tokens."""
        return np.load(self._process.ask("forward"), mmap_mode="r")

    def decode(self, prompts: np.ndarray, n_tokens: int) -> None:
        """Continues prompts by the likeliest tokens, to be timed."""
        self._process.ask("decode", prompts.tolist(), n_tokens)

    def continuations(self, prompts: np.ndarray, n_tokens: int) -> np.ndarray:
        """The likeliest continuations, by products in full f32."""
        return np.asarray(self._process.ask("decode exactly", prompts.tolist(), n_tokens))

    def run_forward(self, tokens: np.ndarray | None = None) -> None:
        """The same as `forward`, to be timed: nothing is written.

        Args:
            tokens: others than those of the beginning.
        """
        self._process.ask("time forward", None if tokens is None else tokens.tolist())

    def narrow(self) -> None:
        """From now on all of it is in bfloat16."""
        self._process.ask("narrow")

    def close(self) -> None:
        """Ends it."""
        self._process.close()
        self._folder.cleanup()


def likeliest(torch: Any, model: Any, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """So many likeliest tokens after each prompt, by the library's own `generate`.

    Args:
        torch: the module.
        model: the library's.
        prompts: ids, equally many a row.
        n_tokens: neither more nor fewer.
    """
    rows = torch.tensor(prompts, device=model.device)
    found = model.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=n_tokens, min_new_tokens=n_tokens,
        pad_token_id=0,
    )  # fmt: skip
    return found[:, rows.shape[1] :].tolist()


def _serve(folder: pathlib.Path) -> None:
    torch: Any = importlib.import_module("torch")
    device = peer_device(torch)
    model = load_smollm2(folder, device)
    tokens = torch.tensor(np.load(folder / "tokens.npy"), device=device)

    def decode(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        return likeliest(torch, model, prompts, n_tokens)

    def forward() -> str:
        with exactly(torch):
            np.save(folder / "logits.npy", model(tokens).logits.float().cpu().numpy())
        return str(folder / "logits.npy")

    def narrow() -> None:
        model.to(torch.bfloat16)

    def time_forward(others: list[list[int]] | None = None) -> None:
        model(tokens if others is None else torch.tensor(others, device=device))
        wait_for(torch)

    def decode_exactly(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        with exactly(torch):
            return decode(prompts, n_tokens)

    doing = {
        "decode": decode,
        "decode exactly": decode_exactly,
        "forward": forward,
        "narrow": narrow,
        "time forward": time_forward,
        "threads": torch.get_num_threads,
    }
    with torch.no_grad():
        serve(doing)


if __name__ == "__main__":
    _serve(pathlib.Path(sys.argv[1]))

"""SmolLM2 in `transformers` on PyTorch, in a process of its own, which works only while it is asked.

In one process the two libraries' thread pools take the cores from one another: what runs after PyTorch is slower for a
while, and so is PyTorch. Here each has the machine to itself in its turn.

The parent writes one line of JSON a request, `["forward"]` or `["decode", prompts, n_tokens]`, and reads one line when
it is done. Logits go to a file, whose path is in the answer.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np


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
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.models.pytorch_peer", str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.threads = self._ask("threads")

    def forward(self) -> np.ndarray:
        """Logits of a pass over the tokens."""
        return np.load(self._ask("forward"), mmap_mode="r")

    def decode(self, prompts: np.ndarray, n_tokens: int) -> np.ndarray:
        """The likeliest continuations."""
        return np.asarray(self._ask("decode", prompts.tolist(), n_tokens))

    def run_forward(self) -> None:
        """The same as `forward`, to be timed: nothing is written."""
        self._ask("time forward")

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process with PyTorch ended with {self._process.wait()}; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def _serve(folder: pathlib.Path) -> None:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    from interp_jax import installed_data
    from interp_jax.models.gguf_model import GgufCheckpoint

    torch.set_num_threads(os.cpu_count() or 1)
    checkpoint = GgufCheckpoint(installed_data.find("smollm2"))
    fields = {key: value for key, value in checkpoint.fields.items() if key != "model_type" and value is not None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    state = {name: torch.tensor(checkpoint.tensor(name)) for name in checkpoint.names}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    tokens = torch.tensor(np.load(folder / "tokens.npy"))

    def decode(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        rows = torch.tensor(prompts)
        found = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=n_tokens,
            min_new_tokens=n_tokens, pad_token_id=0,
        )  # fmt: skip
        return found[:, rows.shape[1] :].tolist()

    def forward() -> str:
        np.save(folder / "logits.npy", model(tokens).logits.numpy())
        return str(folder / "logits.npy")

    def time_forward() -> None:
        model(tokens)

    doing = {"decode": decode, "forward": forward, "time forward": time_forward, "threads": torch.get_num_threads}
    with torch.no_grad():
        for line in sys.stdin:
            what, *args = json.loads(line)
            print(json.dumps(doing[what](*args)), flush=True)


if __name__ == "__main__":
    _serve(pathlib.Path(sys.argv[1]))

"""Activation patching of `resid_post` in PyTorch, in a process of its own: by nnsight, and by plain hooks."""

import importlib
import os
import sys
from typing import Any

import numpy as np

from benchmarks.peer_process import PeerProcess, serve
from interp_jax import installed_data
from interp_jax.attribution.prompt_pair import PromptPair


class Peer:
    """The parent's side."""

    def __init__(self, pair: PromptPair):
        """Starts it.

        Args:
            pair: the prompts.
        """
        self._process = PeerProcess(sys.executable, "benchmarks.attribution.pytorch_peer")
        self._process.ask("pair", pair.clean.tolist(), pair.corrupted.tolist(), pair.answer, pair.wrong)

    def effects(self, how: str, layer: int, n_positions: int, rows: int) -> np.ndarray:
        """The effects of noising a layer's stream at the first positions."""
        return np.asarray(self._process.ask(how, layer, n_positions, rows))

    def close(self) -> None:
        """Ends it."""
        self._process.close()


def main() -> None:
    """The peer's side."""
    # By name: the environment in which types are checked has neither.
    nnsight, torch = importlib.import_module("nnsight"), importlib.import_module("torch")
    transformers = importlib.import_module("transformers")

    torch.set_num_threads(os.cpu_count() or 1)
    path = installed_data.find("smollm2")
    assert path is not None
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    plain.eval()
    wrapped: Any = nnsight.NNsight(plain)
    given: dict[str, Any] = {}

    def metric(logits: Any) -> Any:
        return logits[:, -1, given["answer"]] - logits[:, -1, given["wrong"]]

    def set_pair(clean: list[int], corrupted: list[int], answer: int, wrong: int) -> None:
        given.update(clean=torch.tensor([clean]), answer=answer, wrong=wrong)
        with torch.no_grad():
            found = plain(torch.tensor([corrupted]), output_hidden_states=True, use_cache=False)
            given["base"] = float(metric(plain(given["clean"], use_cache=False).logits)[0])
        given["streams"] = found.hidden_states[1:]

    def by_nnsight(layer: int, n_positions: int, rows: int) -> list[float]:
        stream, found = given["streams"][layer], []
        for position in range(n_positions):
            with torch.no_grad(), wrapped.trace(given["clean"], use_cache=False):
                output = wrapped.model.layers[layer].output
                output[:, position] = stream[:, position]
                logits = wrapped.lm_head.output.save()
            found.append(float(metric(logits)[0]) - given["base"])
        return found

    def by_hooks(layer: int, n_positions: int, rows: int) -> list[float]:
        stream, each = given["streams"][layer], torch.arange(n_positions)

        def hook(module: Any, args: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            value = (output[0] if is_tuple else output).clone()
            value[each, each] = stream[0, :n_positions]
            return (value, *output[1:]) if is_tuple else value

        handle = plain.model.layers[layer].register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits = plain(given["clean"].expand(n_positions, -1), use_cache=False).logits
        finally:
            handle.remove()
        return (metric(logits) - given["base"]).tolist()

    serve({"pair": set_pair, "nnsight": by_nnsight, "hooks": by_hooks})


if __name__ == "__main__":
    main()

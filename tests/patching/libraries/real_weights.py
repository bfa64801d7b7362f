"""Real weights for libraries in environments of their own, and what another library computed with them.

`python real_weights.py smollm2 FILE`, run where the demo's environment is, writes one file with all that a test
needs, so that a library's environment needs no tokenizer, no text and no other library:

- `weights/NAME`: float32, named and laid out as on Hugging Face (linear maps `[out, in]`, heads one after another,
  rotary pairs in halves); a tied unembedding is left out;
- `rows`, `loss`: 16 rows of 128 tokens of English, and the mean loss on them, in nats a token;
- `tokens`: 2 rows of 24 tokens; `sites/LAYER/NAME` (LAYER empty for the whole model's): every site of a pass over them.
"""

import os
import pathlib
import sys
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parents[3] / ".venv-patches" / "references"


class RealWeights:
    """One file, read lazily."""

    def __init__(self, name: str):
        self._file = np.load(FOLDER / f"{name}.npz")

    def weight(self, name: str) -> np.ndarray:
        """A tensor by its Hugging Face name."""
        return self._file[f"weights/{name}"]

    @property
    def rows(self) -> np.ndarray:
        """[16, 128] token ids."""
        return self._file["rows"]

    @property
    def loss(self) -> float:
        """The reference loss on `rows`."""
        return float(self._file["loss"])

    @property
    def tokens(self) -> np.ndarray:
        """[2, 24] token ids, those of the sites."""
        return self._file["tokens"]

    @property
    def sites(self) -> dict[tuple[int | None, str], np.ndarray]:
        """Every site's value on `tokens`."""
        found = {}
        for key in self._file.files:
            if key.startswith("sites/"):
                _, layer, name = key.split("/")
                found[int(layer) if layer else None, name] = self._file[key]
        return found


def mean_loss(logits: np.ndarray, rows: np.ndarray) -> float:
    """The mean next-token loss, in nats, in float64."""
    logits = np.asarray(logits[:, :-1], np.float64)
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return float((log_sum - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]).mean())


def write(out: pathlib.Path, weights: dict[str, np.ndarray], forward: Any, params: Any, rows: np.ndarray) -> None:
    """Runs a model and writes its file.

    Args:
        out: the file.
        weights: by Hugging Face name.
        forward: `forward(params, tokens) -> logits`, with every site.
        params: its first argument.
        rows: [16, 128].
    """
    import jax

    import interp_jax as ij

    logits = np.concatenate([np.asarray(jax.jit(forward)(params, part)) for part in np.split(rows, 4)])
    tokens = rows[:2, :24]
    _, sites = ij.fetch(forward)(params, tokens)
    contents = {f"weights/{name}": np.asarray(value, np.float32) for name, value in weights.items()}
    for (layer, name), value in sites.items():
        contents[f"sites/{'' if layer is None else layer}/{name}"] = np.asarray(value, np.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part.npz")
    np.savez(part, rows=rows, tokens=tokens, loss=mean_loss(logits, rows), **contents)
    os.replace(part, out)


def _write_smollm2(out: pathlib.Path) -> None:
    from interp_jax.activations.wikipedia import reference_rows
    from interp_jax.models.flax_llama import load_smollm2

    model = load_smollm2()
    params = model.params["model"]
    weights = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["weight"],
    }
    for layer, block in params["layers"].items():
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{part}.weight"] = block[part]["weight"]
        for group in ("self_attn", "mlp"):
            for name, each in block[group].items():
                weights[f"model.layers.{layer}.{group}.{name}.weight"] = each["kernel"].T
    write(out, weights, model.forward, model.params, np.asarray(reference_rows(model.tokenizer))[:16, :128])


if __name__ == "__main__":
    {"smollm2": _write_smollm2}[sys.argv[1]](pathlib.Path(sys.argv[2]))

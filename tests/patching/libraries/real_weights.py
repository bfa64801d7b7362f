"""Real weights for libraries in environments of their own, and what another library computed with them.

`python real_weights.py NAME`, run where the demo's environment is, writes one file with all that a test needs, so
that a library's environment needs no tokenizer, no text and no other library:

- `weights/NAME`: float32, named and laid out as on Hugging Face (linear maps `[out, in]`, heads one after another,
  rotary pairs in halves, Gemma's norms without the one that is added to them); a tied unembedding is left out;
- `rows`: 16 rows of 128 tokens of English, each with the begin-of-text token first where the model wants one;
- `loss`: the mean loss on them, in nats a token;
- `tokens`: 2 rows of 24 tokens; `sites/LAYER/NAME` (LAYER empty for the whole model's): every site of a pass over them.

NAME is `smollm2`, which transformers' Flax classes run, or `gemma3-weights`, which they cannot: `loss` and `sites` are
then written to a second file, gemma3-sites.npz, where the library gemma is installed (gemma3_270m.py).
"""

import os
import pathlib
import sys
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parents[3] / ".venv-patches" / "references"


class RealWeights:
    """What is known of a model, read lazily: from NAME.npz, and from NAME-sites.npz where that is a file of its own."""

    def __init__(self, name: str):
        self._contents: dict[str, Any] = {}
        for path in (FOLDER / f"{name}.npz", FOLDER / f"{name}-sites.npz"):
            if path.exists():
                file = np.load(path)
                self._contents |= dict.fromkeys(file.files, file)
        if not self._contents:
            raise FileNotFoundError(f"{FOLDER / name}.npz is missing: see the Makefile.")

    def weight(self, name: str) -> np.ndarray:
        """A tensor by its Hugging Face name."""
        return self._read(f"weights/{name}")

    @property
    def rows(self) -> np.ndarray:
        """[16, 128] token ids."""
        return self._read("rows")

    @property
    def loss(self) -> float:
        """The reference loss on `rows`, in nats a token."""
        return float(self._read("loss"))

    @property
    def tokens(self) -> np.ndarray:
        """[2, 24] token ids, those of the sites."""
        return self._read("tokens")

    @property
    def sites(self) -> dict[tuple[int | None, str], np.ndarray]:
        """Every site's value on `tokens`."""
        found = {}
        for key in self._contents:
            if key.startswith("sites/"):
                _, layer, name = key.split("/")
                found[int(layer) if layer else None, name] = self._read(key)
        return found

    def _read(self, key: str) -> np.ndarray:
        return self._contents[key][key]


def mean_loss(logits: np.ndarray, rows: np.ndarray) -> float:
    """The mean next-token loss, in nats, in float64; row by row, since a vocabulary may be large."""
    losses = []
    for row, tokens in zip(logits, rows, strict=True):
        row = np.asarray(row[:-1], np.float64)
        highest = row.max(-1, keepdims=True)
        log_sum = np.log(np.exp(row - highest).sum(-1)) + highest[..., 0]
        losses.append((log_sum - np.take_along_axis(row, tokens[1:, None], -1)[..., 0]).mean())
    return float(np.mean(losses))


def loss_of(forward: Any, params: Any, rows: np.ndarray) -> float:
    """The mean next-token loss of `forward(params, tokens) -> logits` on rows, a few at a time, compiled."""
    import jax

    compiled = jax.jit(forward)
    parts = np.split(rows, len(rows) // 4)
    return float(np.mean([mean_loss(np.asarray(compiled(params, part)), part) for part in parts]))


def write_pass(name: str, forward: Any, params: Any, rows: np.ndarray, contents: dict[str, Any]) -> None:
    """Runs a model and writes what came out.

    Args:
        name: the file's name in the folder of references, without its ending.
        forward: `forward(params, tokens) -> logits`, with every site.
        params: its first argument.
        rows: [16, 128].
        contents: what else to write.
    """
    import interp_jax as ij

    _, sites = ij.fetch(forward)(params, rows[:2, :24])
    values = {
        f"sites/{'' if layer is None else layer}/{site}": np.asarray(value, np.float32)
        for (layer, site), value in sites.items()
    }
    save(FOLDER / f"{name}.npz", {"loss": loss_of(forward, params, rows), **values, **contents})


def save(out: pathlib.Path, contents: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part.npz")
    np.savez(part, **contents)
    os.replace(part, out)


def _rows_and_weights(rows: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {f"weights/{name}": np.asarray(value, np.float32) for name, value in weights.items()}
    return {"rows": rows, "tokens": rows[:2, :24], **named}


def _write_smollm2() -> None:
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
    rows = np.asarray(reference_rows(model.tokenizer))[:16, :128]
    write_pass("smollm2", model.forward, model.params, rows, _rows_and_weights(rows, weights))


def _write_gemma3_weights() -> None:
    from interp_jax import installed_data
    from interp_jax.activations.wikipedia import reference_rows
    from interp_jax.models.gguf_file import GgufFile
    from interp_jax.models.gguf_model import GgufCheckpoint
    from interp_jax.models.tokenizer import Tokenizer

    gguf_file = GgufFile(installed_data.find("gemma3"))
    tokenizer = Tokenizer.from_gguf(gguf_file)
    # Without its begin-of-text token the model is lost.
    rows = np.insert(np.asarray(reference_rows(tokenizer))[:16, :127], 0, tokenizer.bos_id, axis=1)
    checkpoint = GgufCheckpoint(gguf_file)
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names}
    save(FOLDER / "gemma3.npz", _rows_and_weights(rows, weights))


if __name__ == "__main__":
    {"smollm2": _write_smollm2, "gemma3-weights": _write_gemma3_weights}[sys.argv[1]]()

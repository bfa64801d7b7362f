"""The project's own tiny language model: real, trained, and there without a download.

About a million parameters, byte-level BPE of 2048 tokens, trained on an excerpt of the English Wikipedia by
`python -m interp_jax.train_tiny`. The files lie in `interp_jax/models/tiny_wikipedia/`: `config.json`,
`model.safetensors` (float16; computed in float32), `tokenizer.json`, `training.json` (losses, baselines, settings, the
titles of the articles that it has not seen, checksums) and `training_curve.svg`. `training.json` is written last: files
that do not have its checksums are of another run, or of one that was interrupted while it wrote, and are refused.

It writes English-looking nonsense. It is meant for tests, documentation and first steps, where what matters is that
activations are those of a trained model and that everything takes milliseconds.
"""

import contextlib
import hashlib
import importlib.resources
import json
from pathlib import Path
from typing import Unpack

from interp_jax.models import saved_model
from interp_jax.models.from_files import as_language_model
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.weights import LoadOptions

__all__ = ["checksums", "load_tiny"]


def load_tiny(directory: str | Path | None = None, **options: Unpack[LoadOptions]) -> LanguageModel:
    """The tiny model, ready to run.

    Args:
        directory: Where its files lie, as `train_tiny` wrote them; those of the package when None.
        **options: See `LoadOptions`.

    Returns:
        The model. Its parameters are a `Transformer`, in float32 unless asked otherwise.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or is not of the run that `training.json` records.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            # as_file: a real path also where the package is read out of a zip.
            packaged = importlib.resources.files("interp_jax.models") / "tiny_wikipedia"
            directory = stack.enter_context(importlib.resources.as_file(packaged))
        model = saved_model.load(directory, **options)
        tokenizer = Tokenizer.from_file(Path(directory) / "tokenizer.json")
        recorded = _recorded_checksums(Path(directory) / "training.json")
        for name, checksum in checksums(directory).items():
            if recorded.get(name) != checksum:
                raise ValueError(
                    f"{Path(directory) / name} is not the file that training.json beside it records: it is damaged, or "
                    "of another training run. Install the package again, or train again."
                )
    return as_language_model(model, tokenizer, "tiny-wikipedia")


def checksums(directory: str | Path) -> dict[str, str]:
    """SHA-256 of the tokenizer and of the weights; `config.json` is in the weights' own header.

    Args:
        directory: Where the two files lie.

    Returns:
        Hexadecimal digest by file name. The tokenizer's does not depend on how its lines end.
    """
    directory = Path(directory)
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")  # any line ending becomes "\n"
    contents = {"model.safetensors": (directory / "model.safetensors").read_bytes(), "tokenizer.json": text.encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _recorded_checksums(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error!r}); install the package again.") from error

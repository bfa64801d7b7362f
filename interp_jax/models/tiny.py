"""The project's own tiny language model: real, trained, and there without a download.

About two million parameters, byte-level BPE of 2048 tokens, trained on an excerpt of the English Wikipedia by
`python -m interp_jax.models.train_tiny`. The files lie in `interp_jax/models/tiny_wikipedia/`: `config.json`,
`model.safetensors` (float16; computed in float32), `tokenizer.json`, `training.json` (losses, baselines, settings, and
the titles of the articles that it has not seen) and `training_curve.svg`.

It writes English-looking nonsense. It is meant for tests, documentation and first steps, where what matters is that
activations are those of a trained model and that everything takes milliseconds.
"""

import contextlib
import importlib.resources
from pathlib import Path

from interp_jax.models import transformer
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer

__all__ = ["load_tiny"]


def load_tiny(directory: str | Path | None = None) -> LanguageModel:
    """The tiny model, ready to run.

    Args:
        directory: Where its files lie, as `train_tiny` wrote them; those of the package when None.

    Returns:
        The model. Its parameters are a `Transformer`, in float32.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or the tokenizer and the model are not of one vocabulary.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            # as_file: a real path also where the package is read out of a zip.
            packaged = importlib.resources.files("interp_jax.models") / "tiny_wikipedia"
            directory = stack.enter_context(importlib.resources.as_file(packaged))
        model = transformer.load(directory)
        tokenizer = Tokenizer.from_file(Path(directory) / "tokenizer.json")
    config = model.config
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; "
            "they are not of one training run."
        )
    return LanguageModel(
        name="tiny-wikipedia",
        forward=transformer.apply,
        params=model,
        tokenizer=tokenizer,
        n_layers=config.n_layers,
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        context=config.context,
        unembed=transformer.promoted_logits,
    )

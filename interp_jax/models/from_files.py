"""A `LanguageModel` from files: weights into this project's `Transformer`, and the tokenizer beside them."""

import os
from pathlib import Path
from typing import Any

from interp_jax import installed_data
from interp_jax.models import transformer
from interp_jax.models.gguf_file import GgufFile
from interp_jax.models.gguf_model import load_gguf
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer

__all__ = ["as_language_model", "load_gemma3", "load_path", "load_smollm2"]


def as_language_model(model: Transformer, tokenizer: Tokenizer, name: str) -> LanguageModel:
    """A `Transformer` ready for experiments.

    Args:
        model: The parameters.
        tokenizer: Its tokenizer.
        name: What tables and pages call it.

    Returns:
        The model.

    Raises:
        ValueError: The tokenizer has more tokens than the model.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {name} has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: they are "
            "not of one model."
        )
    return LanguageModel(
        name=name,
        forward=transformer.apply,
        params=model,
        tokenizer=tokenizer,
        n_layers=config.n_layers,
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        context=config.context,
        unembed=transformer.promoted_logits,
    )


def load_path(path: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """A model from a Hugging Face directory or a GGUF file.

    Args:
        path: A directory with `config.json`, safetensors and `tokenizer.json`, or a file that ends in `.gguf`.
        **options: As in `load_hugging_face`: `dtype`, `compute_dtype`, `layers`, `remat`, `mesh`, `check_finite`.

    Returns:
        The model, named as the directory or the file.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or is of a family that is not known.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        gguf_file = GgufFile(path)
        # The tokenizer first: it is quick, and its faults shall not come after minutes.
        tokenizer = Tokenizer.from_gguf(gguf_file)
        return as_language_model(load_gguf(gguf_file, **options), tokenizer, path.stem)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory, nor a file that ends in .gguf.")
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{path / 'tokenizer.json'} is not there. interp_jax.models.hugging_face.load_hugging_face reads the "
            "weights alone."
        )
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    return as_language_model(load_hugging_face(path, **options), tokenizer, path.resolve().name)


def load_smollm2(**options: Any) -> LanguageModel:
    """SmolLM2-135M-Instruct, from its GGUF file. `flax_llama.load_smollm2` runs it on third-party code instead.

    Args:
        **options: As in `load_hugging_face`.

    Returns:
        The model; 30 layers, d_model 576, vocabulary 49152.

    Raises:
        MissingDataError: The weights are not installed; names the command that gets them.
    """
    gguf_file = GgufFile(installed_data.find("smollm2"))
    return as_language_model(load_gguf(gguf_file, **options), Tokenizer.from_gguf(gguf_file), "SmolLM2-135M-Instruct")


def load_gemma3(**options: Any) -> LanguageModel:
    """Gemma 3 270M (base), from its GGUF file; Gemma's own terms.

    Its first token must be the tokenizer's `bos_id`: without it the model is lost.

    Args:
        **options: As in `load_hugging_face`.

    Returns:
        The model; 18 layers, d_model 640, vocabulary 262144.

    Raises:
        MissingDataError: The weights are not installed; names the command that gets them.
    """
    gguf_file = GgufFile(installed_data.find("gemma3"))
    return as_language_model(load_gguf(gguf_file, **options), Tokenizer.from_gguf(gguf_file), "gemma-3-270m")

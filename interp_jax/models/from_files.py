"""A `LanguageModel` from files: weights into this project's `Transformer`, and the tokenizer beside them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Unpack

from interp_jax import installed_data
from interp_jax.models import transformer
from interp_jax.models.gguf_file import GgufFile
from interp_jax.models.gguf_model import open_gguf
from interp_jax.models.hugging_face import open_hugging_face
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.safetensors_folder import read_json
from interp_jax.models.saved_model import is_saved_model, open_saved, save
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer
from interp_jax.models.weights import LoadOptions, OpenedModel, assemble
from interp_jax.whole_file import write_whole

__all__ = [
    "as_language_model",
    "load_gemma3",
    "load_path",
    "load_smollm2",
    "open_path",
    "read_tokenizer",
    "save_language_model",
]


def as_language_model(
    model: Transformer, tokenizer: Tokenizer, name: str, *, more_stop_tokens: tuple[int, ...] = ()
) -> LanguageModel:
    """A `Transformer` ready for experiments.

    Args:
        model: The parameters.
        tokenizer: Its tokenizer.
        name: What tables and pages call it.
        more_stop_tokens: As in `LanguageModel`.

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
        more_stop_tokens=more_stop_tokens,
    )


def load_path(path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> LanguageModel:
    """A model from a directory, Hugging Face's or one of `save_language_model`, or from a GGUF file.

    Args:
        path: A directory with `config.json`, safetensors and `tokenizer.json`, or a file that ends in `.gguf`.
        **options: See `LoadOptions`.

    Returns:
        The model, named as the directory or the file.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or is of a family that is not known.
    """
    # The tokenizer first: it is quick, and its faults shall not come after minutes.
    tokenizer, more_stop_tokens = read_tokenizer(path)
    path = Path(path)
    name = path.stem if path.suffix == ".gguf" else path.resolve().name
    return as_language_model(assemble(open_path(path), **options), tokenizer, name, more_stop_tokens=more_stop_tokens)


def open_path(path: str | os.PathLike[str]) -> OpenedModel:
    """The weights of `load_path`, of which no tensor is read yet.

    Args:
        path: As in `load_path`; a tokenizer is not needed.

    Returns:
        The opened files.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or is of a family that is not known.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory, nor a file that ends in .gguf.")
    return open_saved(path) if is_saved_model(path) else open_hugging_face(path)


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer of `load_path`, and what the model's other files say of where a text ends.

    Args:
        path: As in `load_path`.

    Returns:
        The tokenizer, and stop tokens besides its own.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, or the tokenizer cannot be rebuilt.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        gguf_file = GgufFile(path)
        turn_end = gguf_file.metadata.get("tokenizer.ggml.eot_token_id")
        return Tokenizer.from_gguf(gguf_file), () if turn_end is None else (int(turn_end),)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory, nor a file that ends in .gguf.")
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{path / 'tokenizer.json'} is not there. transformers writes one: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...). interp_jax.models.hugging_face.load_hugging_face reads the weights alone."
        )
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    return tokenizer, _stop_tokens(path, tokenizer)


def save_language_model(model: LanguageModel, directory: str | os.PathLike[str], *, dtype: Any = None) -> None:
    """Writes a model and its tokenizer into a directory, for `load_path`.

    Args:
        model: One that runs on a `Transformer`.
        directory: Where; made if it is not there.
        dtype: Of the stored tensors; the parameters' own when None.

    Raises:
        ValueError: The model runs on another library's code, or `dtype` is too narrow.
    """
    if not isinstance(model.params, Transformer):
        raise ValueError(f"{model.name} runs on another library's code; save it with that library.")
    model.tokenizer.save(directory)
    if model.more_stop_tokens:
        fields = json.dumps({"eos_token_id": list(model.stop_tokens)}) + "\n"
        write_whole(Path(directory) / "generation_config.json", fields)
    save(model.params, Path(directory), dtype=dtype)


def _stop_tokens(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a model's files say beside its tokenizer of where a text ends."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    known = {tokenizer.eos_id, tokenizer.end_of_text_id}
    return tuple(sorted(each for each in found - known if isinstance(each, int) and 0 <= each < tokenizer.vocab_size))


def load_smollm2(**options: Unpack[LoadOptions]) -> LanguageModel:
    """SmolLM2-135M-Instruct, from its GGUF file. `flax_llama.load_smollm2` runs it on third-party code instead.

    Args:
        **options: See `LoadOptions`.

    Returns:
        The model; 30 layers, d_model 576, vocabulary 49152.

    Raises:
        MissingDataError: The weights are not installed; names the command that gets them.
    """
    model = load_path(installed_data.find("smollm2"), **options)
    return dataclasses.replace(model, name="SmolLM2-135M-Instruct")


def load_gemma3(**options: Unpack[LoadOptions]) -> LanguageModel:
    """Gemma 3 270M (base), from its GGUF file; Gemma's own terms.

    Its first token must be the tokenizer's `bos_id`: without it the model is lost.

    Args:
        **options: See `LoadOptions`.

    Returns:
        The model; 18 layers, d_model 640, vocabulary 262144.

    Raises:
        MissingDataError: The weights are not installed; names the command that gets them.
    """
    return dataclasses.replace(load_path(installed_data.find("gemma3"), **options), name="gemma-3-270m")

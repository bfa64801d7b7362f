"""A `LanguageModel` from files: weights into this project's `Transformer`, and the tokenizer beside them."""

import json
import os
from pathlib import Path
from typing import Any

from interp_jax import installed_data
from interp_jax.models import saved_model, transformer
from interp_jax.models.gguf_file import GgufFile
from interp_jax.models.gguf_model import load_gguf
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.safetensors_folder import read_json
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer
from interp_jax.whole_file import write_whole

__all__ = ["as_language_model", "load_gemma3", "load_path", "load_smollm2", "save_language_model"]


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


def load_path(path: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """A model from a directory, Hugging Face's or one of `save_language_model`, or from a GGUF file.

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
        turn_end = gguf_file.metadata.get("tokenizer.ggml.eot_token_id")
        more = () if turn_end is None else (int(turn_end),)
        return as_language_model(load_gguf(gguf_file, **options), tokenizer, path.stem, more_stop_tokens=more)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory, nor a file that ends in .gguf.")
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{path / 'tokenizer.json'} is not there. transformers writes one: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...). interp_jax.models.hugging_face.load_hugging_face reads the weights alone."
        )
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    read = saved_model.load if saved_model.is_saved_model(path) else load_hugging_face
    return as_language_model(
        read(path, **options), tokenizer, path.resolve().name, more_stop_tokens=_stop_tokens(path, tokenizer)
    )


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
    saved_model.save(model.params, Path(directory), dtype=dtype)


def _stop_tokens(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a model's files say beside its tokenizer of where a text ends."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    known = {tokenizer.eos_id, tokenizer.end_of_text_id}
    return tuple(sorted(each for each in found - known if isinstance(each, int) and 0 <= each < tokenizer.vocab_size))


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

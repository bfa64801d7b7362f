"""`interp-jax model`: what a model's files say, and whether their tensors are sound.

Only headers are read, and with `--check` one tensor at a time: it works on models that would not fit into memory.
"""

import pathlib

import jax
import numpy as np

from interp_jax.models.from_files import open_path, read_tokenizer
from interp_jax.models.known import path_of
from interp_jax.models.transformer import Transformer
from interp_jax.models.weights import OpenedModel, faults
from interp_jax.progress import advancing

__all__ = ["show"]


def show(name: str, *, check: bool) -> int:
    """Prints what a model is.

    Args:
        name: As in `interp_jax.models.known.load`.
        check: Whether to look through its tensors.

    Returns:
        The exit status: 1 where a tensor has a fault.

    Raises:
        ValueError: The model is not known, or its files are damaged.
        FileNotFoundError: A file is not there.
    """
    path = path_of(name)
    opened = open_path(path)
    n_parameters = _count(opened)
    rows = {"files": str(path), **_config_rows(opened, n_parameters), **_tokenizer_rows(path)}
    width = max(map(len, rows))
    for what, value in rows.items():
        print(f"{what:<{width}}  {value}")
    if not check:
        return 0
    with advancing("Reading tensors", n_parameters, unit="parameters") as advance:
        found = faults(opened, advance)
    print(*(found or ["Every tensor is there, has its shape and is finite."]), sep="\n")
    return 1 if found else 0


def _count(opened: OpenedModel) -> int:
    shapes = jax.eval_shape(lambda: Transformer(opened.config, jax.random.key(0)))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _config_rows(opened: OpenedModel, n_parameters: int) -> dict[str, str]:
    gigabytes = f"{n_parameters * 4 / 1e9:.2g} GB in float32, {n_parameters * 2 / 1e9:.2g} in bfloat16"
    rows = {"parameters": f"{n_parameters:,}; {gigabytes}"}
    for field, value in opened.config.as_json().items():
        if field == "local_layers":
            value = ", ".join(str(layer) for layer, is_local in enumerate(value) if is_local) or "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        rows[field] = str(value)
    return rows


def _tokenizer_rows(path: pathlib.Path) -> dict[str, str]:
    try:
        tokenizer, more_stop_tokens = read_tokenizer(path)
    except (ValueError, FileNotFoundError) as error:
        return {"tokenizer": f"none that can be used: {error}"}

    def named(id_: int | None) -> str:
        return "none" if id_ is None else f"{tokenizer.readable([id_])[0]} ({id_})"

    rows = {
        "tokenizer": f"{tokenizer.vocab_size:,} tokens",
        "bos": named(tokenizer.bos_id),
        "eos": named(tokenizer.eos_id),
    }
    if more_stop_tokens:
        rows["other stop tokens"] = ", ".join(map(named, more_stop_tokens))
    return rows

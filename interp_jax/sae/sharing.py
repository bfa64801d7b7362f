"""Autoencoders to and from other tools: the layout of a folder is known by the files in it.

    sae = load_sae("layer_20/width_16k/average_l0_71")
    save_sae(sae, "mine", model_name="gemma-2-2b", hook_name="blocks.20.hook_resid_post")

Each layout has a module of its own beside this one. Files are data: nothing is unpickled, nothing is executed.
"""

import os
import pathlib
from typing import Any, Literal

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.gemma_scope import (
    GEMMA_SCOPE_2_WEIGHTS,
    GEMMA_SCOPE_WEIGHTS,
    load_gemma_scope,
    save_gemma_scope,
    save_gemma_scope_2,
)
from interp_jax.sae.saelens import SAELENS_WEIGHTS, load_saelens, save_saelens
from interp_jax.sae.sparsify import SPARSIFY_WEIGHTS, load_sparsify, save_sparsify

__all__ = ["files_of_weights", "load_sae", "save_sae"]

_LAYOUT_OF = {
    SAELENS_WEIGHTS: "saelens",
    SPARSIFY_WEIGHTS: "sparsify",
    GEMMA_SCOPE_WEIGHTS: "gemma_scope",
    GEMMA_SCOPE_2_WEIGHTS: "gemma_scope_2",
}
_WRITERS = {
    "saelens": save_saelens,
    "sparsify": save_sparsify,
    "gemma_scope": save_gemma_scope,
    "gemma_scope_2": save_gemma_scope_2,
}


def load_sae(path: str | os.PathLike[str]) -> SparseAutoencoder:
    """Reads an autoencoder or a transcoder that SAELens, sparsify, Gemma Scope or this project wrote.

    Args:
        path: its folder, or the file of weights in it.

    Returns:
        The autoencoder.

    Raises:
        FileNotFoundError: if nothing is there, or nothing of a known layout; the message lists what is.
        ValueError: if a folder holds several layouts, or for what the layout's own module refuses.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        there = files_of_weights(path)
        if len(there) > 1:
            raise ValueError(f"{path} holds {' and '.join(there)}; give the path of the one to read.")
        if not there:
            raise FileNotFoundError(_nothing_known(path))
        path = path / there[0]
    elif not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a folder with {_known_files()}, or one of those files.")
    layout = _LAYOUT_OF.get(path.name)
    if layout == "saelens":
        return load_saelens(path.parent)
    if layout == "sparsify":
        return load_sparsify(path.parent)
    # Gemma Scope 2 names some of its files after a layer.
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} is of no known layout; expected {_known_files()}. Pickled weights are never read.")
    return load_gemma_scope(path)


def save_sae(
    sae: SparseAutoencoder,
    path: str | os.PathLike[str],
    *,
    layout: Literal["saelens", "sparsify", "gemma_scope", "gemma_scope_2"] = "saelens",
    **facts: Any,
) -> pathlib.Path:
    """Writes an autoencoder or a transcoder in another tool's layout; `load_sae` reads it back.

    Args:
        sae: the autoencoder.
        path: the folder to write to; it is made.
        layout: saelens, for all but TopK transcoders with a skip or of two widths; sparsify, for TopK of one width;
            gemma_scope and gemma_scope_2, for all but TopK, the latter with a skip too.
        **facts: `model_name` and `hook_name`, which saelens and gemma_scope_2 ask for, and whatever else these are to
            keep; the other two have no place for any.

    Returns:
        The folder.

    Raises:
        ValueError: if the layout is unknown, or has no place for such an autoencoder.
        TypeError: if a fact is missing, has no place, or is not JSON.
        FileExistsError: if an autoencoder of another layout is there, whose config may have the same name.
        OSError: if a file cannot be written.
    """
    if layout not in _WRITERS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(_WRITERS)}.")
    others = [name for name in files_of_weights(path) if _LAYOUT_OF[name] != layout]
    if others:
        raise FileExistsError(f"{path} holds {others[0]}, of the layout {_LAYOUT_OF[others[0]]}; give another folder.")
    writer: Any = _WRITERS[layout]
    return writer(sae, path, **facts)


def files_of_weights(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the weights of the known layouts that are in a folder.

    Args:
        folder: it need not be there.
    """
    return [name for name in _LAYOUT_OF if (pathlib.Path(folder) / name).is_file()]


def _known_files() -> str:
    return ", ".join(f"{name} ({layout})" for name, layout in _LAYOUT_OF.items())


def _nothing_known(folder: pathlib.Path) -> str:
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:20]) or "nothing"
    inside = sorted({str(file.parent) for name in _LAYOUT_OF for file in folder.glob(f"*/{name}")})
    hint = f" Autoencoders are in {', '.join(inside[:5])}: give one of these." if inside else ""
    return f"{folder} holds {found}; expected {_known_files()}.{hint}"

"""Gemma Scope's two layouts on disk (Lieberum et al. 2024): JumpReLU autoencoders and transcoders.

- The first: `params.npz` with `W_enc, W_dec, b_enc, b_dec, threshold`.
- Gemma Scope 2: `params.safetensors` with the same in lower case and, in a transcoder with a linear path,
  `affine_skip_connection[d_in, d_out]`, the transpose of our `W_skip`; `config.json` stands beside it.

Neither subtracts `b_dec` from the input. What is written here is brought to that form, and to a JumpReLU, first
(`equivalents`).

The first release's autoencoders of Gemma 2's *embedding* were trained on rows of the embedding matrix, before the model
multiplies them by sqrt(d_in); weights are read as they are stored.
"""

import io
import os
import pathlib
from typing import Any

import numpy as np

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.equivalents import as_jumprelu, uncentred
from interp_jax.sae.jumprelu import JumpReLUSAE
from interp_jax.sae.weights_files import (
    build,
    check_checksum,
    check_tensors,
    drop_unit_scaling,
    option,
    read_config,
    read_npz,
    read_safetensors,
    write_weights_and_config,
)
from interp_jax.whole_file import write_whole

__all__ = [
    "GEMMA_SCOPE_2_WEIGHTS",
    "GEMMA_SCOPE_WEIGHTS",
    "load_gemma_scope",
    "save_gemma_scope",
    "save_gemma_scope_2",
]

GEMMA_SCOPE_WEIGHTS = "params.npz"
GEMMA_SCOPE_2_WEIGHTS = "params.safetensors"
_CONFIG = "config.json"
_SKIP = "affine_skip_connection"

_OURS = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
_SHAPES = {
    "w_enc": ("d_in", "d_sae"),
    "w_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
}


def load_gemma_scope(path: str | os.PathLike[str]) -> JumpReLUSAE:
    """Reads an autoencoder or a transcoder of either release.

    Args:
        path: the folder of `params.npz` or `params.safetensors`, or the file itself, whatever it is called.

    Returns:
        The autoencoder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is cut short or altered, tensors are missing, unknown or misshapen, the config tells of
            something else than the weights hold, or they are a cross-layer transcoder's.
    """
    weights = _weights_file(pathlib.Path(path))
    is_npz = weights.suffix == ".npz"
    stored = read_npz(weights) if is_npz else read_safetensors(weights)
    drop_unit_scaling(stored)
    # The first release has W in upper case, the second in lower.
    arrays = {name.lower(): array for name, array in stored.items()}
    if len(arrays) < len(stored):
        raise ValueError(f"{weights} holds {', '.join(sorted(stored))}: some of them twice. Fetch it again.")
    config_path = weights.with_name(_CONFIG)
    config = {} if is_npz or not config_path.is_file() else read_config(config_path)
    architecture = option(config, config_path, "architecture", str, "jump_relu")
    if architecture != "jump_relu":
        raise ValueError(f"{config_path}: the architecture {architecture!r} cannot be read; only 'jump_relu' can.")
    if "w_dec" in arrays and arrays["w_dec"].ndim == 3:
        raise ValueError(
            f"{weights}: w_dec has shape {list(arrays['w_dec'].shape)}, one dictionary for every layer: a cross-layer "
            "transcoder, which cannot be read. Use a transcoder of one layer."
        )
    has_skip = option(config, config_path, "affine_connection", bool, _SKIP in arrays)
    check_tensors(weights, arrays, _SHAPES | ({_SKIP: ("d_in", "d_out")} if has_skip else {}))
    check_checksum(weights, config_path, config)
    ours = {name: arrays[theirs] for theirs, name in _OURS.items()}
    if has_skip:
        ours["W_skip"] = arrays[_SKIP].T
    return build(weights, JumpReLUSAE, ours, apply_b_dec_to_input=False)


def _weights_file(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        return path
    there = [path / name for name in (GEMMA_SCOPE_WEIGHTS, GEMMA_SCOPE_2_WEIGHTS) if (path / name).is_file()]
    if len(there) == 2:
        raise ValueError(f"{path} holds both {there[0].name} and {there[1].name}; give the path of the one to read.")
    if not there:
        found = ", ".join(sorted(item.name for item in path.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{path} holds {found}; expected {GEMMA_SCOPE_WEIGHTS} (Gemma Scope) or {GEMMA_SCOPE_2_WEIGHTS} (2)."
        )
    return there[0]


def save_gemma_scope(sae: SparseAutoencoder, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `params.npz`, which holds numbers alone: no model's or site's name.

    Args:
        sae: any autoencoder but a TopK, or a transcoder without a skip.
        directory: the folder to write to; it is made.

    Returns:
        The folder.

    Raises:
        ValueError: for TopK, and for a transcoder with a skip.
        OSError: if the file cannot be written.
    """
    if sae.W_skip is not None:
        raise ValueError("Gemma Scope's params.npz has no place for W_skip; use the layout gemma_scope_2.")
    arrays = _written_arrays(sae)
    content = io.BytesIO()
    named: dict[str, Any] = {name: arrays[theirs] for theirs, name in _OURS.items()}
    np.savez(content, **named)
    directory = pathlib.Path(directory)
    write_whole(directory / GEMMA_SCOPE_WEIGHTS, content.getvalue())
    return directory


def save_gemma_scope_2(
    sae: SparseAutoencoder,
    directory: str | os.PathLike[str],
    *,
    model_name: str,
    hook_name: str,
    hook_name_out: str | None = None,
    **metadata: Any,
) -> pathlib.Path:
    """Writes `params.safetensors` and `config.json`.

    Args:
        sae: any autoencoder or transcoder but a TopK.
        directory: the folder to write to; it is made.
        model_name: the model that the activations are from.
        hook_name: the site that is read, in whatever form the reader knows.
        hook_name_out: the site that a transcoder predicts.
        **metadata: anything else to keep; JSON.

    Returns:
        The folder.

    Raises:
        ValueError: for TopK.
        TypeError: if the metadata is not JSON; nothing is written then.
        OSError: if a file cannot be written.
    """
    config = metadata | {
        "architecture": "jump_relu",
        "model_name": model_name,
        "hf_hook_point_in": hook_name,
        "width": sae.d_sae,
        "affine_connection": sae.W_skip is not None,
    }
    if hook_name_out is not None:
        config["hf_hook_point_out"] = hook_name_out
    directory = pathlib.Path(directory)
    arrays = _written_arrays(sae)
    write_weights_and_config(directory / GEMMA_SCOPE_2_WEIGHTS, arrays, directory / _CONFIG, config)
    return directory


def _written_arrays(sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    jumprelu = as_jumprelu(uncentred(sae))
    arrays = {theirs: np.asarray(jumprelu.parameter(name)) for theirs, name in _OURS.items() if name != "threshold"}
    arrays["threshold"] = np.asarray(jumprelu.thresholds())
    if jumprelu.W_skip is not None:
        arrays[_SKIP] = np.asarray(jumprelu.W_skip[...]).T
    # NPZ has no half precision of the kind that TPUs use; both releases are of float32.
    return {name: array if array.dtype == np.float64 else array.astype(np.float32) for name, array in arrays.items()}

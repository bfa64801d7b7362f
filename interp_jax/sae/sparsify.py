"""sparsify's layout on disk (EleutherAI): `cfg.json` and `sae.safetensors`; TopK autoencoders and transcoders.

`encoder.weight[d_sae, d_in]` is our `W_enc` transposed, `encoder.bias` our `b_enc`; `W_dec`, `b_dec` and `W_skip` are
ours. Outputs are as wide as inputs. An autoencoder subtracts `b_dec` from its input and a transcoder (`transcode`) does
not. The layout holds no model's or site's name: sparsify names the folder after the site.
"""

import os
import pathlib

import numpy as np

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.topk import TopKSAE
from interp_jax.sae.weights_files import (
    build,
    check_checksum,
    check_tensors,
    option,
    read_config,
    read_safetensors,
    write_weights_and_config,
)

__all__ = ["SPARSIFY_WEIGHTS", "load_sparsify", "save_sparsify"]

SPARSIFY_WEIGHTS = "sae.safetensors"
_CONFIG = "cfg.json"
_SHAPES = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
}
_SKIP = {"W_skip": ("d_in", "d_in")}


def load_sparsify(directory: str | os.PathLike[str]) -> TopKSAE:
    """Reads an autoencoder or a transcoder.

    Args:
        directory: a folder with `cfg.json` and `sae.safetensors`: of one site, not of a whole run.

    Returns:
        The autoencoder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is cut short or altered, tensors are missing, unknown or misshapen, or the activation
            function is another one than TopK.
    """
    config_path = pathlib.Path(directory) / _CONFIG
    weights_path = config_path.with_name(SPARSIFY_WEIGHTS)
    config = read_config(config_path)
    activation = option(config, config_path, "activation", str, "topk")
    # Older releases had `signed`, where the largest absolute values are kept.
    if activation != "topk" or config.get("signed"):
        raise ValueError(
            f"{config_path}: activation is {activation!r}{', signed' if config.get('signed') else ''}; only an "
            "unsigned 'topk' can be read."
        )
    d_in = option(config, config_path, "d_in", int)
    # What sparsify takes for fields that an older release did not write.
    d_sae = option(config, config_path, "num_latents", int, 0) or d_in * option(
        config, config_path, "expansion_factor", int, 32
    )
    k = option(config, config_path, "k", int, 32)
    is_transcoder = option(config, config_path, "transcode", bool, False)
    has_skip = option(config, config_path, "skip_connection", bool, False)
    arrays = read_safetensors(weights_path)
    check_tensors(weights_path, arrays, _SHAPES | (_SKIP if has_skip else {}), {"d_in": d_in, "d_sae": d_sae})
    check_checksum(weights_path, config_path, config)
    arrays["W_enc"], arrays["b_enc"] = arrays.pop("encoder.weight").T, arrays.pop("encoder.bias")
    return build(directory, TopKSAE, arrays, k=k, apply_b_dec_to_input=not is_transcoder)


def save_sparsify(sae: SparseAutoencoder, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes an autoencoder or a transcoder.

    Args:
        sae: a TopK one whose output is as wide as its input.
        directory: the folder to write to; it is made.

    Returns:
        The folder.

    Raises:
        ValueError: for another kind of codes, or another width of output.
        OSError: if a file cannot be written.
    """
    if not isinstance(sae, TopKSAE) or sae.d_out != sae.d_in:
        raise ValueError(
            f"sparsify has TopK codes and outputs as wide as inputs alone; this is a {type(sae).__name__} with d_in = "
            f"{sae.d_in} and d_out = {sae.d_out}. Use the layout saelens or gemma_scope_2."
        )
    arrays = {
        "encoder.weight": np.asarray(sae.W_enc[...]).T,
        "encoder.bias": np.asarray(sae.b_enc[...]),
        "W_dec": np.asarray(sae.W_dec[...]),
        "b_dec": np.asarray(sae.b_dec[...]),
    }
    if sae.W_skip is not None:
        arrays["W_skip"] = np.asarray(sae.W_skip[...])
    norms = np.linalg.norm(arrays["W_dec"].astype(np.float32), axis=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        # Whether sparsify, training on, would bring rows back to norm one.
        "normalize_decoder": bool(np.all(np.abs(norms - 1) < 1e-3)),
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": not sae.apply_b_dec_to_input,
        "d_in": sae.d_in,
    }
    directory = pathlib.Path(directory)
    write_weights_and_config(directory / SPARSIFY_WEIGHTS, arrays, directory / _CONFIG, config)
    return directory

"""SAELens' layout on disk: `cfg.json` and `sae_weights.safetensors`, so that other tools read what is trained here.

SAELens' topk architecture computes what ours does (`apply_b_dec_to_input`, a ReLU before the k largest are taken, no
rescaling).
"""

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from interp_jax.sae.topk import TopKSAE
from interp_jax.whole_file import write_whole

__all__ = ["load_saelens", "save_saelens"]

_LAYOUT_VERSION = "6.54.12"
"""The SAELens release whose layout this is."""
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def save_saelens(
    sae: TopKSAE, directory: str | os.PathLike[str], *, model_name: str, hook_name: str, **metadata: Any
) -> pathlib.Path:
    """Writes an SAE.

    Args:
        sae: the autoencoder.
        directory: the folder to write to; it is made.
        model_name: the model that the activations are from.
        hook_name: the site, in whatever form the reader knows.
        **metadata: anything else to keep; JSON.

    Returns:
        The folder.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(np.asarray(getattr(sae, name)[...])) for name in _NAMES}
    config = {
        "architecture": "topk",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": str(arrays["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _LAYOUT_VERSION,
            "model_name": model_name,
            "hook_name": hook_name,
            **metadata,
        },
    }
    write_whole(directory / "sae_weights.safetensors", safetensors.numpy.save(arrays))
    write_whole(directory / "cfg.json", json.dumps(config, indent=1).encode())
    return directory


def load_saelens(directory: str | os.PathLike[str]) -> TopKSAE:
    """Reads a TopK SAE.

    Args:
        directory: a folder with `cfg.json` and `sae_weights.safetensors`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for another architecture, options that this SAE does not have, missing or misshapen weights, or a
            weights file that is cut short.
    """
    directory = pathlib.Path(directory)
    config = json.loads((directory / "cfg.json").read_text(encoding="utf-8"))
    expected = {
        "architecture": "topk",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{directory / 'cfg.json'}: {name} is {config[name]!r}; only {value!r} can be read.")
    path = directory / "sae_weights.safetensors"
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or write it again.") from None
    missing = [name for name in _NAMES if name not in arrays]
    if missing or "k" not in config:
        raise ValueError(
            f"{directory} lacks {', '.join(missing) or 'k in cfg.json'}; expected a topk SAE's {_NAMES} and k."
        )
    return TopKSAE(**{name: jnp.asarray(arrays[name]) for name in _NAMES}, k=config["k"])

"""Which model and site an autoencoder is of, as far as its folder says so; many do not."""

import os
import pathlib
import re
from typing import Any, NamedTuple

from interp_jax.sae.weights_files import read_config

__all__ = ["Home", "check_home", "home_of", "is_transcoder"]

_INPUT, _OUTPUT = "hf_hook_point_in", "hf_hook_point_out"  # Gemma Scope 2's names of the sites


class Home(NamedTuple):
    """What a folder says; None where it does not."""

    model_name: str | None
    hook_name: str | None
    """The site in the words of whoever wrote it; this project's are `site.layer`."""
    site: str | None
    """The site, where `hook_name` is in this project's words."""
    layer: int | None
    """Its layer, likewise."""


def home_of(path: str | os.PathLike[str]) -> Home:
    """What an autoencoder's folder says of where it is from.

    Args:
        path: the folder, or the file of weights in it.
    """
    config = _config(path)
    about = config.get("metadata")
    about = about if isinstance(about, dict) else {}
    given = about.get("model_name", config.get("model_name")), about.get("hook_name", config.get(_INPUT))
    model_name, hook_name = (name if isinstance(name, str) and name != "unknown" else None for name in given)
    said = re.fullmatch(r"(\w+)\.(\d+)", hook_name or "")
    return Home(model_name, hook_name, *((said[1], int(said[2])) if said else (None, None)))


def is_transcoder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says that what is in it predicts one site from another.

    Args:
        path: the folder, or the file of weights in it.
    """
    config = _config(path)
    if "transcoder" in str(config.get("architecture")) or config.get("transcode") is True:
        return True
    return config.get(_OUTPUT) not in (None, config.get(_INPUT))


def check_home(path: str | os.PathLike[str], layer: int | None, site: str) -> None:
    """Refuses an autoencoder that says it is of another site than the one in question.

    Args:
        path: its folder.
        layer: the layer in question.
        site: the site.

    Raises:
        ValueError: if it does; the message has the options for the one that it is of.
    """
    home = home_of(path)
    if home.site is not None and (home.site, home.layer) != (site, layer):
        other = site if layer is None else f"{site} of layer {layer}"
        raise ValueError(
            f"{path} is an autoencoder of {home.site} of layer {home.layer}, not of {other}. "
            f"Pass --site {home.site} --layer {home.layer}, or another autoencoder."
        )


def _config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """That of SAELens or sparsify, or that of Gemma Scope 2."""
    path = pathlib.Path(path)
    files = [(path if path.is_dir() else path.parent) / name for name in ("cfg.json", "config.json")]
    return next((read_config(file) for file in files if file.is_file()), {})

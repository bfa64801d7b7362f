"""Which model and site an autoencoder is of, as far as its folder says so; many do not."""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

__all__ = ["Home", "check_home", "home_of", "is_transcoder"]


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
    about = _config(path).get("metadata")
    about = about if isinstance(about, dict) else {}
    model_name, hook_name = (about.get(name) if about.get(name) != "unknown" else None for name in _NAMES)
    said = re.fullmatch(r"(\w+)\.(\d+)", str(hook_name))
    return Home(model_name, hook_name, *((said[1], int(said[2])) if said else (None, None)))


def is_transcoder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says that what is in it predicts one site from another.

    Args:
        path: the folder, or the file of weights in it.
    """
    config = _config(path)
    return "transcoder" in str(config.get("architecture")) or config.get("transcode") is True


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
        raise ValueError(
            f"{path} is an autoencoder of {home.site} of layer {home.layer}, not of {site} of layer {layer}. "
            f"Pass --site {home.site} --layer {home.layer}, or another autoencoder."
        )


_NAMES = ("model_name", "hook_name")


def _config(path: str | os.PathLike[str]) -> dict[str, Any]:
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "cfg.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text("utf-8"))
    return found if isinstance(found, dict) else {}

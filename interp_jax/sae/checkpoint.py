"""Checkpoints of a training run: written by Orbax, and restored only if they are whole.

A checkpoint is a folder `step_00001000` that holds Orbax' `state/`, and `whole.json`, written last and atomically: the
SHA-256 of every file of the state, and the run's facts (its configuration, the step). A folder without `whole.json` is
what a killed process left; one whose checksums differ was cut short or altered. Either is named in a warning and passed
over for the one before it.
"""

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

__all__ = ["remove_checkpoints", "restore_latest", "save_checkpoint"]

_PREFIX = "step_"
_WHOLE = "whole.json"


def save_checkpoint(
    directory: pathlib.Path, step: int, state: Any, facts: dict[str, Any], *, keep: int
) -> pathlib.Path:
    """Writes one checkpoint, and removes old ones.

    Args:
        directory: the run's folder.
        step: training steps done.
        state: a pytree of arrays.
        facts: what else is to come back with it; JSON.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written; the checkpoints that were there stay as they were.
    """
    directory = pathlib.Path(directory).absolute()
    path = directory / f"{_PREFIX}{step:08d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        # As a list of leaves: what is on disk then does not depend on how the library at hand spells its modules.
        checkpointer.save(path / "state", dict(enumerate_leaves(state)))
    whole = {"step": step, "facts": facts, "sha256": _checksums(path / "state")}
    temporary = path / f".{_WHOLE}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(whole, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / _WHOLE)
    _remove(_folders(directory)[keep:])
    return path


def remove_checkpoints(directory: pathlib.Path) -> None:
    """Removes what an earlier run left, which a new one in its folder would else be taken for.

    Args:
        directory: the run's folder.
    """
    _remove(_folders(pathlib.Path(directory).absolute()))


def _remove(folders: list[pathlib.Path]) -> None:
    for folder in folders:
        # The mark goes first, so that a removal that is interrupted leaves nothing that looks whole.
        (folder / _WHOLE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def restore_latest(directory: pathlib.Path, like: Any) -> tuple[Any, dict[str, Any], int] | None:
    """Reads the newest whole checkpoint.

    Args:
        directory: the run's folder.
        like: a pytree with the structure, shapes and dtypes of the state. A leaf that tells a sharding is put there,
            whatever it was saved from; else on one device.

    Returns:
        (state, facts, step), or None where there is no whole checkpoint.

    Raises:
        ValueError: if the whole checkpoint holds arrays of other shapes than `like`.
    """
    for path in _folders(pathlib.Path(directory).absolute()):
        problem = _problem(path)
        if problem:
            warnings.warn(f"checkpoint {path} is not whole ({problem}); going back to the one before it", stacklevel=3)
            continue
        whole = json.loads((path / _WHOLE).read_text(encoding="utf-8"))
        leaves = dict(enumerate_leaves(like))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)
            for name, leaf in leaves.items()
        }
        with ocp.StandardCheckpointer() as checkpointer:
            saved = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _saved_leaves(checkpointer, path)}
            expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in abstract.items()}
            if saved != expected:
                raise ValueError(
                    f"checkpoint {path} holds arrays {saved}; expected {expected}. It is from another run: use another "
                    "checkpoint_dir."
                )
            restored = checkpointer.restore(path / "state", abstract)
        state = jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])
        return state, whole["facts"], whole["step"]
    return None


def enumerate_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, `sae.W_dec`, as names."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def _saved_leaves(checkpointer: ocp.StandardCheckpointer, path: pathlib.Path) -> list[tuple[str, Any]]:
    metadata: Any = checkpointer.metadata(path / "state")
    return list(metadata.item_metadata.items())


def _folders(directory: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints' folders, the newest first."""
    return sorted((path for path in directory.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def _problem(path: pathlib.Path) -> str:
    try:
        expected = json.loads((path / _WHOLE).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return "writing it was interrupted"
    except (ValueError, KeyError, TypeError):
        return f"{_WHOLE} does not parse"
    found = _checksums(path / "state")
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{differing[0]} differs from what was written" if differing else ""


def _checksums(directory: pathlib.Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                checksums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums

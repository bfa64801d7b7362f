"""Checkpoints of a training run: written by Orbax while training goes on, and restored only if they are whole.

A checkpoint is a folder `step_00001000` that holds Orbax' `state/`, `data_0.safetensors` where the batches tell where
they stand, and `whole.json`, written last and atomically: the SHA-256 of every other file, and the run's facts (its
configuration, the step). A folder without `whole.json` is what a killed process left; one whose checksums differ was
cut short or altered. Either is named in a warning and passed over for the one before it.

`CheckpointWriter.save` returns once Orbax has copied the state to the host, so that the next step may write over the
state's memory. A thread waits for the disk, sums and marks. At most one checkpoint is being written: a save waits for
the one before it.

Several processes (`jax.distributed`) write into one folder that all of them see, each its own part of the arrays; the
first one makes the folders and the mark.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from interp_jax.disk_room import check_room, free_bytes, in_words
from interp_jax.sae.nested_state import NestedState, read_nested_state
from interp_jax.whole_file import write_whole

__all__ = ["CheckpointWriter", "Restored", "bytes_of", "newest_checkpoint", "remove_checkpoints", "restore_latest"]

_PREFIX = "step_"
_WHOLE = "whole.json"


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, beside the training; a context that ends with the last one written."""

    def __init__(self, directory: pathlib.Path, *, keep: int):
        """A writer.

        Args:
            directory: the run's folder; it is made.
            keep: how many checkpoints stay.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._is_first_process = jax.process_index() == 0
        self._checkpointer = ocp.StandardCheckpointer()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: concurrent.futures.Future[None] | None = None
        self._directory.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Any, facts: dict[str, Any], data: NestedState | None = None) -> pathlib.Path:
        """Begins one checkpoint; it counts once it is whole, and old ones are removed then.

        Args:
            step: training steps done.
            state: a pytree of arrays. They may be donated when this returns.
            facts: what else is to come back with it; JSON. They must not be changed after this.
            data: this process's state of the batches, if they have one. Its arrays must not be changed after this.

        Returns:
            The folder that will hold it.

        Raises:
            OSError: if it cannot be written, or the one before it could not be; the checkpoints that were there stay as
                they were.
        """
        self.wait()
        path = self._directory / f"{_PREFIX}{step:08d}"
        whole = {"step": step, "n_processes": jax.process_count(), "facts": facts}
        needed = bytes_of(state) + (0 if data is None else data.n_bytes)
        check_room(self._directory, needed, f"the checkpoint of step {step}")
        # As a list of leaves: what is on disk then does not depend on how the library at hand spells its modules.
        leaves = dict(enumerate_leaves(state))

        def begin() -> None:
            if self._is_first_process:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
            if jax.process_count() > 1:
                # Orbax waits for all processes in what follows, so that the first one finds all files to sum.
                multihost_utils.sync_global_devices(f"folder of checkpoint {step}")
                _write_data(path, data)
            self._checkpointer.save(path / "state", leaves)

        def end() -> None:
            self._checkpointer.wait_until_finished()
            if self._is_first_process:
                if jax.process_count() == 1:
                    _write_data(path, data)
                write_whole(path / _WHOLE, json.dumps({**whole, "sha256": _checksums(path)}, indent=1))
                _remove_old(self._directory, step, self._keep)

        self._told(path, needed, begin)
        self._writing = self._thread.submit(self._told, path, needed, end)
        return path

    def check(self) -> None:
        """Raises what went wrong in writing, if that is known by now.

        Raises:
            OSError: if the last checkpoint could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except OSError:
            if kind is None:
                raise
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def _told(self, path: pathlib.Path, needed: int, write: Callable[[], None]) -> None:
        """Writes, and tells what a user needs to know where that fails."""
        try:
            write()
        except Exception as error:  # what Orbax and TensorStore raise for a full disk is of many types
            if self._is_first_process:
                _remove([path])  # half a checkpoint is of no use, and the disk may be full
            whole = newest_checkpoint(self._directory)
            kept = "There is no whole checkpoint." if whole is None else f"The newest whole checkpoint is {whole}."
            free = free_bytes(self._directory)
            raise OSError(
                f"checkpoint {path} could not be written: it takes up to {in_words(needed)}, and "
                f"{in_words(free)} are free. {kept} Make room, and go on with resume. ({_first_line(error)})"
            ) from error


class Restored:
    """What a checkpoint gave back."""

    def __init__(self, state: Any, whole: dict[str, Any], path: pathlib.Path):
        self.state = state
        self.facts: dict[str, Any] = whole["facts"]
        self.step: int = whole["step"]
        self._n_processes: int = whole.get("n_processes", 1)
        self._path = path

    def data(self) -> dict[str, Any] | None:
        """This process's state of the batches, if the checkpoint has one.

        Raises:
            ValueError: if it was written by another number of processes.
        """
        if not _data_path(self._path, 0).exists():
            return None
        if self._n_processes != jax.process_count():
            raise ValueError(
                f"checkpoint {self._path} holds the position in the data of each of {self._n_processes} processes; "
                f"there are {jax.process_count()}. Go on with as many, or pass batches as a function of the step."
            )
        return read_nested_state(_data_path(self._path, jax.process_index()))


def remove_checkpoints(directory: pathlib.Path) -> None:
    """Removes what an earlier run left, which a new one in its folder would else be taken for.

    Args:
        directory: the run's folder.
    """
    if jax.process_index() == 0:
        _remove(_folders(pathlib.Path(directory).absolute()))


def newest_checkpoint(directory: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint that was written to its end, its checksums not looked at.

    Args:
        directory: the run's folder.
    """
    return next(iter(_marked(pathlib.Path(directory).absolute())), None)


def restore_latest(directory: pathlib.Path, like: Any) -> Restored | None:
    """Reads the newest whole checkpoint.

    Args:
        directory: the run's folder.
        like: a pytree with the structure, shapes and dtypes of the state. A leaf that tells a sharding is put there,
            whatever it was saved from; else on one device.

    Returns:
        The state with its facts, or None where there is no whole checkpoint.

    Raises:
        ValueError: if the whole checkpoint holds arrays of other shapes than `like`.
    """
    step = _newest_whole(pathlib.Path(directory).absolute()) if jax.process_index() == 0 else None
    number = -1 if step is None else step
    if jax.process_count() > 1:  # all go on from the same
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if number < 0:
        return None
    path = pathlib.Path(directory).absolute() / f"{_PREFIX}{number:08d}"
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
    return Restored(state, json.loads((path / _WHOLE).read_text(encoding="utf-8")), path)


def bytes_of(state: Any) -> int:
    """What the arrays of a state take, in bytes.

    Args:
        state: a pytree of arrays or of their shapes.
    """
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def enumerate_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, `sae.W_dec`, as names."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def _newest_whole(directory: pathlib.Path) -> int | None:
    for path in _folders(directory):
        problem = _problem(path)
        if not problem:
            return int(path.name.removeprefix(_PREFIX))
        warnings.warn(f"checkpoint {path} is not whole ({problem}); going back to the one before it", stacklevel=4)
    return None


def _saved_leaves(checkpointer: ocp.StandardCheckpointer, path: pathlib.Path) -> list[tuple[str, Any]]:
    metadata: Any = checkpointer.metadata(path / "state")
    return list(metadata.item_metadata.items())


def _folders(directory: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints' folders, the newest first."""
    return sorted((path for path in directory.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def _marked(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in _folders(directory) if (path / _WHOLE).exists()]


def _remove_old(directory: pathlib.Path, step: int, keep: int) -> None:
    """Keeps the newest that were written to their end; one of a later step is of a run that is now done again."""
    newest = [path for path in _marked(directory) if path.name <= f"{_PREFIX}{step:08d}"][:keep]
    _remove([path for path in _folders(directory) if path not in newest])


def _remove(folders: list[pathlib.Path]) -> None:
    for folder in folders:
        # The mark goes first, so that a removal that is interrupted leaves nothing that looks whole.
        (folder / _WHOLE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _problem(path: pathlib.Path) -> str:
    try:
        expected = json.loads((path / _WHOLE).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return "writing it was interrupted"
    except (ValueError, KeyError, TypeError):
        return f"{_WHOLE} does not parse"
    found = _checksums(path)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{differing[0]} differs from what was written" if differing else ""


def _checksums(directory: pathlib.Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / _WHOLE:
            with open(path, "rb") as file:
                checksums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums


def _data_path(path: pathlib.Path, process: int) -> pathlib.Path:
    return path / f"data_{process}.safetensors"


def _write_data(path: pathlib.Path, data: NestedState | None) -> None:
    if data is not None:
        data.write(_data_path(path, jax.process_index()))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

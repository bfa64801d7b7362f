"""Where a store lies: a folder on this machine, or a bucket, through TensorStore's key-value stores.

A key is written whole or not at all. In a bucket that is the service's own promise. In a folder single values are
written by `write_whole` and not by TensorStore, which always takes the same temporary file: what a killed writer left
there stays at the end of a shorter value that is written next. What TensorStore reports as a failure of any kind
becomes an OSError here that says what was being written, how much room that needs and, where that can be known, how
much is free.
"""

import contextlib
import errno
import os
import pathlib
import shutil
from typing import Any

import tensorstore as ts

from interp_jax.disk_room import check_room, free_bytes, in_words
from interp_jax.whole_file import write_whole

__all__ = ["Storage"]

_SPARE = 1 << 20
"""Bytes that shall be free beside what is written: manifests, and the file system's own."""


class Storage:
    """Keys and values under a path or a URL."""

    context = ts.Context()
    """One for all stores of a process, so that `memory://` is one place."""

    def __init__(self, directory: str | os.PathLike[str] | dict[str, Any]):
        """Opens a place; a folder that is missing is made when something is written.

        Args:
            directory: a folder's path, a URL that TensorStore knows (`gs://bucket/path`, `s3://bucket/path`,
                `file:///path`, `memory://name`), or its key-value specification as a dictionary, for a bucket at an
                address of one's own.

        Raises:
            ValueError: if it is a URL or a specification that TensorStore cannot open.
        """
        spec: Any
        if isinstance(directory, dict):
            spec = {**directory, "path": _as_folder(directory.get("path", ""))}
        elif isinstance(directory, str) and "://" in directory:
            spec = _as_folder(directory)
        else:
            spec = {"driver": "file", "path": _as_folder(str(pathlib.Path(directory).absolute()))}
        try:
            self.kvstore = ts.KvStore.open(spec, context=self.context).result()
        except ValueError as error:
            raise ValueError(f"{directory} cannot be opened as a store: {error}") from None
        is_local = self.kvstore.spec().to_json()["driver"] == "file"
        self.folder: pathlib.Path | None = pathlib.Path(self.kvstore.path) if is_local else None
        """The folder; None in a bucket."""

    def __str__(self) -> str:
        """The folder's path, or the URL."""
        return str(self.folder) if self.folder is not None else self.kvstore.url

    def path(self, key: str) -> str:
        """A key as a person finds it.

        Args:
            key: of a value, or the beginning of several.
        """
        return f"{str(self).rstrip('/')}/{key}"

    def read(self, key: str) -> bytes | None:
        """A value; None if there is none.

        Args:
            key: its key.

        Raises:
            OSError: if it is there and cannot be read.
        """
        try:
            found = self.kvstore.read(key).result()
        except ValueError as error:
            raise OSError(errno.EIO, f"{self.path(key)} cannot be read: {error}") from None
        return found.value if found.state == "value" else None

    def write(self, key: str, value: bytes) -> None:
        """Writes a value whole or not at all.

        Args:
            key: its key.
            value: what it is to be.

        Raises:
            OSError: if it cannot be written; what was there before stays.
        """
        try:
            if self.folder is not None:
                write_whole(self.folder / key, value)
            else:
                self.kvstore.write(key, value).result()
        except (ValueError, OSError) as error:
            raise self.failure(key, len(value), error) from None

    def write_new(self, key: str, value: bytes) -> bytes:
        """Writes a value unless there is one already; of several processes that try at once, one succeeds.

        Args:
            key: its key.
            value: what it is to be.

        Returns:
            The value that is there now.

        Raises:
            OSError: if it cannot be written.
        """
        try:
            if self.folder is not None:
                _write_new_file(self.folder / key, value)
            else:
                before = self.kvstore.read(key).result()
                if before.state == "missing":
                    self.kvstore.write(key, value, if_equal=before.stamp.generation).result()
        except (ValueError, OSError) as error:
            raise self.failure(key, len(value), error) from None
        found = self.read(key)
        return value if found is None else found

    def delete(self, folder: str) -> None:
        """Deletes all that is in a folder, and what an interrupted writing left there; what cannot be deleted stays.

        Args:
            folder: its key, without the slash.
        """
        if self.folder is not None:
            shutil.rmtree(self.folder / folder, ignore_errors=True)
            return
        with contextlib.suppress(ValueError):
            self.kvstore.delete_range(ts.KvStore.KeyRange(f"{folder}/", f"{folder}0")).result()  # "0" comes after "/"

    def tidy(self, folder: str) -> None:
        """Deletes the temporary files that killed writers left in a folder in which nobody writes now.

        Args:
            folder: its key, without the slash.
        """
        if self.folder is not None:
            for file in (self.folder / folder).glob(".*"):
                file.unlink(missing_ok=True)

    def free(self) -> int | None:
        """Bytes that are free; None where nobody can know, as in a bucket."""
        if self.folder is None:
            return None
        return free_bytes(self.folder)

    def check_room(self, n_bytes: int, what: str) -> None:
        """Makes sure that there is room.

        Args:
            n_bytes: how much is to be written.
            what: what it is, for the error.

        Raises:
            OSError: if there is not; it says how much is needed and how much is free.
        """
        if self.folder is not None:  # nobody knows the room in a bucket
            check_room(self.folder, n_bytes, what, spare=_SPARE)

    def failure(self, key: str, n_bytes: int, error: Exception) -> OSError:
        """The error of a value that could not be written.

        Args:
            key: its key.
            n_bytes: its size.
            error: what TensorStore says.
        """
        free = self.free()
        room = "" if free is None else f"; it needs {in_words(n_bytes)}, and {in_words(free)} are free"
        number = errno.ENOSPC if free is not None and free < n_bytes + _SPARE else errno.EIO
        return OSError(number, f"{self.path(key)} cannot be written{room}: {error}")


def _write_new_file(path: pathlib.Path, value: bytes) -> None:
    """Writes a file whole, unless it is there."""
    if path.exists():
        return
    temporary = write_whole(path.with_name(f".{path.name}.{os.getpid()}.new"), value)
    try:
        os.link(temporary, path)  # which fails where the file is there by now
    except FileExistsError:
        return
    except OSError:  # a file system without links
        write_whole(path, value)
    finally:
        os.unlink(temporary)


def _as_folder(path: str) -> str:
    return path if path.endswith("/") or not path else f"{path}/"

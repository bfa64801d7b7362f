"""Writing a file whole or not at all: what was interrupted is never read back as a file.

The content goes to a temporary file in the same folder, is synced to the disk, and takes the file's place by a rename.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

__all__ = ["make_folder", "open_whole", "write_whole"]


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Makes a folder that much will be written to, before what is written takes long to compute.

    Args:
        path: the folder; it may be there.

    Returns:
        The path.

    Raises:
        OSError: if it cannot be made, or not be written to.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise type(error)(f"Nothing can be written to {path} ({error.strerror}). Name another folder.") from error
    return path


@contextlib.contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes its place when the block ends, and is as it was before if the block raises.

    Args:
        path: the file; one that is there is replaced. Its folder is made where it is missing.

    Yields:
        The file, which can be read and sought in as well.

    Raises:
        OSError: if it cannot be written, since the disk is full for instance. Nothing of it is left then.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private; these are there to be read
        os.replace(temporary, path)
    except BaseException:  # an interruption too must leave nothing behind
        os.unlink(temporary)
        raise


def write_whole(path: str | os.PathLike[str], content: bytes | str | Iterable[bytes]) -> pathlib.Path:
    """Writes a file that is either whole or as it was before.

    Args:
        path: the file; one that is there is replaced. Its folder is made where it is missing.
        content: what it is to hold; text is written as UTF-8, blocks of bytes one after another. If getting the blocks
            raises, nothing is written.

    Returns:
        The path.

    Raises:
        OSError: if it cannot be written, since the disk is full for instance. Nothing of it is left then.
    """
    content = content.encode() if isinstance(content, str) else content
    with open_whole(path) as file:
        file.writelines([content] if isinstance(content, bytes) else content)
    return pathlib.Path(path)

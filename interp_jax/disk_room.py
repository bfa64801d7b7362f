"""How much room a disk has, and what is said where that is too little."""

import errno
import os
import pathlib
import shutil

__all__ = ["check_room", "free_bytes", "in_words"]


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that are free where a file or folder is, or will be.

    Args:
        path: it need not be there yet.
    """
    path = pathlib.Path(path).absolute()
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free


def check_room(directory: str | os.PathLike[str], n_bytes: int, what: str, *, spare: int = 0) -> None:
    """Refuses to begin what the disk has no room for.

    Args:
        directory: where it is to be written.
        n_bytes: what it takes.
        what: what it is, for the error.
        spare: bytes that shall be left free beside it.

    Raises:
        OSError: if fewer bytes are free.
    """
    free = free_bytes(directory)
    if free < n_bytes + spare:
        raise OSError(
            errno.ENOSPC,
            f"{what} takes up to {in_words(n_bytes + spare)}, and {in_words(free)} are free where {directory} is. "
            "Nothing that was written is lost. Make room, or write elsewhere.",
        )


def in_words(n_bytes: int) -> str:
    """`12.3 MB`, or `4.5 kB` below one.

    Args:
        n_bytes: how many.
    """
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"

"""Text files that are either whole or not there."""

import os
import pathlib
import tempfile

__all__ = ["write_file"]


def write_file(path: str | os.PathLike[str], text: str) -> pathlib.Path:
    """Writes a UTF-8 file through a temporary one in the same directory, so that no reader ever sees a part of it.

    Args:
        path: the file; one that is there is replaced. Its directory is made where it is missing.
        text: what it is to hold.

    Returns:
        The path.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, and a page is there to be read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path

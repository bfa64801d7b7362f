"""One training process a folder: two that wrote checkpoints into one would each remove the other's.

The lock is the operating system's, on the file `training.lock`: it goes when its process ends, killed or not, so that
none is left behind to be removed by hand. Where there are no such locks (Windows, some network disks) nothing is
checked.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["only_one_training"]


@contextlib.contextmanager
def only_one_training(directory: pathlib.Path) -> Iterator[None]:
    """Holds a folder while a run trains into it.

    Args:
        directory: the folder; it is made.

    Yields:
        Nothing.

    Raises:
        RuntimeError: if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "training.lock"
    with open(path, "a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RuntimeError(
                    f"process {file.read().strip() or '(not told)'} is training into {directory}, and one run's "
                    "checkpoints would be removed by the other's. Wait for its end, or use another folder."
                ) from None
            except OSError:  # a disk that knows no locks
                pass
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield

"""A run's history: in memory, line by line in `metrics.jsonl`, and to whatever else listens."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence

from interp_jax.disk_room import free_bytes, in_words
from interp_jax.whole_file import write_whole

__all__ = ["Line", "Logger", "MetricsLog"]

Line = dict[str, int | float]
"""A step's metrics by name, with `step`, and with `run` in a sweep."""
Logger = Callable[[Line], None]
"""What is told each line as it is logged."""


class MetricsLog:
    """The history in memory, and line by line in `metrics.jsonl`."""

    def __init__(self, directory: pathlib.Path | None, history: Sequence[Line], loggers: Sequence[Logger] = ()):
        """A log.

        Args:
            directory: the run's folder; None writes nothing.
            history: of the checkpoint that the run goes on from.
            loggers: told each new line.
        """
        self.history = list(history)
        self._loggers = loggers
        self._path = None
        if directory is not None:
            self._path = directory / "metrics.jsonl"
            # Lines after the checkpoint that is resumed from belong to steps that are done again.
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self.history))

    def add(self, line: Line) -> None:
        """Logs one line.

        Args:
            line: the metrics.

        Raises:
            OSError: if it cannot be written; the lines before it stay.
        """
        self.history.append(line)
        if self._path is not None:
            _append(self._path, json.dumps(line) + "\n")
        for logger in self._loggers:
            logger(line)


def _append(path: pathlib.Path, text: str) -> None:
    content = text.encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            written = file.write(content)
            if written == len(content):
                return
            reason = f"{written} bytes fit"
        except OSError as error:
            reason = error.strerror or str(error)
        os.ftruncate(file.fileno(), before)
    raise OSError(
        f"a line of {len(content)} bytes could not be written to {path} ({reason}; {in_words(free_bytes(path))} are "
        "free). The lines before it stay, and so do the checkpoints. Make room, and go on with resume."
    )

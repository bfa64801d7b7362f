"""A peer in a process of its own, in an environment of its own, which works only while it is asked.

In one process two libraries' thread pools take the cores from one another: what runs after PyTorch is slower for a
while, and so is PyTorch. Here each has the machine to itself in its turn. Nor can most peers share an environment with
one another.

The parent writes one line of JSON a request, `[what, argument, ...]`, and reads one line of JSON, marked as an
answer, when it is done.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["PeerProcess", "peer_python", "serve"]

_ANSWER = "answer "


def peer_python(name: str, given: str | None = None) -> str:
    """The interpreter of a peer's environment.

    Args:
        name: of the peer, for the environment that `make` makes of it.
        given: the interpreter, where the peer is installed elsewhere: on a machine that comes with PyTorch, say.
    """
    return given or f".venv-{name}/bin/python"


class PeerProcess:
    """The parent's side."""

    def __init__(self, python: str | pathlib.Path, module: str, *args: str):
        """Starts it.

        Args:
            python: the interpreter of its environment.
            module: what it runs; it calls `serve`.
            *args: of the command line.

        Raises:
            FileNotFoundError: if there is no such environment.
        """
        if shutil.which(python) is None:
            raise FileNotFoundError(f"{python} is missing: `make` the benchmark's environment first.")
        command = [str(python), "-W", "ignore", "-m", module, *args]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *request: Any) -> Any:
        """Has it do something.

        Args:
            *request: what, and its arguments; JSON.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_ANSWER):  # anything else is what a library prints
                return json.loads(line.removeprefix(_ANSWER))
        raise RuntimeError(f"the peer's process ended with {self._process.wait()}; its message is above")

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(doing: Mapping[str, Callable[..., Any]]) -> None:
    """The peer's side: answers until the parent is gone.

    Args:
        doing: what may be asked for.
    """
    for line in sys.stdin:
        what, *args = json.loads(line)
        print(_ANSWER + json.dumps(doing[what](*args)), flush=True)

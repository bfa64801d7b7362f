"""A picture to look at in a notebook and to keep as a file.

A notebook shows it where it is the last value of a cell. Elsewhere `save` writes it.
"""

import dataclasses
import os
import pathlib
from typing import Any, Literal

from interp_jax.whole_file import write_whole

__all__ = ["Picture"]

_MIME = {"png": "image/png", "svg": "image/svg+xml"}


@dataclasses.dataclass(frozen=True, repr=False)
class Picture:
    """A drawn picture."""

    content: bytes
    """What its file holds."""
    kind: Literal["png", "svg"]
    """The kind of file."""

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the picture, whole or not at all.

        Args:
            path: a file whose name ends in the picture's kind.

        Returns:
            The path.

        Raises:
            ValueError: if the name ends otherwise.
            OSError: if it cannot be written.
        """
        path = pathlib.Path(path)
        if path.suffix.lower() != f".{self.kind}":
            raise ValueError(
                f"the picture is {self.kind.upper()} and {path.name} is not: call it {path.stem}.{self.kind}."
            )
        return write_whole(path, self.content)

    def __repr__(self) -> str:
        return f"<Picture: {len(self.content):,} bytes of {self.kind.upper()}; show it in a notebook or .save(path)>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """What a notebook shows."""
        del include, exclude  # a front end picks from what it is given
        content = self.content if self.kind == "png" else self.content.decode()
        return {_MIME[self.kind]: content, "text/plain": repr(self)}

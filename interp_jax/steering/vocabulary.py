"""Which rollouts count as successful: those that hold a word of a list, or whatever a user's own judge says."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterable

__all__ = ["Judge", "Vocabulary"]

Judge = Callable[[str], bool]
"""From a continuation to whether it is successful."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A list of words; a text is successful where one of them stands in it, whole and in any case."""

    words: tuple[str, ...]
    """The words or phrases. One that ends in * stands for all words that begin so: `marri*`."""
    provenance: str
    """Where the list is from."""

    def __post_init__(self) -> None:
        """Checks the words.

        Raises:
            ValueError: if there is none, or one is blank.
        """
        if not self.words or any(not word.strip("* \t") for word in self.words):
            raise ValueError(
                f"The vocabulary from {self.provenance or 'somewhere'} has {len(self.words)} words, of which none may "
                "be blank; give at least one."
            )

    def __call__(self, text: str) -> bool:
        """Whether the text holds a word of the list."""
        return self.pattern.search(text) is not None

    @property
    def pattern(self) -> re.Pattern[str]:
        """What is looked for."""
        parts = (re.escape(word.strip().removesuffix("*")) + (r"\w*" if word.strip().endswith("*") else "")
                 for word in self.words)  # fmt: skip
        return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)

    @classmethod
    def of(cls, words: Iterable[str], provenance: str = "given by the user") -> "Vocabulary":
        """A list of one's own.

        Args:
            words: the words.
            provenance: where they are from.

        Raises:
            ValueError: if there is none, one is blank, or they are one text, whose letters would be taken for words.
        """
        if isinstance(words, str):
            raise ValueError(f"{words!r} is one text; give a list of words, [{words!r}] for this one alone.")
        return cls(tuple(words), provenance)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads a list, a word or phrase a line; what follows # is a comment.

        Args:
            path: the file.

        Raises:
            ValueError: if there is no word in it.
        """
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        words = [line.split("#")[0].strip() for line in lines]
        return cls(tuple(word for word in words if word), os.fspath(path))

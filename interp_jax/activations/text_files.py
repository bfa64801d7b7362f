"""Documents from files: a text file, a file of JSON lines, or a folder of either, read as a stream.

No more than a document is in memory at a time, and a text file of many megabytes is no single document: it is cut at
the ends of lines.
"""

import json
import os
import pathlib
from collections.abc import Iterator

__all__ = ["read_documents", "stream_documents"]

_LONGEST = 1 << 24
"""Bytes of a text file after which a new document is begun, at the end of a line."""


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """Reads documents, all of them.

    Args:
        path: as `stream_documents` takes it.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: as `stream_documents` does.
    """
    return list(stream_documents(path))


def stream_documents(path: str | os.PathLike[str]) -> Iterator[str]:
    """Reads documents one after another.

    Args:
        path: a text file, which is one document, or one for every 16 MB; a `.jsonl` file with one `{"text": ...}` a
            line; or a folder, of which all `.txt`, `.md` and `.jsonl` files are read in the order of their names.

    Yields:
        Texts.

    Raises:
        FileNotFoundError: at once, if there is nothing.
        ValueError: at once for a folder without such files; later for a line without text, or text that is not UTF-8.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: expected a text file, a .jsonl file, or a folder of such files.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".md", ".jsonl"))
        if not files:
            raise ValueError(f"{path} holds no .txt, .md or .jsonl file.")
    return (document for file in files for document in (_of_lines if file.suffix == ".jsonl" else _of_text)(file))


def _of_text(path: pathlib.Path) -> Iterator[str]:
    pieces, length = [], 0
    for line in _lines(path):
        pieces.append(line)
        length += len(line)
        if length >= _LONGEST:
            yield "".join(pieces)
            pieces, length = [], 0
    if pieces or path.stat().st_size == 0:
        yield "".join(pieces)


def _of_lines(path: pathlib.Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise ValueError(f'{path}, line {number}: expected {{"text": "..."}}, found {line.rstrip()[:60]!r}.')
        yield document


def _lines(path: pathlib.Path) -> Iterator[str]:
    """Lines with their ends, which become newlines."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 at byte {start + error.start}: convert it, or leave it out."
                ) from None
            start += len(line)
            yield text.replace("\r\n", "\n")

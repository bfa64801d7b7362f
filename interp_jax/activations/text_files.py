"""Documents from files: a text file, a file of JSON lines, or a folder of either."""

import json
import os
import pathlib

__all__ = ["read_documents"]


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """Reads documents.

    Args:
        path: a text file, which is one document; a `.jsonl` file with one `{"text": ...}` a line; or a folder, of which
            all `.txt`, `.md` and `.jsonl` files are read in the order of their names.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a folder without such files, a line without text, or text that is not UTF-8.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".md", ".jsonl"))
        if not files:
            raise ValueError(f"{path} holds no .txt, .md or .jsonl file.")
        return [document for file in files for document in read_documents(file)]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it, or leave it out.") from None
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise ValueError(f'{path}, line {number}: expected {{"text": "..."}}, found {line[:60]!r}.')
        documents.append(document)
    return documents

"""Documents from Hugging Face datasets, read as a stream: nothing is loaded whole, nothing is downloaded ahead.

It needs the extra `datasets`. A data set on the Hub and a folder of parquet or JSON-lines files are read alike.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

__all__ = ["hugging_face_documents"]

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}


def hugging_face_documents(
    name: str | os.PathLike[str], *, split: str = "train", column: str = "text", **options: Any
) -> Iterator[str]:
    """Documents of a data set, one after another.

    Args:
        name: its name on the Hub, or a local file (`.parquet`, `.jsonl`, `.csv`, `.txt`) or folder of such files.
        split: which part of it.
        column: which column holds the text.
        **options: what else `datasets.load_dataset` takes, as `name` of a configuration or `revision`.

    Yields:
        Texts, in the order of the data set. The same for the same data set, so that what was interrupted can go on.

    Raises:
        ImportError: at once, if the library is not installed.
        ValueError: at once, if there is no such column, part, or data set; later, for a document that is no text.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ImportError(
            "Hugging Face datasets are read with the library `datasets`, which is not installed: "
            "pip install 'interp-jax[datasets]'."
        ) from None
    path = pathlib.Path(name)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"{path} is none of the files that can be read: {', '.join(_BUILDERS)}.")
        options = {"data_files": {split: str(path)}, **options}
        source = _BUILDERS[path.suffix]
    else:
        source = os.fspath(name)
    try:
        rows: Any = datasets.load_dataset(source, split=split, streaming=True, **options)
    except (ValueError, OSError, DatasetsError) as error:
        raise ValueError(f"the data set {os.fspath(name)!r}, part {split!r}, cannot be read: {error}") from error
    names = rows.column_names
    if names is None:  # a stream whose files do not tell
        names = list(next(iter(rows), {column: ""}))
    if column not in names:
        raise ValueError(f"the data set {os.fspath(name)!r} has no column {column!r}; it has {', '.join(names)}.")
    return _texts(rows, column, os.fspath(name))


def _texts(rows: Any, column: str, name: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        text = row[column]
        if not isinstance(text, str):
            raise ValueError(f"row {number} of {name!r}: {column!r} is a {type(text).__name__}; expected text.")
        yield text

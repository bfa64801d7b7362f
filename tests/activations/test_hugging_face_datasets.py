"""Hugging Face datasets of real local files, read as a stream."""

import itertools
import json
import pathlib
import sys

import datasets
import numpy as np
import pytest

from interp_jax.activations.hugging_face_datasets import hugging_face_documents
from interp_jax.activations.tokens import pack, stream_rows
from interp_jax.models import tiny
from interp_jax.models.tokenizer import Tokenizer

TEXTS = [f"document {number}, a few words long" for number in range(20)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """Two parts, in parquet, with another column."""
    folder = tmp_path / "data"
    for part, texts in (("train", TEXTS[:15]), ("test", TEXTS[15:])):
        table = datasets.Dataset.from_dict({"id": list(range(len(texts))), "content": texts})
        (folder / part).mkdir(parents=True)
        table.to_parquet(folder / part / "0.parquet")
    return folder


def test_a_folder_of_parquet_files_is_read_part_by_part(folder):
    assert list(hugging_face_documents(folder, column="content")) == TEXTS[:15]
    assert list(hugging_face_documents(folder, split="test", column="content")) == TEXTS[15:]


def test_files_of_json_lines_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert list(hugging_face_documents(path)) == TEXTS
    # Read as far as it is asked for, and packed as it comes.
    tokenizer = Tokenizer.from_file(pathlib.Path(tiny.__file__).parent / "tiny_wikipedia" / "tokenizer.json")
    rows = np.concatenate(list(itertools.islice(stream_rows(hugging_face_documents(path), tokenizer, 16, 1), 5)))
    np.testing.assert_array_equal(rows, pack(TEXTS, tokenizer, 16)[:5])


def test_what_cannot_be_read_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no column 'text'; it has id, content"):
        hugging_face_documents(folder)
    with pytest.raises(ValueError, match=r"row 0 of .*: 'id' is a int; expected text"):
        list(hugging_face_documents(folder, column="id"))
    with pytest.raises(ValueError, match="part 'validation', cannot be read"):
        hugging_face_documents(folder, split="validation", column="content")
    with pytest.raises(ValueError, match="cannot be read"):
        hugging_face_documents(tmp_path / "nothing")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the files that can be read"):
        hugging_face_documents(tmp_path / "x.bin")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'interp-jax\[datasets\]'"):
        hugging_face_documents(folder)

"""Documents from files."""

import pytest

from interp_jax.activations import text_files
from interp_jax.activations.text_files import read_documents, stream_documents


def test_files_and_folders_give_documents_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_text("second, with ümlauts", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "also first", "id": 3}\n')
    (tmp_path / "c.md").write_text("third")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["first", "also first", "second, with ümlauts", "third"]
    assert read_documents(tmp_path / "b.txt") == ["second, with ümlauts"]


def test_what_holds_no_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        read_documents(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "nothing.txt")
    path = tmp_path / "x.jsonl"
    for content in ('{"text": 3}', "[1]", "no JSON"):
        path.write_text('{"text": "good"}\n' + content)
        with pytest.raises(ValueError, match="line 2: expected"):
            read_documents(path)
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        read_documents(tmp_path / "latin.txt")


def test_a_text_longer_than_memory_comes_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_LONGEST", 20)
    text = "".join(f"line {number}\n" for number in range(30)) + "no newline"
    (tmp_path / "long.txt").write_text(text)
    pieces = list(stream_documents(tmp_path / "long.txt"))
    assert "".join(pieces) == text
    assert {len(piece.splitlines()) for piece in pieces[:-1]} == {3}
    (tmp_path / "rows.jsonl").write_text('{"text": "one\u2028line"}\n{"text": "two"}\nno JSON\n')
    documents = stream_documents(tmp_path / "rows.jsonl")
    assert [next(documents), next(documents)] == ["one\u2028line", "two"]
    with pytest.raises(ValueError, match="line 3: expected"):
        next(documents)
    with pytest.raises(FileNotFoundError, match="is not there"):
        stream_documents(tmp_path / "nothing")
    (tmp_path / "empty.txt").write_text("")
    assert read_documents(tmp_path / "empty.txt") == [""]

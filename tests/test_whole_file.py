"""A file is whole or as it was."""

import os

import pytest

from interp_jax.whole_file import make_folder, write_whole


def test_writes_bytes_and_text_and_makes_the_folder(tmp_path):
    path = write_whole(tmp_path / "deep" / "a.txt", "häus\n")
    assert path.read_bytes() == "häus\n".encode()
    write_whole(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_folder_that_nothing_can_be_written_to_is_told(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert os.listdir(make_folder(tmp_path / "a" / "b")) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=r"Nothing can be written to .*file.* Name another folder"):
            make_folder(path)


def test_a_failure_leaves_what_was_there(tmp_path):
    path = write_whole(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_blocks_are_written_one_after_another_or_not_at_all(tmp_path):
    path = write_whole(tmp_path / "a", (block for block in (b"one", b"", b"two")))
    assert path.read_bytes() == b"onetwo"

    def cut_short():
        yield b"three"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_whole(path, cut_short())
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(tmp_path) == ["a"]

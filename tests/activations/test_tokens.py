"""Rows of tokens: nothing lost, nothing invented, documents divided whole."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.activations.tokens import pack, pack_file, split_documents, stream_rows
from interp_jax.models.tokenizer import Tokenizer


def _characters(*, bos: bool, end: bool) -> Tokenizer:
    """A tokenizer of one id a character: 0 to 25 for a to z, 26 for the end of a text, 27 for the start of a row."""
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<end>": 26, "<bos>": 27}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    return Tokenizer(backend, bos_id=27 if bos else None, end_of_text_id=26 if end else None)


def test_documents_are_joined_by_the_end_of_text():
    rows = pack(["abc", "de", "fghij"], _characters(bos=False, end=True), 4)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[0, 1, 2, 26], [3, 4, 26, 5], [6, 7, 8, 9]]


def test_every_row_starts_with_bos_where_there_is_one():
    rows = pack(["abc", "de"], _characters(bos=True, end=False), 3)
    assert rows.tolist() == [[27, 0, 1], [27, 2, 3]]


@given(
    documents=st.lists(st.text("abcxyz", max_size=9), min_size=1, max_size=8),
    context=st.integers(2, 7),
    bos=st.booleans(),
    end=st.booleans(),
)
def test_rows_hold_the_stream_in_order(documents, context, bos, end):
    stream = [id_ for text in documents for id_ in [*(ord(c) - 97 for c in text), *([26] if end else [])]]
    width = context - bos
    if len(stream) < width:
        with pytest.raises(ValueError, match="do not fill one row"):
            pack(documents, _characters(bos=bos, end=end), context)
        return
    tokenizer = _characters(bos=bos, end=end)
    rows = pack(documents, tokenizer, context)
    for batch_rows in (1, 2, 3):
        batches = list(stream_rows(iter(documents), tokenizer, context, batch_rows))
        assert all(batch.shape == (batch_rows, context) for batch in batches)
        assert len(batches) == len(rows) // batch_rows
        found = [row.tolist() for batch in batches for row in batch]
        assert found == rows[: len(batches) * batch_rows].tolist()
    assert rows.shape == (len(stream) // width, context)
    assert rows[:, int(bos) :].ravel().tolist() == stream[: rows.shape[0] * width]


def test_one_string_is_no_list_of_documents():
    with pytest.raises(TypeError, match="put it into a list"):
        pack("abc", _characters(bos=False, end=True), 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="context=1"):
        pack(["abc"], _characters(bos=False, end=True), 1)


def test_a_stream_is_read_no_further_than_it_is_asked_for():
    read = []

    def documents():
        for text in ("abcd", "efgh", "ijkl", "mnop"):
            read.append(text)
            yield text

    batches = stream_rows(documents(), _characters(bos=False, end=True), 5, 1)
    assert read == []
    assert next(batches).tolist() == [[0, 1, 2, 3, 26]]
    assert read == ["abcd"]
    with pytest.raises(ValueError, match="batch_rows is 0"):
        stream_rows([], _characters(bos=False, end=True), 5, 0)


def test_a_file_of_rows_is_whole_or_not_there(tmp_path):
    tokenizer = _characters(bos=True, end=True)
    documents = ["abc", "defghi", "", "jklmnopq"] * 50
    path = tmp_path / "made" / "rows.npy"
    rows = pack_file(iter(documents), tokenizer, 4, path)
    expected = pack(documents, tokenizer, 4)
    assert rows.dtype == np.int32
    for found in (rows, np.load(path), np.load(path, mmap_mode="r")):
        np.testing.assert_array_equal(found, expected)

    def interrupted():
        yield "abcdefghijkl"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_file(interrupted(), tokenizer, 4, path)
    with pytest.raises(ValueError, match="do not fill one row of 4"):
        pack_file(["a"], tokenizer, 4, tmp_path / "made" / "none.npy")
    assert list(path.parent.iterdir()) == [path]
    np.testing.assert_array_equal(np.load(path), expected)


@given(n=st.integers(2, 200), held_out=st.floats(0.01, 0.99))
def test_a_split_keeps_every_document_once_and_in_order(n, held_out):
    documents = list(range(n))
    train, test = split_documents(documents, held_out)
    assert sorted(train + test) == documents
    assert train == sorted(train)
    assert test == sorted(test)
    assert train
    assert test
    assert (train, test) == split_documents(documents, held_out)
    assert abs(len(test) - n * held_out) <= 1


def test_held_out_documents_are_spread_over_the_range():
    _, test = split_documents(list(range(100)), 0.1)
    assert test == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


@pytest.mark.parametrize(("n", "held_out"), [(1, 0.1), (10, 0.0), (10, 1.0)])
def test_a_split_that_cannot_be_made_is_an_error(n, held_out):
    with pytest.raises(ValueError, match=r"held_out|at least 2"):
        split_documents(list(range(n)), held_out)

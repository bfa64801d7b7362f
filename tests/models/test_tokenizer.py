"""Tokenizers from both sources, against a byte-pair encoder written out by hand."""

import itertools
import json
import pathlib

import gguf
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_jax import installed_data
from interp_jax.activations.wikipedia import articles
from interp_jax.models.gguf_file import GgufFile
from interp_jax.models.tokenizer import Tokenizer

# GPT-2's pieces, after SmolLM has set every digit apart.
_DIGITS = regex.compile(r"\p{N}|[^\p{N}]+")
_PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def _characters_of_bytes() -> list[str]:
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    shifted = iter(range(256, 600))
    return [chr(b) if b in plain else chr(next(shifted)) for b in range(256)]


def _encode_by_hand(text: str, vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte-pair encoding as its paper has it (Sennrich et al. 2016): the earliest merge first, until none applies."""
    characters = _characters_of_bytes()
    ids: list[int] = []
    for chunk in _DIGITS.findall(text):
        for piece in _PIECES.findall(chunk):
            symbols = [characters[byte] for byte in piece.encode()]
            while True:
                pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
                if not pairs:
                    break
                _, i = min(pairs)
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            ids += [vocabulary[symbol] for symbol in symbols]
    return ids


@pytest.fixture(scope="module")
def smollm2_file() -> GgufFile:
    return GgufFile(installed_data.find("smollm2"))


@pytest.fixture(scope="module")
def smollm2(smollm2_file) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_file)


def _write_gguf(path: pathlib.Path, *, pre="smollm", model="gpt2", types: list[int] | None = None) -> GgufFile:
    """A tokenizer of all bytes, two merges and two special tokens."""
    pieces = ["<|endoftext|>", "<|im_end|>", *_characters_of_bytes(), "Ġa", "Ġab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", model)
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", pieces)
    writer.add_array("tokenizer.ggml.token_type", types or [3, 3] + [1] * 258)
    writer.add_array("tokenizer.ggml.merges", ["Ġ a", "Ġa b"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def _sentence_pieces_by_hand(text: str, pieces: list[str], scores: list[float], types: list[int]) -> list[int]:
    """What SentencePiece does for a BPE model: user-defined pieces first, then the best-scored pair, the leftmost of
    equals, until none is a piece; bytes for the rest. Compared with the library itself on Gemma's pieces: no id of a
    million differed."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    score_of = {piece: scores[i] for piece, i in ids.items() if types[i] == 1}
    whole = sorted((piece for piece, i in ids.items() if types[i] in (3, 4)), key=len, reverse=True)
    found: list[int] = []
    symbols: list[str] = []

    def join() -> None:
        while True:
            pairs = [(-score_of[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score_of]
            if not pairs:
                break
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for symbol in symbols:
            found.extend([ids[symbol]] if symbol in score_of else [ids[f"<0x{b:02X}>"] for b in symbol.encode()])
        symbols.clear()

    while text:
        piece = next((piece for piece in whole if text.startswith(piece)), None)
        if piece is not None:
            join()
            found.append(ids[piece])
            text = text.removeprefix(piece)
        else:
            symbols.append(text[0].replace(" ", "▁"))
            text = text[1:]
    join()
    return found


def _write_sentence_pieces(path: pathlib.Path, **changed) -> GgufFile:
    """Pieces, scores and types as Gemma's file has them: user-defined pieces are written with plain spaces."""
    control, own, plain = ["<pad>", "<eos>", "<bos>"], ["\n", "\n\n", "  ", "<b>"], ["▁a", "ab", "bc", "▁ab", "abc"]
    plain += ["aa", "aaa", "▁b", "cab", "▁", "a", "b", "c", "<", ">", "植", "é"]
    pieces = [*control, "<unk>", *own, *(f"<0x{byte:02X}>" for byte in range(256)), *plain]
    metadata = {
        "model": "llama",
        "tokens": pieces,
        "token_type": [3] * 3 + [2] + [4] * 4 + [6] * 256 + [1] * len(plain),
        "scores": [-1000.0] * 8 + [0.0] * 256 + [-float(i) for i in range(len(plain))],
        "add_space_prefix": False,
        "add_bos_token": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    } | changed
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, value in metadata.items():
        write = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        write[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.fixture(scope="module")
def sentence_pieces_file(tmp_path_factory) -> GgufFile:
    return _write_sentence_pieces(tmp_path_factory.mktemp("tokenizer") / "pieces.gguf")


@pytest.fixture(scope="module")
def sentence_pieces(sentence_pieces_file) -> Tokenizer:
    return Tokenizer.from_gguf(sentence_pieces_file)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_gguf(_write_gguf(tmp_path_factory.mktemp("tokenizer") / "small.gguf"))


@pytest.mark.demo
def test_ids_agree_with_the_encoder_written_by_hand(smollm2, smollm2_file):
    vocabulary = {piece: i for i, piece in enumerate(smollm2_file.metadata["tokenizer.ggml.tokens"])}
    merges = smollm2_file.metadata["tokenizer.ggml.merges"]
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    samples = [article.text[:1500] for article in articles()[::6]]
    samples += ["½ and ² in 1905\n\n\n  two spaces\ttab don't WE'LL  \n", "植芝 盛平 naïve 🙂 e\u0301", ""]
    for text in samples:
        assert smollm2.encode(text) == _encode_by_hand(text, vocabulary, ranks)


@pytest.mark.demo
def test_the_whole_excerpt_survives_the_round_trip(smollm2):
    for article in articles():
        assert smollm2.decode(smollm2.encode(article.text)) == article.text


@pytest.mark.demo
def test_smollm2_ids(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_id is None  # The file names one, and says that none is added.
    assert (smollm2.end_of_text_id, smollm2.eos_id) == (0, 2)
    assert smollm2.encode("<|im_end|>") == [2]
    assert smollm2.decode([2]) == "<|im_end|>"


def test_merges_and_special_tokens(small):
    assert small.vocab_size == 260
    assert small.readable(small.encode("x ab ac<|endoftext|>")) == ["x", " ab", " a", "c", "<|endoftext|>"]
    assert small.encode("<|endoftext|>") == [0]
    assert (small.bos_id, small.eos_id, small.end_of_text_id) == (None, 1, 0)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_round_trip(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    readable = small.readable(ids)
    assert len(readable) == len(ids)
    assert all(token.isprintable() and token for token in readable)


def _of_file(gguf_file: GgufFile) -> tuple[list[str], list[float], list[int]]:
    return tuple(gguf_file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))


@settings(max_examples=500, deadline=None)
@given(text=st.text(alphabet="aaabbc  \n<b>é植\u200b🙂", max_size=25))
def test_sentence_pieces_are_those_found_by_hand(sentence_pieces, sentence_pieces_file, text):
    ids = sentence_pieces.encode(text)
    assert ids == _sentence_pieces_by_hand(text, *_of_file(sentence_pieces_file))
    assert sentence_pieces.decode(ids) == text


def test_sentence_pieces_are_readable(sentence_pieces):
    assert (sentence_pieces.bos_id, sentence_pieces.eos_id, sentence_pieces.end_of_text_id) == (2, 1, 1)
    ids = sentence_pieces.encode("abc  ab\n<b>dü<bos>")
    expected = ["abc", "  ", "ab", "↵", "<b>", "d", "\\xc3", "\\xbc", "<bos>"]
    assert sentence_pieces.readable(ids) == expected


def test_a_space_before_each_text(tmp_path):
    gguf_file = _write_sentence_pieces(tmp_path / "model.gguf", add_space_prefix=True)
    tokenizer = Tokenizer.from_gguf(gguf_file)
    for text in ("ab", "植 b", "a b"):
        ids = tokenizer.encode(text)
        assert ids == _sentence_pieces_by_hand(" " + text, *_of_file(gguf_file))
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == []


@pytest.mark.slow
def test_gemma_s_ids():
    """Those of SentencePiece itself, run on the same pieces."""
    if installed_data.status("gemma3")[0].path is None:
        pytest.skip("Only the tests of patch sets need it: `make test-patches` gets it.")
    gguf_file = GgufFile(installed_data.find("gemma3"))
    gemma = Tokenizer.from_gguf(gguf_file)
    assert (gemma.vocab_size, gemma.bos_id, gemma.eos_id) == (262144, 2, 1)
    assert gemma.encode("Hello  world\n\n\tI'm 植芝 🙂\x01") == [
        9259, 138, 12392, 108, 255968, 236777, 236789, 236757, 236743, 239418, 241099, 57235, 249732,
    ]  # fmt: skip
    for article in articles()[::20]:
        ids = gemma.encode(article.text)
        assert gemma.decode(ids) == article.text
        assert gemma.encode(article.text[:300]) == _sentence_pieces_by_hand(article.text[:300], *_of_file(gguf_file))


def test_readable_shows_breaks_and_halves_of_characters(small):
    assert small.readable(small.encode("a\n\té\x00")) == ["a", "↵", "⇥", "\\xc3", "\\xa9", "\\x00"]


def test_ids_outside_the_vocabulary_are_refused(small):
    for outside in (-1, 260):
        with pytest.raises(ValueError, match=f"{outside} is outside the vocabulary of 260"):
            small.decode([1, outside])
        with pytest.raises(ValueError, match="outside"):
            small.readable([outside])


def test_a_file_round_trip_gives_the_same_ids(small, tmp_path):
    path = tmp_path / "tokenizer.json"
    small._backend.save(str(path))
    again = Tokenizer.from_file(path)
    assert again.encode("x ab 12<|endoftext|>") == small.encode("x ab 12<|endoftext|>")
    assert (again.bos_id, again.eos_id, again.end_of_text_id) == (None, 0, 0)
    assert again.vocab_size == small.vocab_size


def words(path, *, frame=None, config=None):
    """A tokenizer.json with three special tokens, and a tokenizer_config.json."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "<turn>": 3}))
    backend.add_special_tokens(["<s>", "</s>", "<turn>"])
    if frame:
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=frame, special_tokens=special)
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(path / "tokenizer.json")


@pytest.mark.parametrize(
    ("options", "bos", "eos", "end_of_text"),
    [
        ({}, 1, 2, 2),
        ({"frame": "<s> $A"}, 1, 2, 2),
        ({"config": {"bos_token": "<s>", "eos_token": "<turn>"}}, None, 3, 2),
        ({"config": {"bos_token": "<s>", "eos_token": {"content": "<turn>"}, "add_bos_token": True}}, 1, 3, 2),
        ({"frame": "<s> $A </s>", "config": {"bos_token": None, "eos_token": None}}, 1, 2, 2),
        ({"frame": "$A </s>", "config": {}}, None, 2, 2),
    ],
)
def test_where_a_text_begins_and_ends(tmp_path, options, bos, eos, end_of_text):
    tokenizer = words(tmp_path / "a", **options)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_text_id) == (bos, eos, end_of_text)
    tokenizer.save(tmp_path / "b")
    again = Tokenizer.from_file(tmp_path / "b" / "tokenizer.json")
    assert (again.bos_id, again.eos_id, again.end_of_text_id) == (bos, eos, end_of_text)


def test_sentence_pieces_are_read_with_plain_spaces(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"▁a": 0, "b": 1}, merges=[]))
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.readable([0, 1]) == [" a", "b"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_what_cannot_be_rebuilt_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'bert', expected 'gpt2'.*from_file"):
        Tokenizer.from_gguf(_write_gguf(tmp_path / "a.gguf", model="bert"))
    with pytest.raises(ValueError, match=r"pre-tokenizer 'tekken' is not known, only .*smollm"):
        Tokenizer.from_gguf(_write_gguf(tmp_path / "b.gguf", pre="tekken"))
    with pytest.raises(ValueError, match="260 tokens but 3 token types"):
        Tokenizer.from_gguf(_write_gguf(tmp_path / "c.gguf", types=[1, 1, 1]))
    with pytest.raises(ValueError, match="281 tokens but 1 scores"):
        Tokenizer.from_gguf(_write_sentence_pieces(tmp_path / "e.gguf", scores=[1.0]))
    with pytest.raises(ValueError, match="0 pieces for bytes, expected one for each of 256"):
        Tokenizer.from_gguf(_write_sentence_pieces(tmp_path / "f.gguf", token_type=[1] * 281))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.json is not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "missing.json")

"""Text to token ids and back, from a `tokenizer.json` or rebuilt from the metadata of a GGUF file.

A thin layer over the `tokenizers` library that fixes what an experiment relies on: `encode` adds nothing, `decode`
hides nothing (special tokens are shown), and `readable` gives one printable string for each token, also where a token
is a part of a UTF-8 character.

Rebuilding from GGUF, two kinds:

- byte-level BPE (`gpt2`, as SmolLM2 has it): the metadata holds the pieces, the merges in order and each piece's type,
  but the pre-tokenizer only by a name (`tokenizer.ggml.pre`). An unknown name is refused: a wrong pre-tokenizer gives
  ids that look right and are not.
- SentencePiece's BPE (`llama`, as Gemma has it): the metadata holds the pieces and a score for each, and no merges.
  SentencePiece joins the two neighbours whose joint piece scores highest, so the merges are all ways to make a piece of
  two, by score. What it cannot spell with its pieces it writes as bytes.

Hazard: the text of a special token, such as `<|endoftext|>`, is encoded as that token where it stands in a text.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from interp_jax.models.safetensors_folder import read_json
from interp_jax.whole_file import write_whole

if TYPE_CHECKING:
    from interp_jax.models.gguf_file import GgufFile

__all__ = ["Tokenizer"]

_ByteLevel = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)


def _after_gpt_4(digits: str) -> pre_tokenizers.PreTokenizer:
    """GPT-4's pattern over bytes, in which Llama 3 and Qwen differ by how many digits make a piece."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, _ByteLevel(use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    # GPT-2's pattern over bytes; SmolLM first makes every digit a piece of its own. OLMo's and MPT's are GPT-NeoX's.
    "gpt-2": _ByteLevel,
    "olmo": _ByteLevel,
    "mpt": _ByteLevel,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _ByteLevel()]),
    "llama-bpe": lambda: _after_gpt_4(r"\p{N}{1,3}"),
    "qwen2": lambda: _after_gpt_4(r"\p{N}"),
}
_NORMALIZED = ("olmo", "mpt", "qwen2")  # Their texts are composed first (Unicode's form NFC).
_WHOLE_PIECES_FIRST = ("llama-bpe",)  # A piece of the pattern that is a token is that token, whatever the merges say.
_BEGUN_BY_BOS = ("llama-bpe",)  # Where the file does not say whether a text begins with the bos token.

# Token types of GGUF's `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

_END_OF_TEXT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_BEGIN_OF_TEXT_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>")

_INSTEAD = "Take the tokenizer from the model's tokenizer.json with Tokenizer.from_file."

_VISIBLE = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})


class Tokenizer:
    """A byte-pair tokenizer with the ids that a language model needs.

    Attributes:
        vocab_size: how many ids there are, special tokens included.
        bos_id: the id that the model expects before a text, or None where it was trained without one.
        eos_id: the id at which generation stops, or None.
        end_of_text_id: the id that stood between documents in training, or None. It may differ from `eos_id` in a model
            tuned for chat.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        end_of_text_id: int | None = None,
    ):
        """Wraps a tokenizer of the `tokenizers` library.

        Args:
            backend: the tokenizer; it is used as it is and must not be changed afterwards.
            bos_id: see the class.
            eos_id: see the class.
            end_of_text_id: see the class; `eos_id` where it is not given.
        """
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.end_of_text_id = eos_id if end_of_text_id is None else end_of_text_id
        self._is_byte_level = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()
        self._has_byte_pieces = bool(getattr(backend.model, "byte_fallback", False))
        self._added = {id_ for id_, _ in backend.get_added_tokens_decoder().items()}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        A text begins with the token that the file itself puts first, if it does. It ends with the one that
        `tokenizer_config.json` beside it names; where that is missing, both are known by their usual names
        (`<|endoftext|>`, `</s>`, `<bos>` and the like), and are None where there is none of them.

        Args:
            path: the file.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not a tokenizer.
        """
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(
                f"{os.fspath(path)} is not a tokenizer.json of the `tokenizers` library: {error}"
            ) from error
        special = {added.content: id_ for id_, added in backend.get_added_tokens_decoder().items() if added.special}
        bos_id, eos_id = _first(special, _BEGIN_OF_TEXT_TOKENS), _first(special, _END_OF_TEXT_TOKENS)
        end_of_text_id = eos_id
        config = Path(path).with_name("tokenizer_config.json")
        if config.is_file():
            fields = read_json(config)
            eos_id = special.get(_content(fields.get("eos_token")), eos_id)
            bos_id = special.get(_content(fields.get("bos_token"))) if fields.get("add_bos_token") else None
        plain, framed = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        if framed != plain and framed[0] in special.values():
            bos_id = framed[0]
        return cls(backend, bos_id=bos_id, eos_id=eos_id, end_of_text_id=end_of_text_id)

    @classmethod
    def from_gguf(cls, gguf_file: "GgufFile") -> "Tokenizer":
        """Rebuilds the tokenizer that a GGUF file carries in its metadata.

        Args:
            gguf_file: the opened file.

        Returns:
            The tokenizer, whose ids are those that the model was trained with.

        Raises:
            ValueError: when the file holds no BPE tokenizer, or one of which something is not known.
        """
        metadata, kind = gguf_file.metadata, gguf_file.metadata.get("tokenizer.ggml.model")
        pieces: list[str] = gguf_file.require("tokenizer.ggml.tokens")
        types: list[int] = gguf_file.require("tokenizer.ggml.token_type")
        if len(types) != len(pieces):
            raise ValueError(
                f"{gguf_file.path}: {len(pieces)} tokens but {len(types)} token types; the file is damaged."
            )
        if kind == "gpt2":
            backend = _byte_level(gguf_file, pieces)
        elif kind == "llama":
            backend = _sentence_pieces(gguf_file, pieces, types)
        else:
            raise ValueError(
                f"{gguf_file.path}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level BPE) or 'llama' "
                f"(SentencePiece's BPE). {_INSTEAD}"
            )
        backend.add_special_tokens(
            [
                tokenizers.AddedToken(p, special=True, normalized=False)
                for p, t in zip(pieces, types, strict=True)
                if t == _CONTROL
            ]
        )
        backend.add_tokens(
            [
                tokenizers.AddedToken(p, normalized=False)
                for p, t in zip(pieces, types, strict=True)
                if t == _USER_DEFINED
            ]
        )
        if backend.get_vocab_size() != len(pieces):
            raise ValueError(
                f"{gguf_file.path}: of {len(pieces)} tokens {backend.get_vocab_size()} differ; the file is damaged."
            )
        # Chat models name a bos token and yet were never given one; the flag says which. Where it is missing,
        # llama.cpp's rule holds: SentencePiece's have one.
        has_bos = metadata.get("tokenizer.ggml.add_bos_token")
        if has_bos is None:
            has_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _BEGUN_BY_BOS
        control = {p: i for i, (p, t) in enumerate(zip(pieces, types, strict=True)) if t == _CONTROL}
        return cls(
            backend,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id") if has_bos else None,
            eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
            end_of_text_id=_first(control, _END_OF_TEXT_TOKENS),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and, for the ids of this class, `tokenizer_config.json`, each whole or not at all.

        Args:
            directory: where; it is made if it is not there.
        """
        fields: dict[str, Any] = {"add_bos_token": self.bos_id is not None}
        for name, id_ in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            fields[name] = None if id_ is None else self._backend.id_to_token(id_)
        write_whole(Path(directory) / "tokenizer.json", self._backend.to_str())
        write_whole(Path(directory) / "tokenizer_config.json", json.dumps(fields, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added.

        Args:
            text: any text.

        Returns:
            The ids, an empty list for an empty text.
        """
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens shown. Broken UTF-8 at either end becomes U+FFFD.

        Args:
            ids: token ids, ints or integer arrays' elements.

        Returns:
            The text.

        Raises:
            ValueError: when an id is outside the vocabulary.
        """
        return self._backend.decode(self._checked(ids), skip_special_tokens=False)

    def readable(self, ids: Iterable[int]) -> list[str]:
        r"""One printable string a token, for tables and pages.

        Spaces stay spaces, a line break is shown as ↵ and a tab as ⇥; bytes that are only a part of a character are
        shown as `\xe2`.

        Args:
            ids: token ids.

        Returns:
            As many strings as ids.

        Raises:
            ValueError: when an id is outside the vocabulary.
        """
        return [self._readable(id_) for id_ in self._checked(ids)]

    def _readable(self, id_: int) -> str:
        piece = self._backend.id_to_token(id_)
        if piece is None:  # A hole in the vocabulary.
            return f"<{id_}>"
        if id_ in self._added:
            pass  # It is its own text, be that a name or, as with Gemma, a run of line breaks.
        elif self._is_byte_level and all(char in _BYTE_OF_CHAR for char in piece):
            piece = bytes(_BYTE_OF_CHAR[char] for char in piece).decode("utf-8", errors="backslashreplace")
        elif self._has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(piece)):
            piece = bytes([int(byte[1], 16)]).decode("ascii", errors="backslashreplace")
        else:
            piece = piece.replace("▁", " ")
        piece = piece.translate(_VISIBLE)
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in piece)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(id_) for id_ in ids]
        for id_ in checked:
            if not 0 <= id_ < self.vocab_size:
                raise ValueError(f"Token id {id_} is outside the vocabulary of {self.vocab_size}.")
        return checked


def _content(token: Any) -> str:
    """The text of a special token, as `tokenizer_config.json` writes it: alone or in a table."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _first(ids: dict[str, int], names: tuple[str, ...]) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


def _byte_level(gguf_file: "GgufFile", pieces: list[str]) -> tokenizers.Tokenizer:
    pre = gguf_file.metadata.get("tokenizer.ggml.pre")
    if pre is None and gguf_file.metadata.get("general.architecture") in ("gpt2", "gptneox"):
        pre = "gpt-2" if gguf_file.metadata["general.architecture"] == "gpt2" else "olmo"  # There was no choice yet.
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{gguf_file.path}: the pre-tokenizer {pre!r} is not known, only {sorted(_PRE_TOKENIZERS)}. {_INSTEAD}"
        )
    merges: list[str] = gguf_file.require("tokenizer.ggml.merges")
    bpe = _bpe(
        gguf_file,
        pieces,
        # A piece holds no plain space (it is written as Ġ), so the one space divides left from right.
        [_split_merge(merge) for merge in merges],
        fuse_unk=False,
        ignore_merges=pre in _WHOLE_PIECES_FIRST,
    )
    backend = tokenizers.Tokenizer(bpe)
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_pieces(gguf_file: "GgufFile", pieces: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores: list[float] = gguf_file.require("tokenizer.ggml.scores")
    if len(scores) != len(pieces):
        raise ValueError(f"{gguf_file.path}: {len(pieces)} tokens but {len(scores)} scores; the file is damaged.")
    if types.count(_BYTE) != 256:
        raise ValueError(
            f"{gguf_file.path} has {types.count(_BYTE)} pieces for bytes, expected one for each of 256. {_INSTEAD}"
        )
    score_of = {p: score for p, score, t in zip(pieces, scores, types, strict=True) if t == _NORMAL}
    merges = [
        (piece[:i], piece[i:])
        # The sort is stable: of equal scores the earlier piece first.
        for piece in sorted(score_of, key=score_of.__getitem__, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in score_of and piece[i:] in score_of
    ]
    unknown = next((p for p, t in zip(pieces, types, strict=True) if t == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        _bpe(gguf_file, pieces, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", "▁")
    if gguf_file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        to_text.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _bpe(gguf_file: "GgufFile", pieces: list[str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab={piece: id_ for id_, piece in enumerate(pieces)}, merges=merges, **options)
    except Exception as error:  # The library raises bare Exception.
        raise ValueError(f"{gguf_file.path}: its tokens and merges do not fit: {error}; it is damaged.") from error


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _byte_of_char() -> dict[str, int]:
    """GPT-2's reversible writing of bytes: printable Latin-1 stands for itself, the rest for characters from U+0100
    on."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in itself}
    others = [byte for byte in range(256) if byte not in set(itself)]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR: dict[str, int] = _byte_of_char()

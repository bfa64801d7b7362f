"""Tokenizers rebuilt from the vocabularies that llama.cpp tests itself with, against the ids that it records for them.

The ids are those of the models' own tokenizers. `make test-vocabularies` gets the files, 50 MB, and runs this.
"""

import pathlib

import pytest

from interp_jax.models.gguf_file import GgufFile
from interp_jax.models.tokenizer import Tokenizer

FOLDER = pathlib.Path(__file__).parents[2] / ".cache" / "vocabularies"
BOS = {"gpt-2": None, "llama-bpe": 128000, "llama-spm": 1, "mpt": None, "qwen2": None}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="`make test-vocabularies` gets the files; CI does"),
]


@pytest.mark.parametrize("name", BOS)
def test_ids_where_the_vocabularies_are_there(name):
    path = FOLDER / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_gguf(GgufFile(path))
    assert tokenizer.bos_id == BOS[name]
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    recorded = path.with_suffix(".gguf.out").read_text().split("\n")
    for text, line in zip(texts, recorded, strict=True):
        ids = [int(each) for each in line.split()]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text

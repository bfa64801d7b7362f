"""Models by path, as a person gives it."""

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from test_gguf_model import write_gguf
from test_hugging_face import CASES, TOKENS, write_directory

import interp_jax as ij

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.


def add_tokenizer(folder, n_words):
    words = {f"word{i}": i for i in range(n_words)}
    model = tokenizers.models.WordLevel(words, unk_token="word0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_directory(tmp_path):
    folder = write_directory(tmp_path / "my-llama", "llama")
    add_tokenizer(folder, 60)
    model = ij.load(folder)
    assert (model.name, model.n_layers, model.d_model, model.vocab_size, model.context) == ("my-llama", 3, 24, 60, 32)
    np.testing.assert_allclose(model.forward(model.params, TOKENS), CASES["llama"]["logits"], atol=2e-5)
    tokens = jnp.asarray([model.tokenizer.encode("word3 word5")])
    assert tokens.tolist() == [[3, 5]]
    table = ij.list_sites(model.forward)(model.params, tokens)
    assert {row.name for row in table} >= {"embed", "q", "attn_probs", "mlp_act", "resid_post", "logits"}
    # What is promoted is what the stream's direction adds to the logits, up to the norm's division.
    direction = jnp.ones((1, 24))
    scale = np.asarray(model.params.final_norm.scale[...])
    expected = (direction * scale) @ np.asarray(model.params.W_unembed[...])
    np.testing.assert_allclose(model.unembed(model.params, direction), expected, rtol=1e-5)


def test_a_tokenizer_of_another_model(tmp_path):
    folder = write_directory(tmp_path, "llama")
    add_tokenizer(folder, 61)
    with pytest.raises(ValueError, match=r"has 61 tokens and the model 60: they are not of one model"):
        ij.load(folder)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no model 'nothing'; there are tiny, smollm2, gemma3, and paths of"):
        ij.load("nothing")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is not there"):
        ij.load(write_directory(tmp_path / "bare", "llama"))
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"weights.bin is not a directory, nor a file that ends in .gguf"):
        ij.load(file)
    with pytest.raises(ValueError, match=r"no metadata 'tokenizer.ggml.tokens'"):
        ij.load(write_gguf(tmp_path / "model.gguf", "qwen2"))

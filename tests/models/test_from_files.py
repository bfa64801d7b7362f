"""Models by path, as a person gives it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from test_gguf_model import write_gguf
from test_hugging_face import CASES, TOKENS, write_directory

import interp_jax as ij
from interp_jax.models.folding import fold_norms
from interp_jax.models.from_files import save_language_model

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


def test_options_reach_the_model(tmp_path):
    folder = write_directory(tmp_path, "llama")
    add_tokenizer(folder, 60)
    for name in (folder, "tiny"):
        params = ij.load(name, dtype=jnp.bfloat16, compute_dtype=jnp.float32, layers="unrolled", remat=True).params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
        assert (params.compute_dtype, params.is_stacked, params.remat) == (jnp.float32, False, True)


def test_an_option_that_does_not_exist():
    with pytest.raises(TypeError, match=r"no option dtyp; there are dtype, compute_dtype, layers"):
        ij.load("tiny", dtyp="bfloat16")


def test_where_a_text_ends_by_the_model_s_own_files(tmp_path):
    folder = write_directory(tmp_path, "llama", eos_token_id=3)
    add_tokenizer(folder, 60)
    assert ij.load(folder).stop_tokens == (3,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3, 99]}))
    assert ij.load(folder).stop_tokens == (3, 5)  # there is no token 99


def test_a_model_that_was_changed_here_is_loaded_by_path(tmp_path):
    tiny = ij.load("tiny")
    folded = dataclasses.replace(tiny, params=fold_norms(tiny.params), more_stop_tokens=(9,))
    save_language_model(folded, tmp_path / "folded")
    again = ij.load(tmp_path / "folded")
    assert (again.name, again.stop_tokens) == ("folded", folded.stop_tokens)
    tokens = jnp.asarray([tiny.tokenizer.encode("The city is one of the largest")])
    np.testing.assert_array_equal(again.forward(again.params, tokens), folded.forward(folded.params, tokens))
    assert again.tokenizer.encode("In 1914, the war") == tiny.tokenizer.encode("In 1914, the war")


def test_another_library_s_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="tiny-wikipedia runs on another library's code"):
        save_language_model(dataclasses.replace(ij.load("tiny"), params={}), tmp_path)


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

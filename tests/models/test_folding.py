"""Weights that were folded or centred on request: the same logits from every family, by PyTorch's reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_reference
from test_hugging_face import CASES, write_directory

import interp_jax as ij
from interp_jax.models.folding import center_unembedding, center_writing, fold_norms, fold_value_biases, untie
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.transformer import apply, named_parameters, stacked

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

TOKENS = jnp.asarray(pytorch_reference.TOKENS)
LAYER_NORMS = ["gpt2", "gpt_neo", "gpt_neox", "gpt_neox_sequential", "gpt2_options"]


def load(case, tmp_path, **options):
    return load_hugging_face(write_directory(tmp_path, case), **options)


def assert_logits_are_kept(model, case):
    expected = CASES[case]["logits"]
    np.testing.assert_allclose(jax.jit(apply)(model, TOKENS), expected, atol=5e-6 * np.abs(expected).max() + 2e-5)


@pytest.mark.parametrize("case", ["llama_3", "gpt2", "gpt_neo", "gpt_neox", "qwen3", "gemma2", "gemma3_text"])
def test_folded_norms(case, tmp_path):
    model = load(case, tmp_path)
    before = jax.tree.map(np.asarray, model)
    folded = fold_norms(model)
    assert_logits_are_kept(folded, case)
    jax.tree.map(np.testing.assert_array_equal, before, model)  # a new model: the old one is as it was
    parameters, offset = named_parameters(folded), folded.config.norm_offset
    for norm in ("blocks.attn_norm", "blocks.mlp_norm", "final_norm"):
        np.testing.assert_array_equal(parameters[f"{norm}.scale"] + offset, 1)
        if model.config.norm == "layer":
            np.testing.assert_array_equal(parameters[f"{norm}.bias"], 0)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "qwen2"])
def test_folded_value_biases(case, tmp_path):
    folded = fold_value_biases(load(case, tmp_path))
    assert_logits_are_kept(folded, case)
    np.testing.assert_array_equal(named_parameters(folded)["blocks.attn.b_v"], 0)


@pytest.mark.parametrize("case", LAYER_NORMS)
def test_centred_writing(case, tmp_path):
    centred = center_writing(load(case, tmp_path))
    logits, at = jax.jit(ij.fetch(apply, "resid_post"))(centred, TOKENS)
    np.testing.assert_allclose(logits, CASES[case]["logits"], atol=5e-5)
    for stream in at.values():
        np.testing.assert_allclose(stream.mean(-1), 0, atol=2e-6 * np.abs(stream).max())


def test_a_centred_unembedding_keeps_probabilities(tmp_path):
    logits = jax.jit(apply)(center_unembedding(load("gpt2", tmp_path)), TOKENS)
    np.testing.assert_allclose(logits.mean(-1), 0, atol=1e-5)
    expected = jax.nn.log_softmax(CASES["gpt2"]["logits"])
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=2e-5)


def test_all_of_them_one_after_another_with_layers_unrolled(tmp_path):
    model = load("gpt_neo", tmp_path, layers="unrolled")
    for change in (fold_norms, fold_value_biases, center_writing, fold_norms):
        model = change(model)
        assert not model.is_stacked
    assert_logits_are_kept(model, "gpt_neo")
    assert_logits_are_kept(stacked(model), "gpt_neo")


def test_untying_and_what_is_there_already(tmp_path):
    model = load("qwen3", tmp_path)
    assert_logits_are_kept(untie(model), "qwen3")
    assert untie(untie(model)).config == untie(model).config
    assert fold_value_biases(model) is model


def test_bfloat16_stays(tmp_path):
    model = load("llama_3", tmp_path, dtype=jnp.bfloat16, compute_dtype=jnp.float32, remat=True)
    folded = fold_norms(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}
    assert (folded.compute_dtype, folded.remat) == (jnp.float32, True)


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"LayerNorms only; this one has norm='rms', post_norms=False"):
        center_writing(load("llama", tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"logit_soft_cap=3.0"):
        center_unembedding(load("gemma2", tmp_path / "gemma2"))

"""OV and QK circuits, against what the model itself writes and where it looks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, all_sites, small_model, small_tokens

from interp_jax.attribution.head_circuits import LowRank, composition_score, output_value_circuit, query_key_circuit
from interp_jax.models.transformer import named_parameters, stacked

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def parameters(model):
    return {name: np.asarray(value, np.float64) for name, value in named_parameters(model.params).items()}


def without_biases(model):
    named = named_parameters(model.params)
    leaves = [jnp.zeros_like(leaf) if ".b_" in name else leaf for name, leaf in named.items()]
    return dataclasses.replace(model, params=jax.tree.unflatten(jax.tree.structure(model.params), leaves))


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in ("llama", "gemma") else pytest.mark.slow) for each in CONFIGS]
)
def test_ov_circuits_give_what_attention_writes(family):
    model, tokens = small_model(family), small_tokens()
    at, p = all_sites(model, tokens), parameters(model)
    for layer in range(2):
        reads, patterns = at[layer, "attn_in"], at[layer, "attn_probs"]
        circuits = [np.asarray(output_value_circuit(model, layer, head).dense()) for head in range(4)]
        written = sum(patterns[:, head] @ reads @ circuits[head] for head in range(4))
        if family in ("gpt2", "neox"):  # biases: a pattern sums to 1, so the values' pass whole
            of_values = np.einsum("hk,hkd->d", p[f"blocks.{layer}.attn.b_v"], p[f"blocks.{layer}.attn.W_o"])
            written = written + of_values + p[f"blocks.{layer}.attn.b_o"]
        expected = at[layer, "attn_out"]
        if family == "gemma":  # but for the division by the norm behind attention
            written = written * (np.linalg.norm(expected, axis=-1) / np.linalg.norm(written, axis=-1))[..., None]
        np.testing.assert_allclose(written, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("neox", marks=pytest.mark.slow)])
def test_qk_circuits_give_attention_logits_at_every_distance(family):
    model, tokens = small_model(family), small_tokens(batch=1)
    if family == "neox":  # with a part of each head turned; its biases set to zero
        zeros = [
            jnp.zeros_like(leaf) if ".b_" in name else leaf for name, leaf in named_parameters(model.params).items()
        ]
        model = dataclasses.replace(model, params=jax.tree.unflatten(jax.tree.structure(model.params), zeros))
    at = all_sites(model, tokens)
    for head in (0, 3):
        reads, logits = at[1, "attn_in"][0], at[1, "attn_logits"][0, head]
        for distance in (0, 1, 5):
            circuit = query_key_circuit(model, 1, head, distance=distance)
            for query in range(distance, 7):
                expected = reads[query] @ np.asarray(circuit.dense()) @ reads[query - distance]
                assert logits[query, query - distance] == pytest.approx(expected, abs=1e-4)


def test_qk_circuits_of_normed_and_capped_scores():
    """Gemma's: the norms of q and k divide by sizes, known here from the circuit's own factors."""
    model, tokens = small_model("gemma"), small_tokens(batch=1)
    at, p = all_sites(model, tokens), parameters(model)
    reads, query, distance = at[0, "attn_in"][0], 5, 2
    uncapped = 5 * np.arctanh(at[0, "attn_logits"][0, 2, query, query - distance] / 5)
    sizes = [
        np.sqrt(((reads[position] @ p[f"blocks.0.attn.W_{which}"][:, head]) ** 2).mean() + 1e-5)
        for which, position, head in (("q", query, 2), ("k", query - distance, 1))
    ]
    circuit = query_key_circuit(model, 0, 2, distance=distance)
    expected = reads[query] @ np.asarray(circuit.dense()) @ reads[query - distance] / np.prod(sizes)
    assert uncapped == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_gpt2_learned_positions_need_no_distance():
    model, tokens = without_biases(small_model("gpt2")), small_tokens(batch=1)
    at = all_sites(model, tokens)
    circuit = np.asarray(query_key_circuit(model, 0, 1).dense())
    reads = at[0, "attn_in"][0]
    np.testing.assert_allclose(reads @ circuit @ reads.T, at[0, "attn_logits"][0, 1], atol=1e-4)


def test_stacked_layers_have_the_same_circuits():
    model = small_model()
    other = dataclasses.replace(model, params=stacked(model.params))
    for circuit in (output_value_circuit, query_key_circuit):
        np.testing.assert_array_equal(circuit(model, 1, 2).dense(), circuit(other, 1, 2).dense())


def test_low_rank_matrices_are_what_their_dense_forms_are():
    rng = np.random.default_rng(0)
    a, b, c, d = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 2), (2, 6), (6, 3), (3, 6)))
    one, other, dense = LowRank(a, b), LowRank(c, d), np.asarray(a @ b)
    np.testing.assert_allclose((one @ other).dense(), dense @ np.asarray(c @ d), rtol=1e-4, atol=1e-5)
    matrix = rng.normal(size=(4, 6)).astype(np.float32)
    np.testing.assert_allclose((matrix @ one).dense(), matrix @ dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((jnp.asarray(matrix) @ one @ matrix.T).dense(), matrix @ dense @ matrix.T, atol=1e-4)
    np.testing.assert_allclose(one.T.dense(), dense.T)
    np.testing.assert_allclose(one.singular_values(), np.linalg.svd(dense)[1][:2], rtol=1e-5)
    expected = sorted(np.linalg.eigvals(dense.astype(np.float64)), key=abs)[-2:]
    np.testing.assert_allclose(sorted(one.eigenvalues(), key=abs), expected, rtol=1e-4)
    assert one.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-5)
    score = np.linalg.norm(dense @ np.asarray(c @ d)) / np.linalg.norm(dense) / np.linalg.norm(c @ d)
    assert composition_score(one, other) == pytest.approx(score, rel=1e-5)
    with pytest.raises(ValueError, match=r"\(4, 6\) is not square"):
        (matrix @ one).eigenvalues()


def test_bad_input_is_told():
    model = small_model()
    with pytest.raises(ValueError, match="no layer 2; they are 0 to 1"):
        output_value_circuit(model, 2, 0)
    with pytest.raises(ValueError, match="no head -1; they are 0 to 3"):
        query_key_circuit(model, 0, -1)
    with pytest.raises(ValueError, match="distance=-1"):
        query_key_circuit(model, 0, 0, distance=-1)
    with pytest.raises(ValueError, match=r"its parameters are a dict\). ij.load gives"):
        output_value_circuit(dataclasses.replace(model, params={}), 0, 0)

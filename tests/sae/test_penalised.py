"""Steps by the pairs that matter are those of the dense objective, however many pairs there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import GatedSAE, JumpReLUSAE, ReLUSAE
from interp_jax.sae.autoencoder import Batch, SparseAutoencoder, Sparsity

pytestmark = pytest.mark.caches  # several ways of a step are compiled; leak checking would do it for each call

BATCH, D_SAE = 1024, 2048  # where more ways than the dense one begin
KINDS = {
    "relu": (ReLUSAE, {}, Sparsity(0.02)),
    "relu_norm_weighted": (ReLUSAE, {}, Sparsity(0.02, is_norm_weighted=True)),
    "relu_transcoder": (ReLUSAE, {"d_out": 6, "has_skip": True}, Sparsity(0.02)),
    "gated": (GatedSAE, {}, Sparsity(0.02)),
    "jumprelu": (JumpReLUSAE, {"bandwidth": 0.5, "threshold": 0.1}, Sparsity(0.02)),
    "jumprelu_to_a_target": (JumpReLUSAE, {"bandwidth": 0.5, "parameter": "log_threshold"}, Sparsity(0.2, l0_target=9)),
}


def given(kind, pairs_a_row):
    make, options, _ = KINDS[kind]
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (BATCH, 12))
    sae = make.random(12, D_SAE, key=keys[1], **options)
    sae = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(keys[2], leaf.shape), sae)
    target = jax.random.normal(keys[3], (BATCH, sae.d_out)) if "d_out" in options else x
    above = np.sort(np.asarray(sae.pre_activations(x) - sae.floor()).ravel())
    bias = sae.parameter(sae.encoder_bias) - above[-pairs_a_row * BATCH]
    return sae.replace(**{sae.encoder_bias: bias}), x, target, jnp.linspace(0.5, 1, BATCH)


def compiled(kind, objective_and_gradient):
    """What is to be compared, compiled once for all numbers of pairs."""
    sparsity = KINDS[kind][2]
    return jax.jit(lambda sae, *batch: objective_and_gradient(sae, Batch(*batch), sparsity))


SLOW = {"relu_norm_weighted", "relu_transcoder", "jumprelu"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def test_outcome_and_gradient_are_those_of_the_dense_objective(kind):
    run = compiled(kind, KINDS[kind][0].objective_and_gradient)
    dense = compiled(kind, SparseAutoencoder.objective_and_gradient)
    for pairs_a_row in (3, 15, 30, 300):  # each of the three ways by count, and the dense one
        sae, *batch = given(kind, pairs_a_row)
        found, expected = run(sae, *batch), dense(sae, *batch)
        np.testing.assert_array_equal(found[0].firings, expected[0].firings)
        assert 0 < np.sum(found[0].firings) <= pairs_a_row * BATCH
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6 * max(1e-3, float(np.abs(b).max())), rtol=1e-4)


@pytest.mark.slow
def test_mapped_over_autoencoders_each_goes_its_own_way():
    saes = [given("relu", pairs_a_row) for pairs_a_row in (3, 300)]
    batch = saes[0][1:]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(sae for sae, *_ in saes))
    run = compiled("relu", ReLUSAE.objective_and_gradient)
    found = jax.vmap(run, in_axes=(0, None, None, None))(stacked, *batch)
    for number, (sae, *_) in enumerate(saes):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(run(sae, *batch)), strict=True):
            np.testing.assert_allclose(a[number], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu_to_a_target"])
@pytest.mark.parametrize("pairs_a_row", [3, 300])
def test_what_is_not_a_number_is_seen_in_the_loss(kind, pairs_a_row):
    sae, *batch = given(kind, pairs_a_row)
    sae = sae.replace(W_enc=sae.W_enc[...].at[0, 5].set(jnp.nan))
    outcome, _ = compiled(kind, KINDS[kind][0].objective_and_gradient)(sae, *batch)
    assert jnp.isnan(outcome.loss)

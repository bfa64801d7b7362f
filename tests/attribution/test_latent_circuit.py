"""Circuits of latents, in a model where every node and every edge is known."""

import jax.numpy as jnp
import numpy as np
import pytest
from hand_models import as_model, pair_of
from small_models import small_model, small_tokens
from test_latent_nodes import random_sae

from interp_jax.attribution.latent_circuit import latent_circuit
from interp_jax.attribution.prompt_pair import prompt_pair
from interp_jax.instrument import site
from interp_jax.models.tiny import load_tiny
from interp_jax.sae import ReLUSAE

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def planted_forward(params, tokens):
    """Four features a token. Layer 1's feature 1 is layer 0's feature 0 of the position before; logit 0 reads it.

    Feature 2 goes to logit 1 straight through; 3 is never read.
    """
    x = site(jnp.asarray(params["embed"])[tokens], "embed")
    x = site(x, "resid_post", layer=0)
    before = jnp.pad(x[:, :-1, 0], ((0, 0), (1, 0)))
    x = jnp.stack([jnp.zeros_like(before), before, x[..., 2], x[..., 3]], axis=-1)
    x = site(x, "resid_post", layer=1)
    logits = jnp.stack([2 * x[..., 1], x[..., 2]], axis=-1)
    return site(logits, "logits")


EMBED = np.diag([1.0, 1.0, 1.0, 5.0]).astype(np.float32)
IDENTITY = ReLUSAE(W_enc=jnp.eye(4), W_dec=jnp.eye(4), b_enc=jnp.zeros(4), b_dec=jnp.zeros(4))
SAES = {(1, "resid_post"): IDENTITY, (0, "resid_post"): IDENTITY}  # their order is no matter


@pytest.fixture(scope="module")
def planted():
    model = as_model(planted_forward, {"embed": EMBED}, n_layers=2, d_model=4, vocab_size=4)
    reference = jnp.array([[1, 3, 1, 3, 1], [3, 1, 3, 1, 1]])  # neither feature 0 nor feature 2
    return model, pair_of([1, 3, 0, 3], [1, 0, 3, 3], answer=0, wrong=1), reference


def test_the_planted_nodes_and_edge_are_found_faithful_and_complete(planted):
    model, pair, reference = planted
    found = latent_circuit(model, pair, SAES, reference)
    nodes = {(row.node.layer, row.node.position, row.node.unit): row.effect for row in found.nodes}
    assert nodes == {(0, 2, 0): pytest.approx(-2), (1, 3, 1): pytest.approx(-2)}
    (edge,) = found.edges
    assert (edge.upstream.layer, edge.upstream.position, edge.upstream.unit) == (0, 2, 0)
    assert (edge.downstream.layer, edge.downstream.position, edge.downstream.unit) == (1, 3, 1)
    assert edge.share == pytest.approx(1)
    assert (found.full, found.empty) == (pytest.approx(2), pytest.approx(0))
    assert (found.faithfulness, found.completeness) == (pytest.approx(1), pytest.approx(1))
    lines = found.table().splitlines()
    assert lines[0].startswith("2 nodes, 1 edges; metric 2.0000, all ablated 0.0000")
    assert "L0 resid_post_latents, position 2 't0', unit 0 -> L1 resid_post_latents, position 3" in lines[-1]


A, B, C, UNREAD, NONE = range(5)


def converging_forward(params, tokens):
    """Three layers. Two features of other positions and one of the own come together in the last, by known shares."""
    x = site(jnp.asarray(params["embed"])[tokens], "resid_post", layer=0)
    before = {back: jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]] for back in (1, 3)}
    nothing = jnp.zeros_like(x[..., 0])
    first = 2 * before[3][..., A] + 3 * before[1][..., B]
    x = site(jnp.stack([first, x[..., C], x[..., UNREAD], nothing, nothing], axis=-1), "resid_post", layer=1)
    second = x[..., 0] + 4 * x[..., 1]
    x = site(jnp.stack([second, x[..., 1], nothing, x[..., 2], nothing], axis=-1), "resid_post", layer=2)
    return site(x[..., :2], "logits")


def test_a_planted_circuit_of_several_paths_is_found_with_every_share():
    model = as_model(converging_forward, {"embed": np.eye(5, dtype=np.float32)}, n_layers=3, d_model=5, vocab_size=5)
    identity = ReLUSAE(W_enc=jnp.eye(5), W_dec=jnp.eye(5), b_enc=jnp.zeros(5), b_dec=jnp.zeros(5))
    saes = {(layer, "resid_post"): identity for layer in range(3)}
    pair = pair_of([NONE, A, UNREAD, B, C], [NONE] * 5, answer=0, wrong=1)
    found = latent_circuit(model, pair, saes)

    def where(node):
        return node.layer, node.position, node.unit

    effects = {
        (0, 1, A): -2, (0, 3, B): -3, (0, 4, C): -3,
        (1, 4, 0): -5, (1, 4, 1): -3, (2, 4, 0): -9, (2, 4, 1): 1,
    }  # fmt: skip
    assert {where(row.node): row.effect for row in found.nodes} == pytest.approx(effects)
    shares = {
        ((0, 1, A), (1, 4, 0)): 2 / 5, ((0, 3, B), (1, 4, 0)): 3 / 5, ((0, 4, C), (1, 4, 1)): 1,
        ((1, 4, 0), (2, 4, 0)): 5 / 9, ((1, 4, 1), (2, 4, 0)): 4 / 9, ((1, 4, 1), (2, 4, 1)): 1,
        # From the first layer to the last, through the second.
        ((0, 1, A), (2, 4, 0)): 2 / 9, ((0, 3, B), (2, 4, 0)): 3 / 9, ((0, 4, C), (2, 4, 0)): 4 / 9,
        ((0, 4, C), (2, 4, 1)): 1,
    }  # fmt: skip
    assert {(where(edge.upstream), where(edge.downstream)): edge.share for edge in found.edges} == pytest.approx(shares)
    assert (found.full, found.empty) == (pytest.approx(8), pytest.approx(0))
    assert (found.faithfulness, found.completeness) == (pytest.approx(1), pytest.approx(1))

    few = latent_circuit(model, pair, saes, threshold=0.3, edge_threshold=0.5)  # of 8: without A and the wrong logit
    assert {where(row.node) for row in few.nodes} == {at for at, effect in effects.items() if abs(effect) >= 0.3 * 8}
    assert {(where(edge.upstream), where(edge.downstream)) for edge in few.edges} == {
        ((0, 3, B), (1, 4, 0)), ((0, 4, C), (1, 4, 1)), ((1, 4, 0), (2, 4, 0)),
    }  # fmt: skip
    assert few.alone == pytest.approx(3 + 4)
    assert few.without == pytest.approx(0)


def test_without_a_reference_the_corrupted_prompt_stands_in(planted):
    model, _, _ = planted
    pair = pair_of([1, 3, 0, 2], [1, 0, 3, 2], answer=0, wrong=1)  # feature 2 works against it on both prompts alike
    found = latent_circuit(model, pair, SAES)
    assert (found.full, found.empty) == (pytest.approx(1), pytest.approx(-1))
    assert found.empty == pytest.approx(found.effects.corrupted)
    assert (found.faithfulness, found.completeness) == (pytest.approx(1), pytest.approx(1))


def test_half_of_a_behaviour_is_told_from_all_of_it(planted):
    """Feature 2 at the last position adds to the metric too, but alike on both prompts: attribution does not see it."""
    model, _, reference = planted
    pair = pair_of([1, 3, 0, 2], [1, 0, 3, 2], answer=0, wrong=1)
    found = latent_circuit(model, pair, SAES, reference)
    assert found.full == pytest.approx(1)
    assert found.faithfulness == pytest.approx(2 / 1)  # without what works against it
    assert found.completeness == pytest.approx(2 / 1)


def test_what_autoencoders_miss_is_a_node(planted):
    """The latent of feature 1 in layer 1 never fires, so the error carries the behaviour."""
    model, pair, reference = planted
    enc = jnp.eye(4).at[1, 1].set(0.0)
    missing = ReLUSAE(W_enc=enc, W_dec=jnp.eye(4), b_enc=jnp.zeros(4), b_dec=jnp.zeros(4))
    found = latent_circuit(model, pair, {(1, "resid_post"): missing}, reference)
    (row,) = found.nodes
    assert (row.node.site, row.node.position, row.node.unit) == ("resid_post_error", 3, None)
    assert (found.faithfulness, found.completeness) == (pytest.approx(1), pytest.approx(1))
    assert found.edges == ()


@pytest.mark.slow
def test_with_everything_in_the_circuit_the_model_is_itself():
    model, tokens = small_model(), small_tokens(batch=3)
    pair = pair_of(np.asarray(tokens[0]), np.asarray(tokens[1]), answer=3, wrong=4)
    saes = {(1, "resid_post"): random_sae(12, 7, 1)}
    found = latent_circuit(model, pair, saes, tokens, threshold=0.0)
    assert found.alone == pytest.approx(found.full, abs=1e-4)
    assert found.without == pytest.approx(found.empty, abs=1e-4)
    assert found.full == pytest.approx(found.effects.clean, abs=1e-4)


@pytest.mark.slow
def test_on_a_trained_model_a_lower_threshold_is_more_faithful():
    tiny = load_tiny()
    pair = prompt_pair(tiny, "The city is the capital of the", "The war is the cause of the", answer=" United")
    saes = {(layer, "mlp_out"): random_sae(128, 64, layer) for layer in (0, 3)}
    few, many = (latent_circuit(tiny, pair, saes, threshold=threshold) for threshold in (0.1, 0.0001))
    assert len(few.nodes) < len(many.nodes)
    assert abs(many.faithfulness - 1) < abs(few.faithfulness - 1)
    assert many.faithfulness == pytest.approx(1, abs=0.02)
    assert many.completeness == pytest.approx(1, abs=0.02)


def test_bad_input_is_told(planted):
    model, pair, reference = planted
    with pytest.raises(ValueError, match=r"No node has an effect of 20, 10 of the metric's difference; the largest"):
        latent_circuit(model, pair, SAES, reference, threshold=10.0)
    with pytest.raises(ValueError, match="rows of 2 tokens or more"):
        latent_circuit(model, pair, SAES, np.array([[1], [2]]))
    with pytest.raises(ValueError, match=r"reference\[0, 1\] is 999"):
        latent_circuit(model, pair, SAES, np.array([[1, 999]]))
    with pytest.raises(ValueError, match="no site 'mlp_out' in layer 0"):
        latent_circuit(model, pair, {(0, "mlp_out"): IDENTITY}, reference)

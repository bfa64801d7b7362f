"""Virtual weights, against the matrices multiplied out and against a model that has nothing between the two layers."""

import jax
import numpy as np
import pytest
from small_models import small_model

from interp_jax.attribution.head_circuits import output_value_circuit
from interp_jax.attribution.virtual_weights import strongest_virtual_weights, virtual_weights
from interp_jax.sae import ReLUSAE

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]

UP = ReLUSAE.random(12, 30, key=jax.random.key(0))
DOWN = ReLUSAE.random(12, 20, key=jax.random.key(1))


def test_a_unit_of_code_changes_the_pre_activation_by_the_virtual_weight():
    weights = virtual_weights(UP, DOWN)
    assert weights.shape == (30, 20)
    x = jax.random.normal(jax.random.key(3), (12,))
    change = DOWN.pre_activations(x + UP.W_dec[...][7]) - DOWN.pre_activations(x)
    np.testing.assert_allclose(weights[7], change, atol=1e-5)
    some = virtual_weights(UP, DOWN, upstream_latents=[7, 2], downstream_latents=4)
    np.testing.assert_allclose(some[:, 0], np.asarray(weights)[[7, 2], 4], atol=1e-6)


def test_through_a_head():
    circuit = output_value_circuit(small_model(), 0, 1)
    expected = np.asarray(UP.W_dec[...]) @ np.asarray(circuit.dense()) @ np.asarray(DOWN.W_enc[...])
    np.testing.assert_allclose(virtual_weights(UP, DOWN, circuit), expected, atol=1e-5)


@pytest.mark.parametrize("carried", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_strongest_are_those_of_the_whole_matrix(carried):
    many = ReLUSAE.random(12, 2500, key=jax.random.key(4))  # two chunks and a part
    through = output_value_circuit(small_model(), 1, 0) if carried else None
    weights = np.asarray(virtual_weights(many, DOWN, through))[:, [3, 0, 9]]
    found = strongest_virtual_weights(many, DOWN, 50, through, downstream_latents=[3, 0, 9])
    order = np.argsort(-np.abs(weights), axis=0)[:50].T
    np.testing.assert_array_equal(np.sort(found.latents), np.sort(order))
    np.testing.assert_allclose(found.weights, np.take_along_axis(weights.T, found.latents, 1), atol=1e-6)
    assert (np.diff(np.abs(found.weights)) <= 0).all()


def test_all_of_a_small_dictionary_can_be_asked_for():
    found = strongest_virtual_weights(UP, DOWN, 30)
    np.testing.assert_array_equal(np.sort(found.latents), np.broadcast_to(np.arange(30), (20, 30)))


def test_bad_input_is_told():
    narrow = ReLUSAE.random(5, 9, key=jax.random.key(2))
    with pytest.raises(ValueError, match="writes vectors of width 12, and the downstream one reads width 5"):
        virtual_weights(UP, narrow)
    with pytest.raises(ValueError, match=r"through a circuit of shape \(12, 12\) the downstream one reads width 5"):
        virtual_weights(UP, narrow, output_value_circuit(small_model(), 0, 0))
    with pytest.raises(ValueError, match="no upstream latent 30; they are 0 to 29"):
        virtual_weights(UP, DOWN, upstream_latents=[0, 30])
    with pytest.raises(ValueError, match="k=31; the upstream dictionary has 30 latents"):
        strongest_virtual_weights(UP, DOWN, 31)

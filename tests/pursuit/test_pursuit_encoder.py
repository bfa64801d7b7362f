"""A pursuit in an autoencoder's place, and the encoder's own largest codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pursuit_problems import problem

from interp_jax.pursuit import PursuitEncoder, gradient_pursuit, orthogonal_matching_pursuit, topk_encode
from interp_jax.sae import ReLUSAE, evaluate

pytestmark = pytest.mark.caches  # a pursuit is compiled once for each size, not for each call


@pytest.fixture
def sae():
    sae = ReLUSAE.random(24, 60, key=jax.random.key(0))
    return sae.replace(b_dec=jnp.linspace(-1, 1, 24), W_dec=2 * sae.W_dec[...])


@pytest.fixture
def x():
    return jnp.asarray(problem(0, batch=32)[0])


@pytest.mark.parametrize("method", [gradient_pursuit, orthogonal_matching_pursuit])
def test_codes_are_those_of_the_pursuit_with_the_bias_taken_off_and_put_back(sae, x, method):
    encoder = PursuitEncoder(sae, 5, method)
    code = method(x - sae.b_dec[...], sae.W_dec[...], 5)
    np.testing.assert_array_equal(encoder.encode(x), code.dense(60))
    np.testing.assert_allclose(encoder(x), code.decode(sae.W_dec[...]) + sae.b_dec[...], rtol=1e-6)
    np.testing.assert_allclose(encoder.decode(encoder.encode(x)), encoder(x), atol=1e-5)
    assert (encoder.d_in, encoder.d_sae) == (24, 60)


def test_it_is_judged_as_an_autoencoder_is(sae, x):
    found = evaluate(PursuitEncoder(sae, 5), [np.asarray(x)])
    assert found.l0 <= 5
    reconstruction = np.asarray(PursuitEncoder(sae, 5)(x))
    expected = np.sum((np.asarray(x) - reconstruction) ** 2) / np.sum((np.asarray(x) - np.asarray(x).mean(0)) ** 2)
    assert found.fvu == pytest.approx(expected, rel=1e-4)


def test_it_goes_through_jit_and_grad(sae, x):
    encoder = PursuitEncoder(sae, 5)
    gradient = jax.jit(jax.grad(lambda encoder, x: jnp.sum(jnp.square(x - encoder(x)))))(encoder, x)
    assert isinstance(gradient, PursuitEncoder)
    assert float(jnp.abs(gradient.sae.W_dec[...]).max()) > 0
    np.testing.assert_array_equal(gradient.sae.W_enc[...], 0)


def test_a_transcoder_is_refused():
    with pytest.raises(ValueError, match="Pursue its targets instead"):
        PursuitEncoder(ReLUSAE.random(24, 60, key=jax.random.key(0), d_out=12), 5).code(jnp.zeros((2, 24)))


def test_it_is_a_pytree_as_any_other(sae):
    encoder = PursuitEncoder(sae, 5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), encoder)
    assert stacked.sae.W_dec.shape == (2, 60, 24)
    assert jax.tree.map(lambda leaf: 0, encoder).l0 == 5


def test_the_largest_codes_of_an_encoder(sae, x):
    dense = np.asarray(sae.encode(x))
    code = topk_encode(sae, x.reshape(4, 8, 24), 3)
    cut = np.sort(dense, axis=1)[:, -3][:, None]
    expected = np.where(dense >= cut, dense, 0)
    np.testing.assert_allclose(code.dense(60).reshape(32, 60), expected, rtol=1e-6)
    left = np.linalg.norm(np.asarray(x) - np.asarray(sae.decode(jnp.asarray(expected))), axis=1)
    np.testing.assert_allclose(code.residual_norm.reshape(-1), left, rtol=1e-5)
    every = topk_encode(sae, x, 60)
    np.testing.assert_array_equal(every.l0_reached, (dense > 0).sum(1))
    with pytest.raises(ValueError, match="l0 is 61; expected 1 to 60"):
        topk_encode(sae, x, 61)


@pytest.mark.parametrize("shape", [(5, 8), (5, 1), (1,)])
def test_another_width_is_told(sae, shape):
    with pytest.raises(ValueError, match=r"expected \[..., 24\], the autoencoder's d_in"):
        PursuitEncoder(sae, 4)(jnp.ones(shape))

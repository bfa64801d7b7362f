"""What is done about dead latents: auxiliary-k, ghost gradients, resampling; against the formulas written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from interp_jax.sae import GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE, TrainConfig
from interp_jax.sae.auxiliary_k import auxiliary_loss
from interp_jax.sae.dead_latents import DeadLatents, add_gradient_of_dead
from interp_jax.sae.ghost import ghost_loss
from interp_jax.sae.resample import as_if_new, longest_dead, resample
from interp_jax.sae.step import METRICS, initial_state, step
from interp_jax.sae.superposition import random_directions, superposed
from interp_jax.sae.unit_norm import inside, tangent, to_norm_at_most_one, to_unit_norm

pytestmark = pytest.mark.caches  # dozens of small programs: traced anew each, they would take minutes

D_SAE = 30
X = jax.random.normal(jax.random.key(1), (50, 8))
WEIGHTS = jnp.linspace(0.2, 1, 50)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def relu_sae():
    return ReLUSAE.random(8, D_SAE, key=jax.random.key(0)).replace(b_dec=jnp.linspace(-1, 1, 8))


def zeros_like(sae):
    return jax.tree.map(jnp.zeros_like, sae)


def assert_close(ours, expected, names=NAMES, atol=1e-5):
    for name in names:
        np.testing.assert_allclose(ours.parameter(name), expected.parameter(name), atol=atol, err_msg=name)


def test_the_auxiliary_gradient_is_that_of_the_dense_formula():
    sae = TopKSAE.random(8, D_SAE, 2, key=jax.random.key(0))
    error = X - sae(X)
    idle = jnp.where(jnp.arange(D_SAE) % 3 == 0, 1000 + jnp.arange(D_SAE), 0).astype(jnp.int32)

    def dense_loss(sae):
        pre = jnp.where(idle > 100, sae.pre_activations(X), -jnp.inf)
        kept = pre >= jnp.sort(jax.lax.stop_gradient(pre), axis=1)[:, -4:-3]
        codes = jnp.where(kept & (pre > 0), pre, 0)
        return 0.5 * jnp.mean(WEIGHTS * jnp.sum((error - codes @ sae.W_dec[...]) ** 2, axis=1))

    loss = functools.partial(auxiliary_loss, x=X, error=error, row_weights=WEIGHTS, k_aux=4, coefficient=0.5)
    ours, value = add_gradient_of_dead(loss, zeros_like(sae), sae, idle, idle > 100, [16])
    expected_value, expected = jax.value_and_grad(dense_loss)(sae)
    assert_close(ours, expected, ("W_enc", "b_enc", "W_dec"))
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    assert (ours.b_dec[...] == 0).all()


def ghost_formula(sae, is_dead, error, activation, norm, weight):
    """As the posts write it, over all latents with a mask."""
    stop = jax.lax.stop_gradient
    pre = sae.pre_activations(X)
    codes = is_dead * jnp.exp(pre if activation == "exp" else jnp.minimum(pre, 0))
    ghost = codes @ sae.W_dec[...]
    reference = jnp.linalg.norm(error if norm == "residual" else X, axis=1)
    scale = stop(reference / (2 * jnp.linalg.norm(ghost, axis=1)))
    ghost_mse = jnp.mean(WEIGHTS * jnp.sum((stop(error) - scale[:, None] * ghost) ** 2, axis=1))
    mse = jnp.mean(WEIGHTS * jnp.sum(error**2, axis=1))
    return weight * stop(mse / ghost_mse) * ghost_mse


@pytest.mark.parametrize("norm", ["residual", "input"])
@pytest.mark.parametrize("activation", ["exp", "capped_exp"])
@pytest.mark.parametrize("n_dead", [1, 7, D_SAE])
def test_ghost_gradients_are_those_of_the_formula(n_dead, activation, norm):
    sae = relu_sae()
    idle = jnp.arange(D_SAE, dtype=jnp.int32)
    is_dead = idle >= D_SAE - n_dead
    error = X - sae(X)
    loss = functools.partial(
        ghost_loss, x=X, error=error, row_weights=WEIGHTS, weight=0.3, activation=activation, norm=norm
    )
    run = functools.partial(add_gradient_of_dead, loss, sizes=[1, 8, D_SAE], reaches_b_dec=True)
    ours, value = jax.jit(run)(zeros_like(sae), sae, idle, is_dead)
    expected_value, expected = jax.value_and_grad(ghost_formula)(sae, is_dead, error, activation, norm, 0.3)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    assert float(value) == pytest.approx(0.3 * float(jnp.mean(WEIGHTS * jnp.sum(error**2, axis=1))), rel=1e-5)
    assert_close(ours, expected, atol=2e-5)


@pytest.mark.parametrize("activation", ["exp", "capped_exp"])
def test_ghost_output_is_half_the_residual_and_huge_inputs_do_not_overflow(activation):
    sae = relu_sae()
    dead = DeadLatents(*(sae.parameter(name) for name in NAMES), jnp.ones(D_SAE, bool))

    def at(scale):
        x = X.at[3].multiply(scale)
        loss = functools.partial(ghost_loss, x=x, error=x, row_weights=WEIGHTS, activation=activation)
        return jax.value_and_grad(lambda W_dec: loss(dead._replace(W_dec=W_dec)))(dead.W_dec)

    for scale in (1.0, 1e4):
        value, gradient = at(scale)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_nothing_dead_gives_exactly_zero_and_no_nan():
    sae = relu_sae()
    loss = functools.partial(ghost_loss, x=X, error=X, row_weights=WEIGHTS)
    nothing = jnp.zeros(D_SAE, bool)
    before = jax.tree.map(jnp.ones_like, sae)
    after, value = add_gradient_of_dead(loss, before, sae, jnp.zeros(D_SAE, jnp.int32), nothing, [4, D_SAE])
    assert float(value) == 0
    assert_close(after, before, atol=0)
    dead = DeadLatents(*(sae.parameter(name) for name in NAMES), nothing)
    value, gradient = jax.value_and_grad(lambda W_dec: loss(dead._replace(W_dec=W_dec)))(dead.W_dec)
    assert float(value) == 0
    assert (gradient == 0).all()
    exact = functools.partial(ghost_loss, x=X, error=jnp.zeros_like(X), row_weights=WEIGHTS)
    everything = dead._replace(is_dead=jnp.ones(D_SAE, bool))
    value, gradient = jax.value_and_grad(lambda W_dec: exact(everything._replace(W_dec=W_dec)))(dead.W_dec)
    assert float(value) == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_resampled_latents_point_at_badly_reconstructed_inputs(kind):
    make = {"relu": ReLUSAE, "gated": GatedSAE, "jumprelu": functools.partial(JumpReLUSAE.random, threshold=0.5)}[kind]
    sae = (make if kind == "jumprelu" else make.random)(8, D_SAE, key=jax.random.key(0))
    is_chosen = jnp.arange(D_SAE) % 2 == 0
    is_dead = is_chosen.at[1].set(True)  # one more, which waits
    if kind == "jumprelu":
        sae = sae.replace(threshold=jnp.where(is_dead, 9.0, 0.25))
    moments = optax.scale_by_adam().init(sae)
    moments = jax.tree.map(jnp.ones_like, moments)
    errors = jnp.where(jnp.arange(50) < 3, 5.0, 1e-4)  # three rows are far worse than the rest
    new, new_moments = jax.jit(functools.partial(resample, key=jax.random.key(3)))(
        sae, moments, is_chosen, is_dead, X, X, errors
    )
    directions = np.asarray(X / jnp.linalg.norm(X, axis=1, keepdims=True))
    rows = np.asarray(new.W_dec[...])
    cosines = rows[::2] @ directions.T
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-5)
    drawn = cosines.argmax(axis=1)
    assert {0, 1, 2} <= set(drawn.tolist())
    assert len(set(drawn.tolist())) == len(drawn), "twins would stay twins"
    np.testing.assert_allclose(np.asarray(new.W_enc[...]).T[::2], 0.2 * rows[::2], atol=1e-5)  # columns had norm one
    for name in ("W_dec", *sae.per_latent):
        np.testing.assert_array_equal(new.parameter(name)[1::2], sae.parameter(name)[1::2])
    if kind == "jumprelu":
        np.testing.assert_allclose(new.threshold[1], 9.0)
        np.testing.assert_allclose(np.delete(new.threshold[...], 1), 0.25)
    for part in (new_moments.mu, new_moments.nu):
        assert (part.W_dec[::2] == 0).all()
        assert (part.W_dec[1::2] == 1).all()
        assert (part.W_enc[:, ::2] == 0).all()
        assert (part.W_enc[:, 1::2] == 1).all()
        assert (part.b_dec[...] == 1).all()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_updates_of_a_latent_that_starts_again_are_those_of_a_run_that_begins_then(beta1):
    keys = jax.random.split(jax.random.key(7), 12)
    gradients = [jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), relu_sae()) for key in keys]
    adam = optax.scale_by_adam(beta1, 0.999, eps=0)
    began = jnp.where(jnp.arange(D_SAE) < 3, 9, 0)
    old, new = adam.init(gradients[0]), adam.init(gradients[0])
    for n_steps, gradient in enumerate(gradients, 1):
        updates, old = adam.update(gradient, old)
        found = as_if_new(updates, began, n_steps, beta1=beta1, beta2=0.999)
        if n_steps > 9:
            expected, new = adam.update(gradient, new)
            np.testing.assert_allclose(found.W_enc[:, :3], expected.W_enc[:, :3], rtol=1e-3)
            np.testing.assert_allclose(found.b_enc[:3], expected.b_enc[:3], rtol=1e-3)
            np.testing.assert_allclose(found.W_dec[:3], expected.W_dec[:3], rtol=1e-3)
            np.testing.assert_array_equal(found.W_dec[3:], updates.W_dec[3:])
            np.testing.assert_array_equal(found.b_dec[...], updates.b_dec[...])
        if n_steps == 9:
            old = jax.tree.map(jnp.zeros_like, old)._replace(count=old.count)


@pytest.mark.caches
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_latent_that_starts_again_keeps_its_direction(beta1):
    """Its first steps are as long as the learning rate says, however long the run has been going."""
    options = {"dead_after": 1, "dead_latents": "resample", "resample_every": 1000, "l1_coefficient": 1.0}
    config = TrainConfig(40, 64, "relu", n_steps=5000, learning_rate=1e-2, beta1=beta1, **options)
    state = initial_state(config, toy(0))
    is_dead = jnp.arange(64) < 8
    state.sae = state.sae.replace(b_enc=jnp.where(is_dead, -100.0, 0.0))
    state.moments = jax.tree.map(jnp.ones_like, state.moments)._replace(count=jnp.int32(2999))
    run = jax.jit(functools.partial(step, config))
    begun, _ = run(state, toy(1), 2999)
    np.testing.assert_array_equal(begun.began, jnp.where(is_dead, 3000, 0))
    after, _ = run(begun, toy(2), 3000)
    cosines = jnp.sum(begun.sae.W_dec * after.sae.W_dec, axis=1)
    assert float(cosines[:8].min()) > 0.95
    np.testing.assert_allclose(jnp.abs(after.sae.b_enc[:8]), config.learning_rate, rtol=1e-2)


@pytest.mark.caches
def test_nothing_starts_again_while_the_rate_decays():
    options = {"dead_after": 1, "dead_latents": "resample", "resample_every": 10, "l1_coefficient": 1.0}
    config = TrainConfig(40, 64, "relu", n_steps=100, decay_share=0.2, **options)
    state = initial_state(config, toy(0))
    state.sae = state.sae.replace(b_enc=jnp.where(jnp.arange(64) < 32, -100.0, 0.0))
    run = jax.jit(functools.partial(step, config))
    for number, is_done in ((9, True), (69, True), (79, False), (99, False)):
        after, _ = run(state, toy(1), number)
        assert bool((after.sae.b_enc[:32] > -50).all()) is is_done, number


def test_the_longest_dead_are_few():
    idle = jnp.asarray([5, 900, 3, 700, 800, 0], jnp.int32)
    np.testing.assert_array_equal(longest_dead(idle, idle > 100, 2), [False, True, False, False, True, False])
    np.testing.assert_array_equal(longest_dead(idle, idle > 850, 2), [False, True, False, False, False, False])


DIRECTIONS = random_directions(jax.random.key(1), 96, 40)


@jax.jit
def toy(number):
    return superposed(jax.random.key(number), DIRECTIONS, 256, 3) * 7.0 + 0.5


@functools.cache
def dead_share_after(architecture, method):
    """Half the latents start with a bias that keeps them from firing."""
    options = {"k": 4} if "topk" in architecture else {"sparsity_warmup_share": 0.25}
    if method == "resample":
        options["resample_every"] = 60
    config = TrainConfig(
        40, 64, architecture, learning_rate=1e-2, n_steps=400, dead_after=1000, dead_latents=method, **options
    )  # fmt: skip
    state = initial_state(config, toy(0))
    state.sae = state.sae.replace(**{state.sae.encoder_bias: jnp.where(jnp.arange(64) < 32, -10.0, 0.0)})
    run = jax.jit(functools.partial(step, config))
    for number in range(200):
        state, metrics = run(state, toy(number), number)
    found = dict(zip(METRICS, map(float, metrics), strict=True))
    assert all(np.isfinite(value) for value in found.values())
    return found["dead_share"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method", "at_most"),
    [
        ("topk", "auxiliary_k", 0.7),
        ("topk", "ghost", 0.7),
        ("topk", "resample", 0.1),
        ("gated", "ghost", 0.8),
        ("gated", "lazy", 0.1),
        ("jumprelu", "resample", 0.25),  # some die anew between one resampling and the next
    ],
)
def test_every_method_leaves_fewer_dead_than_none(architecture, method, at_most):
    untreated = dead_share_after(architecture, "none")
    assert untreated > 0.15
    assert dead_share_after(architecture, method) < at_most * untreated


def test_unit_norm_is_both_halves():
    rows = to_unit_norm(jax.random.normal(jax.random.key(0), (6, 5)))
    gradient = tangent(jax.random.normal(jax.random.key(1), (6, 5)), rows)
    np.testing.assert_allclose(jnp.sum(gradient * rows, axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(to_unit_norm(rows + gradient), axis=1), 1, rtol=1e-6)
    assert (to_unit_norm(jnp.zeros((2, 5))) == 0).all()


def test_norm_at_most_one_holds_back_only_what_would_lengthen():
    rows = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    gradient = jnp.asarray([[-2.0, 3.0], [2.0, 3.0], [-2.0, 3.0]])
    np.testing.assert_allclose(inside(gradient, rows), [[0, 3], [2, 3], [-2, 3]])
    np.testing.assert_allclose(to_norm_at_most_one(jnp.asarray([[3.0, 4.0], [0.3, 0.4]])), [[0.6, 0.8], [0.3, 0.4]])

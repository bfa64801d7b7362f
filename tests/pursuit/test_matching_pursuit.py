"""Matching pursuit against its definition in NumPy, and what all pursuits take: a limit a signal, bf16, a mesh."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pursuit_problems import KINDS, check_gradients, check_invariants, check_never_grows, hard_problem, problem

from interp_jax.pursuit import gradient_pursuit, greedy, matching_pursuit, orthogonal_matching_pursuit

pytestmark = pytest.mark.caches  # a pursuit is compiled once for each size, not for each call

PURSUITS = [matching_pursuit, orthogonal_matching_pursuit, gradient_pursuit]


def slow_matching_pursuit(signals, dictionary, l0, nonnegative):
    signals, dictionary = signals.astype(np.float64), dictionary.astype(np.float64)
    weights = np.zeros((len(signals), len(dictionary)))
    for row, signal in zip(weights, signals, strict=True):
        for _ in range(l0):
            correlations = (signal - row @ dictionary) @ dictionary.T
            best = (correlations if nonnegative else np.abs(correlations)).argmax()
            row[best] += max(correlations[best], 0) if nonnegative else correlations[best]
    return weights


@pytest.mark.parametrize("nonnegative", [True, False])
def test_equals_its_definition_also_where_atoms_are_picked_again(nonnegative):
    signals, dictionary = problem(0, batch=16, d_in=8, d_sae=20)
    code = matching_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 12, nonnegative=nonnegative)
    expected = slow_matching_pursuit(signals, dictionary, 12, nonnegative)
    np.testing.assert_allclose(code.dense(20), expected, atol=2e-5)
    assert (np.asarray(code.l0_reached) < 12).any(), "the problem must be one where atoms are picked again"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), nonnegative=st.booleans())
def test_what_holds_on_every_problem(seed, kind, nonnegative):
    signals, dictionary = hard_problem(kind, seed)
    code = matching_pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 7, nonnegative=nonnegative)
    check_invariants(code, signals, dictionary, nonnegative=nonnegative)
    check_never_grows(functools.partial(matching_pursuit, nonnegative=nonnegative), signals, dictionary)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_gradients_are_those_of_finite_differences(nonnegative):
    signals, dictionary = problem(6, batch=3, d_in=8, d_sae=20)
    weighting = np.random.default_rng(0).normal(size=signals.shape)

    def objective(signals, dictionary):
        code = matching_pursuit(signals, dictionary, 9, nonnegative=nonnegative)
        return jnp.sum(weighting.astype(np.float32) * code.decode(dictionary)) + jnp.sum(code.residual_norm)

    arguments = (jnp.asarray(signals), jnp.asarray(dictionary))
    gradients = jax.grad(objective, argnums=(0, 1))(*arguments)

    def slow_objective(signals, dictionary):
        # Unit norm inside: the pursuit does not depend on the norms of the atoms.
        unit = dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True)
        output = slow_matching_pursuit(signals, unit, 9, nonnegative) @ unit
        return np.sum(weighting * output) + np.sum(np.linalg.norm(signals - output, axis=1))

    check_gradients(gradients, arguments, slow_objective)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("pursuit", PURSUITS)
def test_slots_given_out_in_stages_are_those_of_one_stage(pursuit, nonnegative, monkeypatch):
    signals, dictionary = map(jnp.asarray, problem(2))
    staged = []
    for stages, smallest in ((1, 8), (4, 1)):
        monkeypatch.setattr(greedy, "_STAGES", stages)
        monkeypatch.setattr(greedy, "_SMALLEST_STAGE", smallest)
        greedy._pursue.clear_cache()
        staged.append(pursuit(signals, dictionary, 10, nonnegative=nonnegative))
    greedy._pursue.clear_cache()
    np.testing.assert_array_equal(staged[0].indices, staged[1].indices)
    np.testing.assert_allclose(staged[0].weights, staged[1].weights, atol=1e-5)  # sums in another order


def test_a_dictionary_with_nan_is_named_where_nan_stops_jax():
    signals, dictionary = map(jnp.asarray, problem(1))
    broken = dictionary.at[7, 3].set(jnp.nan)
    with jax.debug_nans(True), pytest.raises(ValueError, match="row 7 holds NaN or infinity"):
        matching_pursuit(signals, broken, 4)


def test_limits_of_a_narrow_dtype_hold_below_a_larger_maximum():
    dictionary = jnp.asarray(np.random.default_rng(0).normal(size=(220, 12)), jnp.float32)
    signals = jnp.asarray(np.random.default_rng(1).normal(size=(4, 12)), jnp.float32)
    limits = jnp.asarray([3, 5, 7, 2], jnp.int8)
    expected = matching_pursuit(signals, dictionary, limits.astype(jnp.int32), max_l0=200)
    found = matching_pursuit(signals, dictionary, limits, max_l0=200)
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert bool((found.l0_reached > 0).all())


@pytest.mark.parametrize("pursuit", PURSUITS)
def test_a_limit_a_signal_gives_each_the_code_of_that_limit(pursuit):
    signals, dictionary = map(jnp.asarray, problem(1))
    limits = jnp.asarray([0, 1, 3, 5, 7, 2])
    together = pursuit(signals, dictionary, limits, max_l0=7)
    assert together.indices.shape == (6, 7)
    for number, limit in list(enumerate(limits.tolist()))[:3]:
        if limit:
            alone = pursuit(signals[number], dictionary, limit)
            np.testing.assert_allclose(together.dense(60)[number], alone.dense(60), atol=1e-6)
        else:
            assert int(together.l0_reached[number]) == 0
    with pytest.raises(ValueError, match="max_l0 must say"):
        pursuit(signals, dictionary, limits)
    with pytest.raises(ValueError, match=r"l0 has shape \(2,\); expected one number, or one a signal"):
        pursuit(signals, dictionary, limits[:2], max_l0=7)


@pytest.mark.parametrize("pursuit", PURSUITS)
def test_a_dictionary_in_bfloat16_is_taken_as_it_is(pursuit):
    signals, dictionary = map(jnp.asarray, problem(2, batch=16, d_in=64, d_sae=128, noise=0.01))
    rounded = dictionary.astype(jnp.bfloat16)
    code = pursuit(signals, rounded, 4)
    same = pursuit(signals, rounded.astype(jnp.float32), 4)
    assert code.weights.dtype == jnp.float32
    # The products that pick are rounded; with what they picked, all else is in float32.
    agreeing = np.all(np.asarray(code.indices) == np.asarray(same.indices), axis=1)
    assert agreeing.mean() > 0.8
    np.testing.assert_allclose(code.weights[agreeing], same.weights[agreeing], atol=1e-5)


@pytest.mark.parametrize("pursuit", PURSUITS)
def test_jit_vmap_and_an_empty_batch(pursuit):
    signals, dictionary = map(jnp.asarray, problem(3))
    whole = pursuit(signals, dictionary, 4)
    compiled = jax.jit(lambda signals, dictionary: pursuit(signals, dictionary, 4))(signals, dictionary)
    mapped = jax.vmap(lambda signal: pursuit(signal, dictionary, 4).dense(60))(signals)
    np.testing.assert_array_equal(whole.indices, compiled.indices)
    np.testing.assert_allclose(mapped, whole.dense(60), atol=1e-6)
    assert pursuit(signals[:0], dictionary, 4).weights.shape == (0, 4)


@pytest.mark.parametrize("pursuit", PURSUITS)
def test_what_has_no_code_is_told_as_such(pursuit):
    signals, dictionary = map(jnp.asarray, problem(3))
    # Their norms are within a factor of eight of the largest number; of the second and third no one number is.
    large = jnp.full((3, 24), jnp.asarray([[1e38], [2e37], [1e37]]))
    huge = pursuit(jnp.concatenate([large, signals[:1]]), dictionary, 4)
    np.testing.assert_array_equal(huge.l0_reached[:3], 0)
    np.testing.assert_array_equal(jnp.isnan(huge.residual_norm), [True, True, True, False])
    # A weight of 1e41 has no number in float32.
    out_of_range = pursuit(1e20 * signals, 1e-21 * dictionary, 4)
    np.testing.assert_array_equal(out_of_range.l0_reached, 0)
    np.testing.assert_allclose(out_of_range.residual_norm, 1e20 * np.linalg.norm(signals, axis=1), rtol=1e-5)


@pytest.fixture
def no_type_checks():
    """As a user has it: the shapes in signatures are not checked, so the functions' own errors are what is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("pursuit", PURSUITS)
def test_bad_inputs(pursuit):
    signals, dictionary = map(jnp.asarray, problem(7))
    for wrong in (signals[:, 1:], signals[0, 0]):
        with pytest.raises(
            ValueError, match=r"do not fit: expected \[..., d_in\] and \[d_sae, d_in\] with the same d_in"
        ):
            pursuit(wrong, dictionary, 4)
    for l0 in (0, 61):
        with pytest.raises(ValueError, match=f"l0 is {l0}; expected 1 to 60"):
            pursuit(signals, dictionary, l0)
    for l0 in (4.0, jnp.full(6, 2.5)):
        with pytest.raises(ValueError, match="l0 has dtype float32; expected whole numbers"):
            pursuit(signals, dictionary, l0, max_l0=7)
    with pytest.raises(ValueError, match="row 7 holds NaN or infinity"):
        pursuit(signals, dictionary.at[7, 3].set(jnp.nan), 4)
    with pytest.raises(ValueError, match="tolerance is -1"):
        pursuit(signals, dictionary, 4, tolerance=-1.0)
    with pytest.raises(ValueError, match="signals have dtype int32; expected a floating type"):
        pursuit(jnp.ones((2, 24), jnp.int32), dictionary, 4)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("pursuit", PURSUITS)
def test_float64_is_worked_on_as_such(pursuit, nonnegative):
    signals, dictionary = problem(4)
    rough = pursuit(jnp.asarray(signals), jnp.asarray(dictionary), 4, nonnegative=nonnegative)
    with jax.enable_x64(True):
        wide = jnp.asarray(signals, jnp.float64), jnp.asarray(dictionary, jnp.float64)
        code = pursuit(*wide, 4, nonnegative=nonnegative)
        left = np.linalg.norm(np.asarray(wide[0]) - np.asarray(code.dense(60)) @ np.asarray(wide[1]), axis=1)
    assert code.weights.dtype == np.float64
    np.testing.assert_allclose(code.residual_norm, left, rtol=1e-12)
    np.testing.assert_allclose(code.weights, rough.weights, atol=1e-5)


ON_A_MESH = """
import sys
sys.path.insert(0, {folder!r})
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pursuit_problems import problem
from interp_jax.pursuit import gradient_pursuit, greedy, matching_pursuit, orthogonal_matching_pursuit

signals, dictionary = map(jnp.asarray, problem(0, batch=16, d_in=24, d_sae=64))
dictionary = dictionary.at[40].set(dictionary[3])  # equally good: the first must win, whatever shard it is on
for shape in ((2, 4), (1, 8)):
    mesh = jax.make_mesh(shape, ("data", "latent"))
    explicit = gradient_pursuit(signals, dictionary, 6, mesh=mesh)
    np.testing.assert_array_equal(explicit.indices, gradient_pursuit(signals, dictionary, 6).indices)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    on_mesh = place(signals, P("data")), place(dictionary, P("latent"))
    limits = jnp.arange(16) % 7
    for pursuit in (gradient_pursuit, matching_pursuit, orthogonal_matching_pursuit):
        for l0, options in ((6, {{}}), (6, {{"nonnegative": False}}), (limits, {{"max_l0": 6}})):
            one, many = pursuit(signals, dictionary, l0, **options), pursuit(*on_mesh, l0, mesh=mesh, **options)
            np.testing.assert_array_equal(one.indices, many.indices)
            np.testing.assert_allclose(one.weights, many.weights, atol=1e-6)

        def loss(signals, dictionary, mesh):
            return jnp.sum(jnp.square(pursuit(signals, dictionary, 6, mesh=mesh).decode(dictionary)))

        gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        for a, b in zip(gradient(signals, dictionary, None), gradient(*on_mesh, mesh), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        run = jax.jit(lambda signals, dictionary: pursuit(signals, dictionary, 6, mesh=mesh))
        text = run.lower(*on_mesh).compile().as_text()
        whole = [line for line in text.splitlines() if "all-gather" in line and "[64,24]" in line]
        assert not whole, whole
try:
    gradient_pursuit(signals, dictionary[:63], 6, mesh=mesh)
except ValueError as error:
    assert "which must divide the 63 atoms" in str(error)
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh_codes_and_gradients_are_those_of_one_device_and_the_dictionary_is_never_gathered():
    folder = os.path.dirname(__file__)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_A_MESH.format(folder=folder)],
        capture_output=True, text=True, env=environment, check=False, timeout=600,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr

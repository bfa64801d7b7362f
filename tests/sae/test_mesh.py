"""Training on a mesh of eight devices: the losses of one device, no dictionary on any of them, and clear errors.

Each test runs in a process of its own, since the number of a host's devices is fixed when JAX starts.
"""

import os
import subprocess
import sys

import pytest

ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}

COMMON = """
import dataclasses, functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from interp_jax.sae import *
from interp_jax.sae.mesh import mesh_over_devices
from interp_jax.sae.superposition import random_directions, superposed

DIRECTIONS = np.asarray(random_directions(jax.random.key(1), 40, 16))

def batches(step):
    return np.asarray(superposed(jax.random.key(step), DIRECTIONS, 64, 3)) * 7 + 0.5

def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "latent"))

def config_of(architecture, dead_latents="auto", **changes):
    config = TrainConfig(16, 64, architecture=architecture, dead_latents=dead_latents, n_steps=10, warmup_steps=2,
                         learning_rate=1e-2, dead_after=100, log_every=1)
    changes = ({"k": 3} if config.fixes_l0 else {}) | changes
    return dataclasses.replace(config, **changes)

def assert_alike(histories, tolerance=1e-5):
    ours, theirs = histories
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        for name in other:
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=1e-7, err_msg=f"{name} {other}")
"""


def run(program, *arguments):
    command = [sys.executable, "-W", "error", "-c", COMMON + program, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


EQUAL = """
config = config_of(sys.argv[1])
_, one_device = train(config, batches)
for shape in ((8, 1), (1, 8), (2, 4)):
    sae, history = train(config, batches, mesh=mesh_of(*shape))
    assert_alike((history, one_device))
    assert {shard.data.shape for shard in sae.W_dec[...].addressable_shards} == {(64 // shape[1], 16)}
    assert {shard.data.shape for shard in sae.W_enc[...].addressable_shards} == {(16, 64 // shape[1])}
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu", "topk", "batch_topk", "matryoshka"])
def test_losses_are_those_of_one_device(architecture):
    run(EQUAL, architecture)


REVIVED = """
config = config_of("topk", sys.argv[1], d_sae=256, k=2, dead_after=64)
if sys.argv[1] == "resample":
    config = dataclasses.replace(config, resample_every=3)
_, one_device = train(config, batches)
assert max(line["dead_share"] for line in one_device) > 0.2
_, history = train(config, batches, mesh=mesh_of(2, 4))
assert_alike((history, one_device))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auxiliary_k", "ghost", "resample", "lazy"])
def test_the_same_dead_latents_are_revived(method):
    run(REVIVED, method)


TRANSCODER = """
config = config_of("batch_topk", d_out=10, has_skip=True)
pairs = lambda step: (batches(step), batches(step + 100)[:, :10])
_, one_device = train(config, pairs)
assert_alike((train(config, pairs, mesh=mesh_of(4, 2))[1], one_device))
"""


@pytest.mark.slow
def test_a_transcoder():
    run(TRANSCODER)


COMPILED = """
from interp_jax.sae.mesh import shardings, training_mesh
from interp_jax.sae.step import initial_state, step

# Sizes of which no two products of others are the dictionary's.
config = config_of(sys.argv[1], sys.argv[2], d_in=11, d_sae=4096)
batch = 52
mesh = training_mesh(mesh_of(2, 4), config.d_sae)

def shape_of(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

x = jax.ShapeDtypeStruct((batch, config.d_in), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
state = jax.eval_shape(functools.partial(initial_state, config), x)
where = shardings(mesh, state)
state = jax.tree.map(shape_of, state, where)
step_fn = jax.jit(functools.partial(step, config, mesh=mesh), donate_argnums=0, out_shardings=(where, None))
text = step_fn.lower(state, x, 0).compile().as_text()

# What the check looks for, where it is: the same arrays, brought together.
def gathered(state):
    doubled = state.sae.W_enc[...] * 2, state.sae.W_dec[...] * 2
    return jax.lax.with_sharding_constraint(doubled, NamedSharding(mesh, P()))

def sizes(text, opcode):
    results = re.findall(rf"= (.*) {opcode}(?:-start)?\\(", text)
    shapes = [shape for result in results for shape in re.findall(r"[a-z]+[0-9]+\\[([0-9,]+)\\]", result)]
    return [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]

whole = config.d_in * config.d_sae
assert max(sizes(jax.jit(gathered).lower(state).compile().as_text(), "all-gather")) >= whole
assert max(sizes(text, "all-gather"), default=0) <= config.d_sae
# Nor is it brought together by other means: nothing on a device is as large, but for what is not of the dictionary.
assert not re.search(r"\\[(11,4096|4096,11)\\]", text)
# The donated state is taken over: every parameter, moment and count of latents.
aliases = text.split("input_output_alias={")[1].split("entry_computation_layout")[0].count("-alias)")
assert aliases >= len(jax.tree.leaves((state.sae, state.moments, state.idle, state.began, state.window))), aliases
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dead_latents"),
    [
        ("relu", "lazy"),
        ("relu", "resample"),
        ("gated", "ghost"),
        ("jumprelu", "auxiliary_k"),
        ("topk", "auxiliary_k"),
        ("topk", "ghost"),
        ("topk", "lazy"),
        ("batch_topk", "auxiliary_k"),
        ("matryoshka", "auxiliary_k"),
    ],
)
def test_the_compiled_step_gathers_no_dictionary(architecture, dead_latents):
    run(COMPILED, architecture, dead_latents)


CHOSEN = """
from interp_jax.sae.mesh import training_mesh
from interp_jax.sae.sparse_pairs import decode_largest_on_mesh, decode_pairs
from interp_jax.sae.topk import reconstruct, reconstruct_on_mesh

# Small whole numbers: sums are exact, and nearly every row has ties about its k-th largest.
rng = np.random.default_rng(0)
whole = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)
x, cotangent = whole(64, 6), whole(64, 6)
arrays = {"W_enc": whole(6, 64), "W_dec": whole(64, 6), "b_dec": whole(6), "b_enc": whole(64)}

def check(ours, theirs):
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), np.asarray(other)), ours, theirs)

@functools.partial(jax.jit, static_argnums=0)
def results(objective, sae):
    # What an objective gives, and the gradients by the weights of a sum of its first result.
    def loss(sae):
        result = objective(sae)
        return jnp.sum(result[0] * cotangent), result
    gradient, result = jax.grad(loss, has_aux=True)(sae)
    return result, {name: gradient.parameter(name) for name in arrays}

def pairs_on_one(sae):
    pairs = sae.batch_pairs(x)
    return (*decode_pairs(sae, x, pairs, pairs.rows, 64), jnp.sort(pairs.values))

def topk_on_one(sae):
    return tuple(reconstruct(sae, x))

for k in (3, 20):
    sae = TopKSAE(k=k, **arrays)
    pre = np.asarray(sae.pre_activations(x))
    kth = np.sort(pre, axis=1)[:, -k]
    assert np.mean(np.sum(pre >= kth[:, None], axis=1) > k) > 0.2
    batch_sae = BatchTopKSAE(k=k, threshold=jnp.zeros(64), **arrays)
    crowded = batch_sae.replace(b_enc=batch_sae.b_enc[...].at[:8].add(100))
    for shape in ((1, 8), (2, 4)):
        mesh = training_mesh(mesh_of(*shape), 64)

        def pairs_on_mesh(sae):
            (decoded,), firings, pairs = decode_largest_on_mesh(sae, x, 64 * k, (64,), mesh)
            return decoded, firings, jnp.sort(pairs.values)[-64 * k:]

        check(results(lambda sae: tuple(reconstruct_on_mesh(sae, x, mesh)), sae), results(topk_on_one, sae))
        # The second has all its pairs in few shards, which then work on places for more than twice their share.
        for one in (batch_sae, crowded):
            check(results(pairs_on_mesh, one), results(pairs_on_one, one))
"""


@pytest.mark.slow
def test_ties_are_broken_as_on_one_device():
    run(CHOSEN)


RESUMED = """
config = config_of("topk", checkpoint_every=4)

class Stop(Exception):
    pass

def stop(done, metrics):
    if done == 6:
        raise Stop

_, uninterrupted = train(config, batches)
moves = [(mesh_of(2, 4), mesh_of(4, 2)), (mesh_of(1, 8), None), (None, mesh_of(8, 1))]
for number, (before, after) in enumerate(moves):
    folder = f"{sys.argv[1]}/{number}"
    try:
        train(config, batches, mesh=before, checkpoint_dir=folder, on_step=stop)
    except Stop:
        pass
    asked = []
    def remembered(step):
        asked.append(step)
        return batches(step)
    sae, history = train(config, remembered, mesh=after, checkpoint_dir=folder, resume=True)
    assert asked == [4, 5, 6, 7, 8, 9]
    assert_alike((history, uninterrupted))
    assert len(sae.W_dec[...].sharding.device_set) == (1 if after is None else 8)
"""


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_another_mesh(tmp_path):
    run(RESUMED, tmp_path)


SWEPT = """
configs = [config_of("topk"), config_of("topk", seed=1, learning_rate=3e-3)]
on_one = sweep(configs, batches, how=sys.argv[1])
together = [dataclasses.replace(config, steps_per_dispatch=4) for config in configs]
on_mesh = sweep(together, batches, how=sys.argv[1], mesh=mesh_of(2, 4))
for ours, theirs in zip(on_mesh, on_one):
    assert_alike((ours.history, theirs.history))
    assert {shard.data.shape for shard in ours.sae.W_dec[...].addressable_shards} == {(16, 16)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["map", "vmap"])
def test_a_sweep_on_a_mesh(how):
    run(SWEPT, how)


REFUSED = """
def refused(config, mesh, rows=64):
    try:
        train(config, lambda step: batches(step)[:rows], mesh=mesh)
    except ValueError as error:
        print(error)

refused(config_of("relu"), jax.make_mesh((2, 4), ("data", "model")))
refused(config_of("relu"), jax.make_mesh((8,), ("data",)))
refused(config_of("relu", d_sae=60), mesh_of(1, 8))
refused(config_of("relu"), mesh_of(8, 1), 60)
for sizes in ((2, 8), (0, 4)):
    try:
        mesh_over_devices(*sizes)
    except ValueError as error:
        print(error)
assert mesh_over_devices(1, 2).shape == {"data": 1, "latent": 2}
"""


def test_a_mesh_that_does_not_fit_is_an_error():
    other, alone, latents, rows, many, none = run(REFUSED).splitlines()
    assert "axes ('data', 'model'); expected ('data', 'latent')" in other
    assert "axes ('data',); expected ('data', 'latent')" in alone
    assert "'latent' has 8 devices, which must divide d_sae = 60" in latents
    assert "'data' has 8 devices, which must divide the batch of 60 rows" in rows
    assert "needs 16 devices; there are 8 cpu devices. Choose sizes whose product is 8" in many
    assert "data=0, latent=4: expected at least 1" in none

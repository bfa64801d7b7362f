"""The TopK SAE against NumPy, and its sparse training path against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import TopKSAE
from interp_jax.sae.grouped_top_k import grouped_top_k
from interp_jax.sae.latent_sums import group_by_latent, sum_by_latent
from interp_jax.sae.topk import reconstruct


def sae_of(seed, d_in=12, d_sae=40, k=5):
    keys = jax.random.split(jax.random.key(seed), 4)
    return TopKSAE(
        W_enc=jax.random.normal(keys[0], (d_in, d_sae)),
        b_enc=jax.random.normal(keys[1], (d_sae,)),
        W_dec=jax.random.normal(keys[2], (d_sae, d_in)),
        b_dec=jax.random.normal(keys[3], (d_in,)),
        k=k,
    )


def numpy_codes(sae, x):
    pre = (x - np.asarray(sae.b_dec)) @ np.asarray(sae.W_enc) + np.asarray(sae.b_enc)
    kept = np.argsort(-pre, axis=1, kind="stable")[:, : sae.k]
    codes = np.zeros_like(pre)
    np.put_along_axis(codes, kept, np.maximum(np.take_along_axis(pre, kept, 1), 0), 1)
    return codes


def test_encode_decode_and_call_equal_numpy():
    sae, x = sae_of(0), np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    codes = numpy_codes(sae, x)
    np.testing.assert_allclose(sae.encode(jnp.asarray(x)), codes, atol=1e-5)
    output = codes @ np.asarray(sae.W_dec) + np.asarray(sae.b_dec)
    np.testing.assert_allclose(sae(jnp.asarray(x)), output, atol=1e-4)
    np.testing.assert_allclose(sae(jnp.asarray(x).reshape(7, 1, 12))[:, 0], output, atol=1e-4)
    values, indices = sae.encode_topk(jnp.asarray(x))
    np.testing.assert_allclose(np.take_along_axis(codes, np.asarray(indices), 1), values, atol=1e-5)
    assert (np.diff(values, axis=1) <= 0).all()


@pytest.mark.caches
@pytest.mark.parametrize("bias", [0.0, -6.0], ids=["k active", "often fewer than k active"])
def test_the_sparse_training_path_has_the_dense_one_s_values_and_gradients(bias):
    sae = sae_of(1, d_sae=64, k=5)
    sae.b_enc[...] = sae.b_enc[...] + bias
    x = jax.random.normal(jax.random.key(9), (150, 12))

    def sparse_loss(sae):
        return jnp.mean(jnp.sum(jnp.square(x - reconstruct(sae, x).output), axis=1))

    def dense_loss(sae):
        return jnp.mean(jnp.sum(jnp.square(x - sae(x)), axis=1))

    sparse, sparse_gradient = jax.jit(jax.value_and_grad(sparse_loss))(sae)
    dense, dense_gradient = jax.jit(jax.value_and_grad(dense_loss))(sae)
    assert sparse == pytest.approx(float(dense), rel=1e-5)
    for ours, plain in zip(jax.tree.leaves(sparse_gradient), jax.tree.leaves(dense_gradient), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5 * float(jnp.max(jnp.abs(plain))))
    codes = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(jax.jit(reconstruct)(sae, x).firings, (codes > 0).sum(0))


@pytest.mark.parametrize("skew", ["even", "one latent in every row", "nothing active"])
@pytest.mark.parametrize("d_sae", [50, 2**20], ids=["packed keys", "keys too wide to pack"])
def test_sums_by_latent_equal_numpy(skew, d_sae):
    random = np.random.default_rng(0)
    indices = np.stack([random.choice(50, 4, replace=False) for _ in range(1200)])
    if skew == "one latent in every row":
        indices = np.concatenate([np.full((1200, 1), 7), (indices[:, :3] + 8) % 40 + 8], axis=1)
    is_active = np.zeros_like(indices, bool) if skew == "nothing active" else random.random(indices.shape) < 0.9
    factors = random.normal(size=indices.shape).astype(np.float32)
    rows = random.normal(size=(1200, 3)).astype(np.float32)
    expected = np.zeros((d_sae, 3))
    np.add.at(expected, indices[is_active], factors[is_active][:, None] * np.repeat(rows[:, None], 4, 1)[is_active])
    groups = jax.jit(group_by_latent, static_argnums=2)(
        jnp.asarray(indices).ravel(), jnp.asarray(is_active).ravel(), d_sae
    )
    np.testing.assert_array_equal(groups.counts, np.bincount(indices[is_active], minlength=d_sae))
    np.testing.assert_allclose(
        jax.jit(sum_by_latent)(jnp.asarray(factors).ravel(), jnp.asarray(rows), jnp.arange(4800) // 4, groups),
        expected,
        atol=2e-4,
    )


@pytest.mark.parametrize(("n", "k"), [(512, 8), (512, 3), (500, 3), (40, 40)])
def test_grouped_top_k_is_top_k(n, k):
    random = np.random.default_rng(n + k)
    distinct = random.normal(size=(20, n)).astype(np.float32)
    tied = random.integers(0, 4, size=(20, n)).astype(np.float32)
    for values in (distinct, tied):
        top, indices = grouped_top_k(jnp.asarray(values), k)
        expected, expected_indices = jax.lax.top_k(jnp.asarray(values), k)
        np.testing.assert_array_equal(top, expected)
        np.testing.assert_array_equal(np.take_along_axis(values, np.asarray(indices), 1), expected)
        if values is distinct:
            np.testing.assert_array_equal(indices, expected_indices)
        assert all(len(set(row)) == k for row in np.asarray(indices))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="k is 41; expected 1 to d_sae = 40"):
        TopKSAE.random(12, 40, 41, key=jax.random.key(0))
    sae = sae_of(0)
    with pytest.raises(ValueError, match=r"shapes do not fit W_enc \(40, 12\)"):
        TopKSAE(W_enc=sae.W_dec[...], b_enc=sae.b_enc[...], W_dec=sae.W_dec[...], b_dec=sae.b_dec[...], k=3)

"""Every kind of autoencoder: its codes against NumPy, its objective against the formula written out densely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from interp_jax.sae.autoencoder import Batch, Sparsity, affine
from interp_jax.sae.column_sums import count_positive
from interp_jax.sae.kth_largest import kth_largest, largest_pairs

pytestmark = pytest.mark.caches  # dozens of small programs: traced anew each, they would take minutes

D_IN, D_SAE, D_OUT, K = 12, 64, 9, 4
KINDS = {
    "relu": (ReLUSAE, {}),
    "gated": (GatedSAE, {}),
    "topk": (TopKSAE, {"k": K}),
    "batch_topk": (BatchTopKSAE, {"k": K}),
    "matryoshka": (MatryoshkaSAE, {"k": K, "widths": (8, 24, 64)}),
    "jumprelu": (JumpReLUSAE, {"threshold": 0.3, "bandwidth": 0.2}),
    "jumprelu, log": (JumpReLUSAE, {"threshold": 0.3, "bandwidth": 0.2, "parameter": "log_threshold"}),
}
SHAPES = {"autoencoder": {}, "transcoder": {"d_out": D_OUT}, "skip": {"d_out": D_OUT, "has_skip": True}}


def sae_of(kind, shape="autoencoder", seed=0):
    """Random in every parameter."""
    cls, options = KINDS[kind]
    sae = cls.random(D_IN, D_SAE, key=jax.random.key(seed), **options, **SHAPES[shape])
    leaves, structure = jax.tree.flatten(sae)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    sae = jax.tree.unflatten(structure, noisy)
    return sae.replace(threshold=jnp.abs(sae.threshold[...])) if hasattr(sae, "threshold") else sae


def batch_of(shape="autoencoder", rows=150):
    x = jax.random.normal(jax.random.key(5), (rows, D_IN))
    target = x if shape == "autoencoder" else jax.random.normal(jax.random.key(6), (rows, D_OUT))
    return x, target, jnp.linspace(0.3, 1, rows)


def numpy_codes(sae, x):
    arrays = {name: np.asarray(sae.parameter(name), np.float64) for name in ("W_enc", "b_dec", *sae.per_latent)}
    projected = (x - arrays["b_dec"] if sae.apply_b_dec_to_input else x) @ arrays["W_enc"]
    if isinstance(sae, GatedSAE):
        magnitude = np.maximum(projected * np.exp(arrays["r_mag"]) + arrays["b_mag"], 0)
        return magnitude * (projected + arrays["b_gate"] > 0)
    pre = projected + arrays["b_enc"]
    if isinstance(sae, ReLUSAE):
        return np.maximum(pre, 0)
    if isinstance(sae, TopKSAE):
        least = np.sort(pre, axis=1)[:, -sae.k, None]
        return np.where(pre >= least, np.maximum(pre, 0), 0)
    threshold = np.exp(arrays["log_threshold"]) if "log_threshold" in arrays else arrays["threshold"]
    return pre * (pre > threshold)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_output_equal_numpy(kind, shape):
    sae, (x, _, _) = sae_of(kind, shape), batch_of(shape, 30)
    codes = numpy_codes(sae, np.asarray(x, np.float64))
    np.testing.assert_allclose(sae.encode(x), codes, atol=1e-5)
    output = codes @ np.asarray(sae.W_dec[...]) + np.asarray(sae.b_dec[...])
    if shape == "skip":
        output = output + np.asarray(x) @ np.asarray(sae.W_skip[...]).T
    np.testing.assert_allclose(sae(x), output, atol=1e-4)
    np.testing.assert_allclose(sae(x[:, None])[:, 0], output, atol=1e-4)


def dense_loss(sae, x, target, weights, sparsity):
    """The objective in the plainest form, and which codes count as active."""
    stop = jax.lax.stop_gradient
    pre = (x - sae.b_dec[...] if sae.apply_b_dec_to_input else x) @ sae.W_enc[...]
    penalty, extra = 0.0, 0.0
    norms = jnp.linalg.norm(sae.W_dec[...], axis=1) if sparsity.is_norm_weighted else 1.0

    def squared(codes, W_dec=None, b_dec=None, skip=0.0):
        output = codes @ (sae.W_dec[...] if W_dec is None else W_dec) + (sae.b_dec[...] if b_dec is None else b_dec)
        return jnp.mean(weights * jnp.sum((target - output - skip) ** 2, axis=1))

    skip = 0.0 if sae.W_skip is None else x @ sae.W_skip[...].T
    if isinstance(sae, ReLUSAE):
        codes = jnp.maximum(pre + sae.b_enc[...], 0)
        penalty = sparsity.coefficient * jnp.mean(jnp.sum(codes * norms, axis=1))
    elif isinstance(sae, GatedSAE):
        gate = pre + sae.b_gate[...]
        codes = (gate > 0) * jnp.maximum(pre * jnp.exp(sae.r_mag[...]) + sae.b_mag[...], 0)
        opened = jnp.maximum(gate, 0)
        penalty = sparsity.coefficient * jnp.mean(jnp.sum(opened * norms, axis=1))
        extra = squared(opened, stop(sae.W_dec[...]), stop(sae.b_dec[...]), stop(skip))
    elif isinstance(sae, TopKSAE):
        pre = pre + sae.b_enc[...]
        codes = jnp.where(pre >= jnp.sort(stop(pre), axis=1)[:, -K, None], jnp.maximum(pre, 0), 0)
    else:
        pre = pre + sae.b_enc[...]
        least = jnp.sort(stop(pre).ravel())[-K * len(x)]
        codes = jnp.where(pre >= least, jnp.maximum(pre, 0), 0)
    main = squared(codes, skip=skip)
    if isinstance(sae, MatryoshkaSAE):
        main = sum(squared(codes.at[:, width:].set(0), skip=skip) for width in sae.widths) / len(sae.widths)
    return main + penalty + extra, codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["relu", "gated", "topk", "batch_topk", "matryoshka"])
def test_objectives_have_the_values_and_gradients_of_the_dense_formula(kind, shape):
    sae, batch = sae_of(kind, shape), batch_of(shape)
    sparsity = Sparsity(0.7, is_norm_weighted=kind in ("relu", "gated"))

    def ours(sae):
        outcome = sae.objective(Batch(*batch), sparsity)
        return outcome.loss, outcome

    (loss, outcome), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(sae)
    (expected, codes), plain = jax.value_and_grad(dense_loss, has_aux=True)(sae, *batch, sparsity)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for name in ("W_enc", "W_dec", "b_dec", *sae.per_latent):
        mine, reference = gradient.parameter(name), plain.parameter(name)
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(jnp.abs(reference).max()), err_msg=name)
    if shape == "skip":
        np.testing.assert_allclose(gradient.W_skip[...], plain.W_skip[...], atol=1e-4)
    np.testing.assert_array_equal(outcome.firings, (np.asarray(codes) > 0).sum(0))
    if kind in ("batch_topk", "matryoshka"):
        assert int(outcome.firings.sum()) == K * len(batch[0])
        assert float(outcome.threshold) == pytest.approx(float(codes[codes > 0].min()))


@pytest.mark.parametrize("kind", ["jumprelu", "jumprelu, log"])
@pytest.mark.parametrize("l0_target", [None, 7.0])
def test_jump_relu_has_the_papers_derivatives(kind, l0_target):
    """By hand, for each parameter: equations 11 and 12 of Rajamanoharan et al. 2024."""
    sae, (x, target, weights) = sae_of(kind), batch_of(rows=400)
    coefficient, bandwidth, rows = 0.7, sae.bandwidth, 400
    sparsity = Sparsity(coefficient, l0_target=l0_target)
    gradient = jax.grad(lambda sae: sae.objective(Batch(x, target, weights), sparsity).loss)(sae)

    x, target, weights = (np.asarray(array, np.float64) for array in (x, target, weights))
    names = ("W_enc", "W_dec", "b_dec", "b_enc")
    W_enc, W_dec, b_dec, b_enc = (np.asarray(sae.parameter(name), np.float64) for name in names)
    threshold = np.asarray(sae.thresholds(), np.float64)
    pre = (x - b_dec) @ W_enc + b_enc
    is_active = pre > threshold
    codes = pre * is_active
    by_output = -2 * weights[:, None] * (target - codes @ W_dec - b_dec) / rows
    by_codes = by_output @ W_dec.T
    by_pre = by_codes * is_active
    l0 = is_active.sum() / rows
    by_l0 = coefficient * (1.0 if l0_target is None else 2 * (l0 / l0_target - 1) / l0_target)
    near = np.abs(pre - threshold) < bandwidth / 2
    assert near.sum() > 200
    by_threshold = -(near * (by_codes * threshold + by_l0 / rows)).sum(0) / bandwidth

    expected = {
        "W_dec": codes.T @ by_output,
        "b_enc": by_pre.sum(0),
        "W_enc": (x - b_dec).T @ by_pre,
        "b_dec": by_output.sum(0) - W_enc @ by_pre.sum(0),
        "log_threshold" if sae.is_log else "threshold": by_threshold * (threshold if sae.is_log else 1),
    }
    for name, array in expected.items():
        np.testing.assert_allclose(gradient.parameter(name), array, atol=3e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_fold_into_the_weights(kind, shape):
    sae, (x, _, _) = sae_of(kind, shape), batch_of(shape)
    scale_in, scale_out = 0.2, 0.2 if shape == "autoencoder" else 3.0
    folded = sae.in_units(jnp.float32(scale_in), jnp.float32(scale_out))
    np.testing.assert_allclose(folded(x), sae(x * scale_in) / scale_out, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(folded.W_dec[...], sae.W_dec[...])
    np.testing.assert_array_equal(folded.encode(x) > 0, sae.encode(x * scale_in) > 0)


def test_the_affine_map_has_the_derivatives_of_the_plain_one_in_both_modes():
    keys = jax.random.split(jax.random.key(0), 9)
    shapes = ((5, 7, 4), (4,), (4, 6), (6,))
    args = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    tangents = tuple(jax.random.normal(key, shape) for key, shape in zip(keys[4:], shapes, strict=False))

    def plain(x, shift, matrix, bias):
        return (x - shift) @ matrix + bias

    np.testing.assert_allclose(jax.jvp(affine, args, tangents)[1], jax.jvp(plain, args, tangents)[1], atol=1e-5)
    cotangent = jax.random.normal(keys[8], (5, 7, 6))
    ours, reference = (jax.vjp(function, *args)[1](cotangent) for function in (affine, plain))
    for mine, theirs in zip(ours, reference, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    of_bias = jax.grad(lambda bias: jnp.vdot(affine(*args[:3], bias), cotangent))(args[3])
    np.testing.assert_allclose(of_bias, cotangent.sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_positive_entries_are_counted(rows):
    matrix = np.random.default_rng(0).normal(size=(rows, 33)).astype(np.float32)
    np.testing.assert_array_equal(count_positive(jnp.asarray(matrix)), (matrix > 0).sum(0))


@pytest.mark.parametrize("n", [48, 50], ids=["in groups", "not in groups"])
@pytest.mark.parametrize("k", [1, 40, 200])
@pytest.mark.parametrize("values", ["distinct", "tied", "few positive"])
def test_largest_pairs_are_those_of_a_sort(n, k, values):
    random = np.random.default_rng(0)
    matrix = random.normal(size=(70, n)).astype(np.float32)
    if values == "tied":
        matrix = random.integers(-2, 4, size=matrix.shape).astype(np.float32)
    if values == "few positive":
        matrix -= 2.5
    expected = np.maximum(np.sort(matrix.ravel())[::-1][:k], 0)
    assert float(kth_largest(jnp.asarray(matrix), k)) == expected[-1]
    pairs = jax.tree.map(np.asarray, jax.jit(largest_pairs, static_argnums=1)(jnp.asarray(matrix), k))
    np.testing.assert_array_equal(np.sort(pairs.values)[::-1], expected)
    is_found = pairs.values > 0
    np.testing.assert_array_equal(matrix[pairs.rows, pairs.columns][is_found], pairs.values[is_found])
    assert len(set(zip(pairs.rows[is_found], pairs.columns[is_found], strict=True))) == is_found.sum()
    assert (np.diff(pairs.rows[is_found]) >= 0).all()


def test_what_does_not_fit_is_refused():
    sae = sae_of("relu")
    arrays = {name: sae.parameter(name) for name in ("W_enc", "W_dec", "b_dec")}
    with pytest.raises(ValueError, match=r"b_enc \(3,\), not \(64,\)"):
        ReLUSAE(b_enc=jnp.zeros(3), **arrays)
    with pytest.raises(ValueError, match=r"W_skip \(3, 3\), not \(12, 12\)"):
        ReLUSAE(b_enc=jnp.zeros(D_SAE), W_skip=jnp.zeros((3, 3)), **arrays)
    with pytest.raises(ValueError, match="apply_b_dec_to_input=False"):
        arrays |= {"W_dec": jnp.zeros((D_SAE, D_OUT)), "b_dec": jnp.zeros(D_OUT)}
        ReLUSAE(b_enc=jnp.zeros(D_SAE), **arrays)
    with pytest.raises(ValueError, match=r"widths are \(8, 8, 64\)"):
        MatryoshkaSAE.random(D_IN, D_SAE, K, widths=(8, 8, 64), key=jax.random.key(0))
    with pytest.raises(ValueError, match="bandwidth is 0"):
        JumpReLUSAE.random(D_IN, D_SAE, key=jax.random.key(0), bandwidth=0.0)

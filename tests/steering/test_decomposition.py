import jax
import numpy as np
import pytest
from scipy.optimize import nnls
from test_contrast import by_hand

from interp_jax.pursuit import PursuitEncoder, orthogonal_matching_pursuit
from interp_jax.sae import ReLUSAE, TopKSAE
from interp_jax.steering import (
    SteeringVector,
    decompose,
    from_latents,
    latent_densities,
    latent_difference,
    read_vector,
)

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.


@pytest.fixture(scope="module")
def sae():
    sae = ReLUSAE.random(16, 40, key=jax.random.key(1))
    return sae.replace(b_dec=0.3 * jax.random.normal(jax.random.key(2), (16,)), b_enc=-0.1 + 0 * sae.b_enc[...])


def arrays(sae):
    return (np.asarray(getattr(sae, name)[...]) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))


def codes_by_hand(sae, values):
    W_enc, _, b_enc, b_dec = arrays(sae)
    return np.maximum((values - b_dec) @ W_enc + b_enc, 0)


def test_a_vector_in_an_autoencoder_s_latents(sae):
    vector = SteeringVector(3 * np.asarray(jax.random.normal(jax.random.key(3), (2, 16))), 1, positions=(0, -1))
    W_enc, W_dec, b_enc, _ = arrays(sae)
    codes = np.maximum(vector.direction @ W_enc + b_enc, 0)
    found = decompose(vector, sae)
    together = found.vector()
    np.testing.assert_allclose(together.direction, codes @ W_dec, atol=1e-4)
    assert together.positions == (0, -1)
    assert found.n_latents == len(np.unique(np.nonzero(codes)[1]))
    residual = vector.direction - codes @ W_dec
    assert found.share_explained == pytest.approx(1 - (residual**2).sum() / (vector.direction**2).sum(), abs=1e-5)


def test_a_pursuit_takes_no_encoder(sae):
    _, W_dec, _, _ = arrays(sae)
    vector = SteeringVector(2 * W_dec[5] + 3 * W_dec[11], 1)
    found = decompose(vector, PursuitEncoder(sae, 2, orthogonal_matching_pursuit))
    assert {part.latent: part.code for part in found.parts} == pytest.approx({5: 2.0, 11: 3.0}, abs=1e-3)
    many = decompose(SteeringVector(np.arange(16.0), 1), PursuitEncoder(sae, 6, orthogonal_matching_pursuit))
    latents = sorted(part.latent for part in many.parts)
    expected, _ = nnls(W_dec[latents].T.astype(float), np.arange(16.0))
    np.testing.assert_allclose([p.code for p in sorted(many.parts, key=lambda p: p.latent)], expected, atol=1e-3)


def test_codes_of_one_text_minus_those_of_another(language_model, sae):
    encode = language_model.tokenizer.encode
    found = latent_difference(language_model, "lovely", "hate", sae, layer=1, pad=" ")
    rows = by_hand(language_model, encode("lovely"), 1), by_hand(language_model, encode("hate  "), 1)
    expected = codes_by_hand(sae, rows[0]) - codes_by_hand(sae, rows[1])
    dense = np.zeros((6, 40))
    for part in found.parts:
        dense[part.row, part.latent] = part.code
    np.testing.assert_allclose(dense, expected, atol=1e-4)
    np.testing.assert_allclose(found.original.direction, rows[0] - rows[1], atol=1e-4)
    assert found.vector().positions == (0, 1, 2, 3, 4, 5)

    norms = np.linalg.norm(np.asarray(sae.W_dec[...]), axis=1)
    strongest = np.argsort(-np.abs(expected) * norms, axis=None)[:4]
    top = {(part.row, part.latent) for part in found.top(4).parts}
    assert top == {tuple(int(i) for i in np.unravel_index(at, expected.shape)) for at in strongest}
    some = found.top(1).parts[0]
    assert {part.latent for part in found.only([some.latent]).parts} == {some.latent}
    assert found.only([(some.latent, some.row)]).parts == (some,)
    assert some.latent not in {part.latent for part in found.without([some.latent]).parts}
    with pytest.raises(ValueError, match=r"\(39, 99\) is not among"):
        found.only([(39, 99)])


def test_hand_picked_latents_are_unit_rows(sae):
    scaled = sae.replace(W_dec=2.5 * sae.W_dec[...])
    vector = from_latents(scaled, {3: 4.0, 8: -1.0}, layer=1)
    rows = np.asarray(scaled.W_dec[...])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(vector.direction, 4 * unit[3] - unit[8], atol=1e-5)
    assert vector.source == "4 * latent 3 + -1 * latent 8"


def test_the_table(language_model, sae):
    tokens = np.random.default_rng(0).integers(97, 123, size=(12, 20)).astype(np.int32)
    _, W_dec, _, _ = arrays(sae)
    vector = SteeringVector(np.asarray([4 * W_dec[5] + W_dec[11], 2 * W_dec[5]]), 1)
    found = decompose(vector, PursuitEncoder(sae, 2, orthogonal_matching_pursuit))
    read = read_vector(found, language_model, sae=sae, tokens=tokens, count=2, n_texts=2)
    first, second = read.rows
    assert (first.latent, second.latent) == (5, 11)
    assert first.share == pytest.approx(6 / 7, abs=1e-3)
    assert first.code == pytest.approx(6, abs=1e-2)
    mean = vector.direction.mean(axis=0)
    assert second.cosine == pytest.approx(W_dec[11] @ mean / np.linalg.norm(W_dec[11]) / np.linalg.norm(mean), abs=1e-4)
    codes = np.stack([codes_by_hand(sae, by_hand(language_model, row, 1))[:, 5] for row in tokens])
    codes[:, 0] = 0
    row, at = np.unravel_index(codes.argmax(), codes.shape)
    readable = language_model.tokenizer.readable(tokens[row].tolist())
    assert f"«{readable[at]}»" in first.texts[0]
    logits = np.asarray(language_model.unembed(language_model.params, W_dec[[5]]))[0]
    among = np.unique(tokens)
    assert first.promoted[0] == language_model.tokenizer.readable([int(among[logits[among].argmax()])])[0]
    assert "latent" in str(read)
    assert first.texts[0] in str(read)
    with pytest.raises(ValueError, match="both sae and tokens"):
        read_vector(found, language_model, sae=sae)
    with pytest.raises(ValueError, match="in another dictionary"):
        read_vector(found, language_model, sae=ReLUSAE.random(16, 40, key=jax.random.key(9)), tokens=tokens)
    other = decompose(SteeringVector(W_dec[5], 1, model="another model"), sae)
    with pytest.raises(ValueError, match="another model's activations, and this is two-layer model"):
        read_vector(other, language_model)


def test_densities(language_model, sae):
    tokens = np.random.default_rng(1).integers(97, 123, size=(10, 12)).astype(np.int32)
    values = np.concatenate([by_hand(language_model, row, 0)[1:] for row in tokens])
    expected = (codes_by_hand(sae, values) > 0).mean(axis=0)
    found = latent_densities(language_model, sae, tokens, layer=0)
    np.testing.assert_allclose(found, expected, atol=2 / len(values))


def test_bad_input(language_model, sae):
    with pytest.raises(ValueError, match=r"reads 16 and writes 16 numbers; the vector has 24"):
        decompose(SteeringVector(np.ones(24), 1, "mlp_act"), sae)
    with pytest.raises(ValueError, match=r"reads 16 and writes 16 numbers; the vector has 24"):
        latent_difference(language_model, "a", "b", sae, layer=0, site="mlp_act")
    with pytest.raises(ValueError, match=r"expected at least one of 0 to 39"):
        from_latents(sae, {40: 1.0}, layer=0)
    dead = sae.replace(W_dec=sae.W_dec[...].at[3].set(0.0))
    with pytest.raises(ValueError, match="latent 3 is zero"):
        from_latents(dead, {3: 1.0}, layer=0)


def test_any_kind_of_autoencoder(language_model):
    sae = TopKSAE.random(16, 40, k=3, key=jax.random.key(0))
    found = latent_difference(language_model, "love", "hate", sae, layer=0)
    assert max(sum(part.row == row for part in found.parts) for row in range(4)) <= 6

import numpy as np
import pytest
import safetensors.numpy

from interp_jax.steering import SteeringVector

RNG = np.random.default_rng(0)


def vector(*shape, **place):
    return SteeringVector(RNG.normal(size=shape).astype(np.float32), **{"layer": 1, "source": "random"} | place)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_survives_the_disk(tmp_path, shape):
    positions = "generated" if len(shape) == 1 else (3, -1)
    made = SteeringVector(RNG.normal(size=shape), None, "embed", "a “test”", positions, "some model")
    made.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(loaded.direction, made.direction)
    place = (loaded.layer, loaded.site, loaded.source, loaded.positions, loaded.model)
    assert place == (None, "embed", "a “test”", positions, "some model")
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_a_file_of_a_vector_is_plain_safetensors(tmp_path):
    made = vector(3, 4)
    made.save(tmp_path / "v.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(read["direction"], made.direction)


def test_arithmetic_is_that_of_the_numbers():
    a, b = vector(5), vector(5)
    np.testing.assert_allclose((2 * a - b).direction, 2 * a.direction - b.direction, rtol=1e-6)
    np.testing.assert_allclose((-a + b).direction, b.direction - a.direction, rtol=1e-6)
    assert a.to_norm(3.5).norm == pytest.approx(3.5)
    assert a.norm == pytest.approx(np.linalg.norm(a.direction))
    assert a.cosine(-2 * a) == pytest.approx(-1)
    rows = vector(3, 5, positions=(1, 2, -1))
    np.testing.assert_allclose(rows.mean().direction, rows.direction.mean(axis=0), rtol=1e-6)
    assert rows.mean().positions == "all"
    assert "random" in rows.mean().source


def test_a_projection_leaves_nothing_of_what_is_projected_out():
    of, out = vector(2, 6), [RNG.normal(size=6), RNG.normal(size=6)]
    left = of.without(out[0], out[0] + 1e-3 * out[1], SteeringVector(out[1], layer=0))
    np.testing.assert_allclose(left.direction @ np.stack(out).T, 0, atol=1e-4)
    basis = np.linalg.qr(np.stack(out).T)[0]
    np.testing.assert_allclose(left.direction, of.direction - of.direction @ basis @ basis.T, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(5,\) cannot be projected out of a vector of 6"):
        of.without(np.ones(5))
    with pytest.raises(ValueError, match="at least one direction"):
        of.without()
    with pytest.raises(ValueError, match="finite numbers"):
        of.without(np.full(6, np.nan))


@pytest.mark.parametrize("other", [{"layer": 2}, {"site": "embed"}, {"positions": "prompt"}])
def test_vectors_of_different_places_do_not_add(other):
    with pytest.raises(ValueError, match="different places do not add"):
        _ = vector(5) + vector(5, **other)


def test_refuses_what_is_no_direction():
    with pytest.raises(ValueError, match="1 numbers that are not finite"):
        SteeringVector(np.array([1.0, np.inf]), layer=0)
    with pytest.raises(ValueError, match="2 rows, one a position, but positions is 'all'"):
        SteeringVector(np.ones((2, 2)), layer=0, positions="all")
    with pytest.raises(ValueError, match="is zero, and cannot be scaled"):
        SteeringVector(np.zeros(3), layer=0, source="nothing").to_norm(1.0)
    with pytest.raises(ValueError, match="positions is empty"):
        SteeringVector(np.ones(3), layer=0, positions=())


def test_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no steering vector"):
        SteeringVector.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not safetensors at all")
    with pytest.raises(ValueError, match="not a saved SteeringVector"):
        SteeringVector.load(tmp_path / "text")
    safetensors.numpy.save_file({"direction": np.ones(3, np.float32)}, tmp_path / "other")
    with pytest.raises(ValueError, match="its format is None"):
        SteeringVector.load(tmp_path / "other")
    SteeringVector(np.ones(300), layer=0).save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a saved SteeringVector"):
        SteeringVector.load(tmp_path / "cut")

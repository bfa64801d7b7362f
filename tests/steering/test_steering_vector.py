import numpy as np
import pytest
import safetensors.numpy

from interp_jax.steering import SteeringVector


def test_survives_the_disk(tmp_path):
    vector = SteeringVector(np.arange(5.0), layer=None, site="embed", source="a “test”")
    vector.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(loaded.direction, vector.direction)
    assert (loaded.layer, loaded.site, loaded.source) == (None, "embed", "a “test”")
    assert loaded.norm == pytest.approx(np.sqrt(30))
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_refuses_what_is_no_direction():
    # A TypeError where the annotations are checked, as they are in these tests.
    with pytest.raises((TypeError, ValueError), match="direction"):
        SteeringVector(np.ones((2, 2)), layer=0)
    with pytest.raises(ValueError, match="1 numbers that are not finite"):
        SteeringVector(np.array([1.0, np.inf]), layer=0)


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

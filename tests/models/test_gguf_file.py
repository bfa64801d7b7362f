"""GGUF files written and read by the `gguf` package are the reference."""

import contextlib
import pathlib
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp_jax.models.gguf_file import GgufFile, check_tensor_names

QUANTISATIONS = [
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.BF16,
    gguf.GGMLQuantizationType.Q4_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.Q8_0,
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_int64("some.negative", -5)
    writer.add_string("some.text", "grüße 植")
    writer.add_array("some.strings", ["Ġa", "", "é"])
    writer.add_array("some.integers", [3, 1, 2])
    rng = np.random.default_rng(0)
    for quantisation in QUANTISATIONS:
        values = rng.normal(size=(6, 64)).astype(np.float32)
        writer.add_tensor(
            f"weight.{quantisation.name}", gguf.quants.quantize(values, quantisation), raw_dtype=quantisation
        )
    writer.add_tensor("vector", rng.normal(size=32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_what_was_written(path):
    metadata = GgufFile(path).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3
    assert metadata["llama.rope.freq_base"] == 100000.0
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["some.negative"] == -5
    assert metadata["some.text"] == "grüße 植"
    assert metadata["some.strings"] == ["Ġa", "", "é"]
    assert metadata["some.integers"] == [3, 1, 2]


def test_tensors_are_those_that_gguf_reads(path):
    ours, reference = GgufFile(path), gguf.GGUFReader(path)
    assert list(ours.shapes) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = ours.tensor(tensor.name)
        assert values.dtype == np.float32
        assert values.shape == ours.shapes[tensor.name] == tuple(int(d) for d in tensor.shape)[::-1]
        np.testing.assert_array_equal(values, expected)


def test_a_file_cut_short_anywhere_is_refused(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 8, 20, 30, 100, 300, len(whole) // 2, len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf.*(cut short|empty)"):
            GgufFile(cut)


def test_what_is_no_gguf_is_refused(path, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"no GGUF file.*PK.*expected b'GGUF'"):
        GgufFile(other)
    other.write_bytes(b"GGUF" + struct.pack("<I", 99) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="version 99"):
        GgufFile(other)
    with pytest.raises(FileNotFoundError):
        GgufFile(tmp_path / "missing.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_a_value_error_or_reads_on(path, tmp_path, data):
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(4, min(len(damaged), 1500) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damaged)
    # Some damage is to values and cannot be known. Any other error than this fails the test.
    with contextlib.suppress(ValueError):
        opened = GgufFile(file)
        for name in opened.shapes:
            opened.tensor(name)


def test_names_are_checked_both_ways(path):
    file = GgufFile(path)
    check_tensor_names(file, list(file.shapes))
    expected = {*file.shapes, "blk.0.attn_q.weight"} - {"vector"}
    with pytest.raises(ValueError, match=r"Missing: blk\.0\.attn_q\.weight\. Unknown: vector\."):
        check_tensor_names(file, expected)


def test_missing_keys_and_tensors_are_named(path):
    file = GgufFile(path)
    with pytest.raises(ValueError, match=r"'llama\.context_length'.*llama\.block_count"):
        file.require("llama.context_length")
    with pytest.raises(KeyError, match="no tensor 'blk'"):
        file.tensor("blk")

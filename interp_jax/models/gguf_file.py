"""GGUF files: metadata, tensor table, tensors dequantised one at a time.

The header is read by this module and not by the `gguf` package's reader: that one makes an array for every string of
the vocabulary, which takes two seconds where this takes a tenth, and it maps a file that was cut short without a word.
The dequantisation itself is `gguf`'s. The layout is that of the GGUF specification, versions 2 and 3, little-endian.

Every length in a header is checked against what is left of the file before it is believed, so that a damaged file is
an error and not an attempt to reserve its size.

Shapes are given as NumPy has them: a linear map's weight is `[out, in]`.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

__all__ = ["GgufFile", "check_tensor_names"]

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MOST_DIMENSIONS = 4


class GgufFile:
    """An opened GGUF file.

    Attributes:
        path: where it is.
        metadata: key to value; arrays are lists.
        shapes: tensor name to shape, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the header. Tensors stay on disk until they are asked for.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no GGUF file, of another version, or cut short.
        """
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{self.path} is empty, expected a GGUF file.")
            # Stays open as long as a tensor that was read from it.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _Header(self.path, self._bytes)
        self.metadata: dict[str, Any] = header.metadata
        self.shapes: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in header.tensors.items()}
        self._tensors = header.tensors

    def require(self, key: str) -> Any:
        """The metadata value of a key that must be there.

        Args:
            key: for example `llama.block_count`.

        Returns:
            The value.

        Raises:
            ValueError: when it is not there; lists the keys that share its first part.
        """
        if key not in self.metadata:
            prefix = key.partition(".")[0] + "."
            alike = sorted(k for k in self.metadata if k.startswith(prefix))
            raise ValueError(f"{self.path} has no metadata {key!r}; under {prefix!r} it has {alike}.")
        return self.metadata[key]

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """A tensor, dequantised.

        Args:
            name: a key of `shapes`.

        Returns:
            float32, with the shape that `shapes` gives.

        Raises:
            KeyError: when there is no such tensor.
            ValueError: when `gguf` cannot dequantise its type.
        """
        if name not in self._tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {len(self._tensors)}, listed in `shapes`.")
        tensor = self._tensors[name]
        data = np.frombuffer(self._bytes, np.uint8, count=tensor.n_bytes, offset=tensor.offset)
        try:
            # A damaged scale may be infinite; whether weights are numbers is for those who look at them.
            with np.errstate(invalid="ignore", over="ignore"):
                values = gguf.quants.dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name!r} is of type {tensor.type.name}, which gguf cannot read."
            ) from error
        # A copy where the tensor is stored as float32: an array must not keep the whole file mapped.
        return np.array(values, np.float32).reshape(tensor.shape)


def check_tensor_names(gguf_file: GgufFile, expected: Iterable[str]) -> None:
    """Makes sure that a file holds exactly the tensors that an architecture has.

    Args:
        gguf_file: the file.
        expected: the names that the loader will use.

    Raises:
        ValueError: when a tensor is missing or unknown; lists both.
    """
    expected = set(expected)
    missing, unknown = sorted(expected - gguf_file.shapes.keys()), sorted(gguf_file.shapes.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"{gguf_file.path} does not hold the tensors of its architecture. "
            f"Missing: {', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}."
        )


class _Tensor:
    def __init__(self, shape: tuple[int, ...], type_: gguf.GGMLQuantizationType, offset: int, n_bytes: int):
        self.shape, self.type, self.offset, self.n_bytes = shape, type_, offset, n_bytes


class _Header:
    """Reads front to back; `position` is always inside the file."""

    def __init__(self, path: str, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0
        if self._take(4) != _MAGIC:
            raise ValueError(f"{path} is no GGUF file: it starts with {bytes(data[:4])!r}, expected {_MAGIC!r}.")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, are known.")
        n_tensors, n_keys = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        table = [self._tensor_entry() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(
                f"{path} is damaged: general.alignment is {alignment!r}, expected a positive number of bytes."
            )
        start = -(-self.position // alignment) * alignment
        self.tensors = {name: self._located(name, shape, type_, start + offset) for name, shape, type_, offset in table}
        if len(self.tensors) != n_tensors:
            raise ValueError(
                f"{path} is damaged: its table names {n_tensors} tensors, of which only {len(self.tensors)} differ."
            )

    def _take(self, n_bytes: int) -> bytes:
        end = self.position + n_bytes
        if end > len(self.data):
            raise ValueError(
                f"{self.path} is cut short or damaged: its header asks for {n_bytes} bytes at {self.position}, "
                f"the file has {len(self.data)}. Get it again."
            )
        taken, self.position = self.data[self.position : end], end
        return taken

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is damaged: a text before byte {self.position} is not UTF-8.") from error

    def _value(self, type_: int, depth: int = 0) -> Any:
        if type_ in _SCALARS:
            return self._scalar(_SCALARS[type_])
        if type_ == _STRING:
            return self._string()
        if type_ != _ARRAY or depth > 3:
            raise ValueError(f"{self.path} is damaged: metadata of type {type_} before byte {self.position}.")
        item_type, length = self._scalar("<I"), self._scalar("<Q")
        if item_type in _SCALARS:
            layout = np.dtype(_SCALARS[item_type])
            return np.frombuffer(self._take(length * layout.itemsize), layout).tolist()
        return [self._value(item_type, depth + 1) for _ in range(length)]

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, n_dimensions = self._string(), self._scalar("<I")
        if n_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{self.path} is damaged: tensor {name!r} with {n_dimensions} dimensions.")
        # The file has the fastest-varying dimension first, NumPy has it last.
        shape = tuple(self._scalar("<Q") for _ in range(n_dimensions))[::-1]
        type_ = self._scalar("<I")
        try:
            return name, shape, gguf.GGMLQuantizationType(type_), self._scalar("<Q")
        except ValueError as error:
            known = [quantisation.name for quantisation in gguf.GGMLQuantizationType]
            raise ValueError(
                f"{self.path}: tensor {name!r} is of the unknown type {type_}; known are {known}."
            ) from error

    def _located(self, name: str, shape: tuple[int, ...], type_: gguf.GGMLQuantizationType, offset: int) -> _Tensor:
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        if not shape or shape[-1] % block:
            raise ValueError(
                f"{self.path} is damaged: tensor {name!r} of shape {shape} in {type_.name} blocks of {block}."
            )
        n_bytes = math.prod(shape) // block * block_bytes
        if offset + n_bytes > len(self.data):
            raise ValueError(
                f"{self.path} is cut short: tensor {name!r} ends at byte {offset + n_bytes}, "
                f"the file has {len(self.data)}. Get it again."
            )
        return _Tensor(shape, type_, offset, n_bytes)

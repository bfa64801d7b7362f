"""Files of weights from outside, read as data and never as code, and written so that damage shows.

Every layout (`saelens`, `gemma_scope`, `sparsify`) is a file of tensors with a JSON config beside it. What is common to
them stands here: a file that is cut short, does not parse, lacks a tensor, holds one too many or one of another shape
is a `ValueError` that names the file and lists both sides.

What is written here carries the SHA-256 of the weights in its config, at the top level, where each of the tools leaves
alone what it does not know. A changed byte in the weights, or a config beside the weights of another save, is noticed
by it; files of other tools have none, and pass.

Weights are of float32 when they have been read, since everything here computes in it; half precision is widened, which
changes no number.
"""

import hashlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.whole_file import write_whole

__all__ = [
    "build",
    "check_checksum",
    "check_tensors",
    "drop_unit_scaling",
    "option",
    "read_config",
    "read_npz",
    "read_safetensors",
    "stored_arrays",
    "write_weights_and_config",
]

S = TypeVar("S", bound=SparseAutoencoder)

_CHECKSUM = "weights_sha256"
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, NotImplementedError, ValueError)
"""What NumPy and `zipfile` raise on an archive that is not whole, or holds pickles."""


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a JSON config.

    Args:
        path: the file.

    Returns:
        The fields.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it does not parse, or holds no table of fields.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; it must stand in one folder with its file of weights.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or altered: it is no JSON ({error}); fetch or write it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not a table of fields; fetch or write it again.")
    return config


def option(config: Mapping[str, Any], path: pathlib.Path, name: str, kind: type, default: Any = None) -> Any:
    """One field of a config, checked for its type: a config is data from outside.

    Args:
        config: the fields.
        path: their file, for the message.
        name: the field.
        kind: what it must be; a float may be written as a whole number.
        default: what stands for a field that is absent or null; None means that it must be there.

    Returns:
        The value.

    Raises:
        ValueError: if it is missing, or of another type.
    """
    value = config.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"{path} has no {name}; expected {kind.__name__}. Fetch it again, or add the field.")
        return default
    is_number = isinstance(value, int) and not isinstance(value, bool)
    # JSON does not tell 32 from 32.0, and tools write a whole number either way.
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and is_number:
        return float(value)
    if not isinstance(value, kind) or (kind is int and not is_number):
        raise ValueError(f"{path}: {name} is {value!r}; expected {kind.__name__}.")
    return value


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file.

    Args:
        path: the file.

    Returns:
        Arrays by name, of float32 or float64.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is cut short or altered, or holds something else than floating-point numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the weights beside {path.parent}'s config.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: _widened(path, name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - the file itself cannot be iterated over
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is cut short or altered: it is not a whole safetensors file ({error}); fetch or write it again."
        ) from None


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an NPZ file; pickled objects in it are refused, not loaded.

    Args:
        path: the file.

    Returns:
        Arrays by name, of float32 or float64.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is cut short or altered, or holds something else than floating-point numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected an NPZ file of weights.")
    # Opened here and not by NumPy, which leaves the file open where the archive is damaged.
    with open(path, "rb") as file:
        # NumPy takes whatever begins otherwise for a single array, or for a pickle.
        if file.read(2) != b"PK":
            raise ValueError(f"{path} is no NPZ file: it does not begin as an archive does; fetch or write it again.")
        file.seek(0)
        arrays: dict[str, np.ndarray] = {}
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays.update({name: np.asarray(archive[name]) for name in archive.files})
        except _DAMAGED_ZIP as error:
            raise ValueError(
                f"{path} is cut short or altered: it is not a whole NPZ file of numbers ({error}); fetch or write it "
                "again."
            ) from None
    return {name: _widened(path, name, array) for name, array in arrays.items()}


def _widened(path: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{path}: {name} is of {array.dtype}; expected floating-point weights, not quantised ones.")
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


def drop_unit_scaling(arrays: dict[str, np.ndarray]) -> None:
    """Removes a scaling factor of all ones, which older tools wrote and which does nothing.

    Args:
        arrays: a file's tensors; changed in place.
    """
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in arrays and np.all(np.abs(arrays[name] - 1) < 1e-5):
            del arrays[name]


def check_tensors(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Compares what a file holds with what it should: names and shapes, every fault in one message.

    Args:
        path: the file, for the message.
        arrays: its tensors.
        expected: for each tensor its dimensions by name, `("d_in", "d_sae")`.
        sizes: what the config says that they are; others are taken from the first tensor that has them.

    Returns:
        The size of every dimension.

    Raises:
        ValueError: if a tensor is missing, unknown, or of a shape that does not fit.
    """
    faults = []
    missing = [f"{name}[{', '.join(shape)}]" for name, shape in expected.items() if name not in arrays]
    unknown = [f"{name}{list(arrays[name].shape)}" for name in sorted(arrays) if name not in expected]
    if missing:
        faults.append(f"it lacks {', '.join(missing)}")
    if unknown:
        faults.append(f"it also has {', '.join(unknown)}")
    bound = dict(sizes or {})
    for name, shape in expected.items():
        if name not in arrays:
            continue
        found = arrays[name].shape
        if len(found) == len(shape):
            for dimension, size in zip(shape, found, strict=True):
                bound.setdefault(dimension, size)
        if list(found) != [bound.get(dimension) for dimension in shape]:
            wanted = ", ".join(
                f"{dimension} = {bound[dimension]}" if dimension in bound else dimension for dimension in shape
            )
            faults.append(f"{name} has shape {list(found)}, not [{wanted}]")
    if faults:
        raise ValueError(
            f"{path} does not hold the weights that its config tells of: {'; '.join(faults)}. Expected "
            f"{', '.join(expected)}; found {', '.join(sorted(arrays)) or 'nothing'}. Fetch both files again from one "
            "place."
        )
    return bound


def check_checksum(weights: pathlib.Path, config_path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Compares weights with the checksum that this project's own configs hold; other tools' hold none.

    Args:
        weights: the file of weights.
        config_path: the config's file, for the message.
        config: its fields.

    Raises:
        ValueError: if they differ.
    """
    if _CHECKSUM not in config:
        return
    with open(weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != config[_CHECKSUM]:
        raise ValueError(
            f"{weights} is altered, or {config_path} is of another save: its SHA-256 is {found}, not "
            f"{config[_CHECKSUM]!r}. Fetch or write both again; if the change is meant, remove {_CHECKSUM} from "
            f"{config_path.name}."
        )


def write_weights_and_config(
    weights: pathlib.Path, arrays: Mapping[str, np.ndarray], config_path: pathlib.Path, config: Mapping[str, Any]
) -> None:
    """Writes a safetensors file and then its config, each whole or not at all.

    Args:
        weights: the file of weights.
        arrays: what it is to hold.
        config_path: the config's file.
        config: its fields; JSON.

    Raises:
        TypeError: if the config is not JSON; nothing is written then.
        OSError: if a file cannot be written.
    """
    content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    text = json.dumps({**config, _CHECKSUM: hashlib.sha256(content).hexdigest()}, indent=1)
    write_whole(weights, content)
    write_whole(config_path, text)


def stored_arrays(sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    """Every parameter of an autoencoder on the host, by name.

    Args:
        sae: the autoencoder.
    """
    names = ["W_enc", "W_dec", "b_dec", *sae.per_latent]
    if sae.W_skip is not None:
        names.append("W_skip")
    return {name: np.asarray(sae.parameter(name)) for name in names}


def build(source: str | os.PathLike[str], kind: type[S], arrays: Mapping[str, np.ndarray], **options: Any) -> S:
    """An autoencoder of arrays that were read.

    Args:
        source: where they are from, for the message.
        kind: its class.
        arrays: parameters by name.
        **options: what is not an array.

    Returns:
        The autoencoder.

    Raises:
        ValueError: if a weight is not finite in float32, or for what the class refuses; with the source.
    """
    with np.errstate(over="ignore"):  # told below, with the parameter's name
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    # A threshold may be infinite: some tools switch latents off by it.
    odd = [name for name, array in arrays.items() if name != "threshold" and not np.all(np.isfinite(array))]
    if odd or np.any(np.isnan(arrays.get("threshold", 0))):
        raise ValueError(
            f"{source}: {', '.join(odd) or 'threshold'} holds numbers that are not finite; fetch or write it again."
        )
    try:
        return kind(**{name: jnp.asarray(array) for name, array in arrays.items()}, **options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None

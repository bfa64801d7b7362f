"""Activations on local disk: safetensors shards and a manifest.

    store/manifest.json            what it holds: width, dtype, provenance, and each shard's rows and SHA-256
    store/shard_00000.safetensors  one tensor, `activations[rows, d_in]`

A shard is written to a temporary file, synced, renamed, and only then entered in the manifest, which is replaced
atomically. So whatever the manifest names was whole when it was written, and a killed writer loses at most the shard
that it was at. Checksums are verified on opening; a shard that was cut short or altered since is named in a warning,
and it and those after it are dropped, so that writing goes on from there.

`shuffled` maps a step to a batch through a permutation for each epoch: every row once an epoch, in an order that a
resumed run finds again from the step alone. Rows are read through a memory map, so the store may be larger than memory.
"""

import functools
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int

from interp_jax.whole_file import write_whole

__all__ = ["ActivationStore"]

_MANIFEST = "manifest.json"
_FORMAT = 1
_DTYPES = ("float32", "float16", "bfloat16")


class ActivationStore:
    """Activations of one site in a folder; appended to by one process at a time, read by any number."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        d_in: int,
        dtype: str = "float32",
        provenance: dict[str, Any] | None = None,
    ):
        """Opens a store, or makes one.

        Args:
            directory: the folder.
            d_in: width of the activations.
            dtype: what they are stored as: float32, float16 or bfloat16.
            provenance: where they are from (model, site, layer, text); JSON. A store made with another is refused.

        Raises:
            ValueError: for another dtype than these, or a store of another width, dtype or provenance, or whose
                manifest does not parse.
        """
        if dtype not in _DTYPES or d_in < 1:
            raise ValueError(
                f"dtype is {dtype!r} and d_in {d_in}; expected one of {', '.join(_DTYPES)}, and at least 1."
            )
        self.directory = pathlib.Path(directory)
        self.d_in = d_in
        self.dtype = dtype
        self._facts = {"format": _FORMAT, "d_in": d_in, "dtype": dtype, "provenance": provenance or {}}
        self._shards: list[dict[str, Any]] = []
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / _MANIFEST
        if path.exists():
            self._read_manifest(path)
        else:
            self._write_manifest()
        self._open_maps()

    @property
    def n_rows(self) -> int:
        """Activations that are stored."""
        return sum(shard["rows"] for shard in self._shards)

    @property
    def n_batches(self) -> int:
        """Batches that they came in: where the source must start for writing to go on."""
        return sum(shard["batches"] for shard in self._shards)

    def extend(
        self,
        batches: Iterable[Any],
        *,
        shard_rows: int = 65_536,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Appends activations. To go on after an interruption, pass the batches from number `n_batches` on.

        Args:
            batches: `[n, d_in]` arrays.
            shard_rows: rows after which a shard is closed, at the end of a batch.
            advance: told how many rows each batch had, once it is taken in.

        Raises:
            ValueError: for a batch of another width, or with NaN or infinity (also where the dtype cannot hold its
                numbers); the shards before it stay.
            OSError: if it cannot be written, for instance since the disk is full; the shards before it stay.
        """
        waiting: list[np.ndarray] = []
        for batch in batches:
            rows = np.asarray(batch)
            if rows.ndim != 2 or rows.shape[1] != self.d_in:
                number = self.n_batches + len(waiting)
                raise ValueError(f"batch {number} has shape {rows.shape}; expected [n, {self.d_in}].")
            with np.errstate(over="ignore"):
                rows = rows.astype(jnp.dtype(self.dtype))
            if not np.isfinite(rows.astype(np.float32)).all():
                number = self.n_batches + len(waiting)
                raise ValueError(
                    f"batch {number} holds NaN, infinity, or numbers too large for {self.dtype}. If the "
                    "model's output is in order, use bfloat16 or float32."
                )
            waiting.append(rows)
            if sum(map(len, waiting)) >= shard_rows:
                self._write_shard(waiting)
                waiting = []
            advance(len(rows))
        if waiting:
            self._write_shard(waiting)

    def rows(self, indices: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n d_in"]:
        """Rows by number.

        Args:
            indices: row numbers, in any order.

        Raises:
            IndexError: if one is out of range.
        """
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.n_rows):
            raise IndexError(f"rows {indices.min()} to {indices.max()} were asked for; the store holds {self.n_rows}.")
        found = np.empty((len(indices), self.d_in), jnp.dtype(self.dtype))
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            # In the order of the file: neighbours share pages.
            here = here[np.argsort(indices[here])]
            found[here] = self._maps[shard][indices[here] - self._starts[shard]]
        return found

    def norms(self, chunk: int = 16_384) -> Float[np.ndarray, "rows"]:
        """The Euclidean norm of every row.

        Args:
            chunk: rows read at a time.
        """
        parts = np.split(np.arange(self.n_rows), range(chunk, self.n_rows, chunk))
        return np.concatenate([np.linalg.norm(self.rows(part).astype(np.float32), axis=1) for part in parts])

    def shuffled(
        self, batch_size: int, *, seed: int = 0, among: Int[np.ndarray, "n"] | None = None
    ) -> Callable[[int], Float[np.ndarray, "batch d_in"]]:
        """A function from a step to its batch, for `train`: every row once an epoch, in an order of its own for each.

        Rows at an epoch's end that fill no batch are left out in that epoch.

        Args:
            batch_size: rows a batch.
            seed: seed of the order.
            among: the numbers of the rows to take; all when None.

        Raises:
            ValueError: if there are fewer rows than a batch.
        """
        chosen = np.arange(self.n_rows) if among is None else np.asarray(among)
        n_rows = len(chosen)
        if not 1 <= batch_size <= n_rows:
            raise ValueError(f"batch_size is {batch_size}; expected 1 to {n_rows}, the rows in {self.directory}.")
        per_epoch = n_rows // batch_size

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(chosen)

        def batch(step: int) -> Float[np.ndarray, "batch d_in"]:
            epoch, number = divmod(step, per_epoch)
            return self.rows(order(epoch)[number * batch_size : (number + 1) * batch_size])

        return batch

    def _write_shard(self, parts: list[np.ndarray]) -> None:
        number = len(self._shards)
        path = self.directory / f"shard_{number:05d}.safetensors"
        content = safetensors.numpy.save({"activations": np.concatenate(parts)})
        write_whole(path, content)
        shard = {
            "file": path.name,
            "rows": sum(map(len, parts)),
            "batches": len(parts),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        self._shards.append(shard)
        try:
            self._write_manifest()
        except BaseException:
            self._shards.pop()
            raise
        self._open_maps()

    def _write_manifest(self) -> None:
        manifest = {**self._facts, "rows": self.n_rows, "shards": self._shards}
        write_whole(self.directory / _MANIFEST, json.dumps(manifest, indent=1).encode())

    def _read_manifest(self, path: pathlib.Path) -> None:
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found = {name: manifest[name] for name in self._facts}
            shards = list(manifest["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the manifest of an activation store ({error!r}). Use another folder."
            ) from None
        expected = json.loads(json.dumps(self._facts))
        if found != expected:
            differing = [
                f"{name} {found[name]!r}, not {expected[name]!r}" for name in found if found[name] != expected[name]
            ]
            raise ValueError(f"{path} is of other activations: {'; '.join(differing)}. Use another folder.")
        for number, shard in enumerate(shards):
            problem = self._problem(shard)
            if problem:
                left = len(shards) - number - 1
                warnings.warn(
                    f"{self.directory / shard['file']} {problem}: it and the {left} shards after it are left out. "
                    "Extend the store to write them again.",
                    stacklevel=4,
                )
                break
            self._shards.append(shard)

    def _problem(self, shard: dict[str, Any]) -> str:
        path = self.directory / shard["file"]
        if not path.exists():
            return "is missing"
        if path.stat().st_size != shard["bytes"]:
            return f"has {path.stat().st_size} bytes, not {shard['bytes']}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                return "was altered since it was written (its SHA-256 differs)"
        return ""

    def _open_maps(self) -> None:
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self._shards)])[:-1]
        self._maps = [self._map(shard) for shard in self._shards]

    def _map(self, shard: dict[str, Any]) -> np.ndarray:
        """The shard's one tensor, which ends the file; safetensors' own reader would copy all of it."""
        shape = (shard["rows"], self.d_in)
        offset = shard["bytes"] - shape[0] * shape[1] * jnp.dtype(self.dtype).itemsize
        return np.memmap(self.directory / shard["file"], jnp.dtype(self.dtype), "r", offset, shape)

"""One shard of a store: a zarr array of activations, and what is worth knowing without reading them.

    shard_00000/zarr.json, shard_00000/c/0/0   `[rows, d_in]`: zarr version 3, in chunks, each with its CRC-32C
    shard_00000/summary.safetensors            `positions`, `norms` and `mean`

**Rows lie mixed.** A shard's rows are shuffled before they are written, so that the rows of a chunk come from all of
the shard's text. A reader that wants rows in no order then reads whole chunks, and still seldom finds two tokens of one
prompt beside each other; reading single rows would cost a request each in a bucket, and a page each on a disk.
`positions[i]` is where row i of the text lies. Norms are in the order of the text.

A chunk whose checksum is wrong, or that is missing, is an error on every read. The manifest keeps the summary's
SHA-256, and the rows must have the norms that the summary says, so that a whole shard of something else is not taken
for this one.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
from typing import Any

import numpy as np
import safetensors.numpy
import tensorstore as ts
from jaxtyping import Float, Int

from interp_jax.activations.storage import Storage

__all__ = ["Filling", "PendingShard", "Shard", "ShardArrays", "Summary", "norms_of", "start_writing"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a manifest says of a shard."""

    name: str
    """Its key, without the slash."""
    rows: int
    """Activations that it holds."""
    batches: int
    """Batches that they came in."""
    chunk_rows: int
    """Rows a chunk; the last has fewer."""
    square_sum: float
    """Sum of the squares of all its numbers."""
    summary_sha256: str
    """Of its summary."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is worth knowing of a shard without reading it."""

    positions: Int[np.ndarray, "rows"]
    """Where each row of the text lies."""
    norms: Float[np.ndarray, "rows"]
    """Euclidean norms, in the order of the text."""
    mean: Float[np.ndarray, "d_in"]
    """The mean of the rows."""


class PendingShard:
    """A shard that is being written while the next one is computed."""

    def __init__(self, storage: Storage, shard: Shard, rows: np.ndarray, summary: bytes):
        """Begins to write a shard, in a thread: every sync takes the disk some time.

        Args:
            storage: where.
            shard: what the manifest is to say of it.
            rows: its rows as they are to lie.
            summary: its summary.
        """
        self.n_batches = shard.batches
        self._storage = storage
        self._shard = shard
        self._written = _THREADS.submit(self._write, rows, summary)

    def result(self) -> Shard:
        """Waits until the shard is on the disk.

        Raises:
            OSError: if it could not be written. Nothing of it is left then.
        """
        self._written.result()
        return self._shard

    def drop(self) -> None:
        """Waits until the shard is written, or is not, and deletes it."""
        concurrent.futures.wait([self._written])
        self._storage.delete(self._shard.name)

    def _write(self, rows: np.ndarray, summary: bytes) -> None:
        name = self._shard.name
        try:
            self._storage.delete(name)
            self._storage.write(f"{name}/summary.safetensors", summary)
            spec = _spec(self._storage, self._shard, rows.shape[1], rows.dtype.name)
            array = ts.open(spec, create=True, context=self._storage.context).result()
            array.write(rows, can_reference_source_data_indefinitely=True).result()
        except (ValueError, OSError) as error:
            failure = error if isinstance(error, OSError) else self._storage.failure(name, rows.nbytes, error)
            self._storage.delete(name)
            raise failure from None


_THREADS = concurrent.futures.ThreadPoolExecutor(2, "interp_jax-shards")


def norms_of(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n"]:
    """Euclidean norms in float32; infinite or NaN where a number is.

    Args:
        rows: of any float type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        floats = rows.astype(np.float32, copy=False)
        norms = np.sqrt(np.einsum("ij,ij->i", floats, floats))
        if not np.isfinite(norms).all():  # a square may be too large for float32 where the number is not
            norms = np.linalg.norm(floats.astype(np.float64), axis=1).astype(np.float32)
    return norms


class Filling:
    """The rows of the next shard, each put to its place as it comes."""

    def __init__(self, room: int, d_in: int, dtype: Any, seed: Any):
        """An empty shard.

        Args:
            room: rows that it can hold.
            d_in: width of the activations.
            dtype: their type.
            seed: of the mixing.
        """
        self.n_rows = 0
        self.n_batches = 0
        self._places = np.random.default_rng(seed).permutation(room).astype(np.int32)
        self._rows = np.empty((room, d_in), dtype)
        self._norms = np.empty(room, np.float32)
        self._sum = np.zeros(d_in)

    def has_room(self, n_rows: int) -> bool:
        """Whether so many rows more fit.

        Args:
            n_rows: how many.
        """
        return self.n_rows + n_rows <= len(self._rows)

    def add(self, rows: Float[np.ndarray, "n d_in"], norms: Float[np.ndarray, "n"]) -> None:
        """Takes in a batch for which there is room.

        Args:
            rows: the batch; it may be changed afterwards.
            norms: of its rows.
        """
        start, self.n_rows = self.n_rows, self.n_rows + len(rows)
        self._rows[self._places[start : self.n_rows]] = rows
        self._norms[start : self.n_rows] = norms
        self._sum += rows.astype(np.float32, copy=False).sum(axis=0)
        self.n_batches += 1

    def content(self) -> tuple[Float[np.ndarray, "rows d_in"], Summary]:
        """The rows as they are to lie, and what is known of them."""
        places = self._places[: self.n_rows]
        rows, positions = self._rows, places
        if self.n_rows < len(self._rows):  # the last shard: the empty places are left out
            order = np.argsort(places)
            rows = np.take(rows, places[order], axis=0)
            positions = np.empty(self.n_rows, np.int32)
            positions[order] = np.arange(self.n_rows, dtype=np.int32)
        mean = (self._sum / self.n_rows).astype(np.float32)
        return rows, Summary(positions, self._norms[: self.n_rows], mean)


def start_writing(storage: Storage, name: str, filling: Filling, chunk_rows: int) -> PendingShard:
    """Begins to write a shard.

    Args:
        storage: where.
        name: of the shard; whatever is there under that name is replaced.
        filling: its rows; not to be used any more.
        chunk_rows: rows a chunk, at most.

    Raises:
        OSError: if there is no room for it.
    """
    rows, known = filling.content()
    n_rows = len(rows)
    storage.check_room(rows.nbytes, f"the next shard, of {n_rows:,} activations,")
    summary = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in vars(known).items()})
    shard = Shard(
        name=name,
        rows=n_rows,
        batches=filling.n_batches,
        chunk_rows=min(chunk_rows, n_rows),
        square_sum=float(np.sum(np.square(known.norms, dtype=np.float64))),
        summary_sha256=hashlib.sha256(summary).hexdigest(),
    )
    return PendingShard(storage, shard, rows, summary)


class ShardArrays:
    """Reads a shard."""

    def __init__(self, storage: Storage, shard: Shard, d_in: int, dtype: str):
        """A shard that the manifest names; nothing is read yet.

        Args:
            storage: where.
            shard: what the manifest says of it.
            d_in: width of the activations.
            dtype: their type.
        """
        self.shard = shard
        self._storage = storage
        self._spec = _spec(storage, shard, d_in, dtype)
        self._array: ts.TensorStore | None = None
        self._summary: Summary | None = None

    @property
    def array(self) -> ts.TensorStore:
        """The rows as they lie, to be read through TensorStore."""
        if self._array is None:
            # The manifest knows the shape, so that opening reads nothing.
            self._array = ts.open(self._spec, open=True, assume_metadata=True, context=self._storage.context).result()
        return self._array

    @property
    def summary(self) -> Summary:
        """What is known of the shard without reading it.

        Raises:
            OSError: if it is damaged.
        """
        if self._summary is None:
            key = f"{self.shard.name}/summary.safetensors"
            content = self._storage.read(key)
            if content is None or hashlib.sha256(content).hexdigest() != self.shard.summary_sha256:
                problem = "is missing" if content is None else "was altered since it was written"
                raise self.damaged(f"summary.safetensors {problem}")
            self._summary = Summary(**safetensors.numpy.load(content))
        return self._summary

    def read(self) -> Float[np.ndarray, "rows d_in"]:
        """All rows, as they lie.

        Raises:
            OSError: if the shard is damaged.
        """
        try:
            return self.array.read().result()
        except ValueError as error:
            raise self.damaged(str(error)) from None

    def problem(self) -> str:
        """Reads the whole shard and says what is wrong with it; nothing if it is whole."""
        try:
            # Here with the array's own description, which other tools go by.
            rows = ts.open(self._spec, open=True, context=self._storage.context).result().read().result()
            _ = self.summary
        except ValueError as error:
            return f"is damaged: {error}"
        except OSError as error:
            return f"is damaged: {error.strerror}"
        # Norms of the same rows in another order: only the last bits of the sums may differ.
        if not np.allclose(norms_of(rows)[self.summary.positions], self.summary.norms, rtol=1e-5, atol=0.0):
            return "was altered since it was written: its rows are not those of its summary"
        return ""

    def damaged(self, what: str) -> OSError:
        """The error of a shard that cannot be read.

        Args:
            what: what is wrong.
        """
        return OSError(
            errno.EIO,
            f"{self._storage.path(self.shard.name)} is damaged: {what}. Open the store again with verify=True: that "
            "leaves it and those after it out, and extending the store writes them again.",
        )


def _spec(storage: Storage, shard: Shard, d_in: int, dtype: str) -> dict[str, Any]:
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    one_file = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [shard.chunk_rows, d_in], "codecs": checked, "index_codecs": checked},
    }
    whole = -(-shard.rows // shard.chunk_rows) * shard.chunk_rows
    return {
        "driver": "zarr3",
        "kvstore": (storage.kvstore / f"{shard.name}/").spec().to_json(),
        "metadata": {
            "shape": [shard.rows, d_in],
            "data_type": dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [whole, d_in]}},
            "codecs": [one_file],
        },
        # A chunk that is not there is no chunk of zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }

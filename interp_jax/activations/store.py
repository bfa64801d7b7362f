"""Activations on disk or in a bucket: zarr shards, written and read by TensorStore, and manifests.

    store/manifest.json              what it holds: width, dtype, provenance, how many parts
    store/part_00000/manifest.json   the shards that one process has written, with their checksums
    store/part_00000/shard_00000/    a shard (`interp_jax.activations.shard`)

**Written by several processes.** Each process has a part of its own, in which nobody else writes, so that they need not
talk to each other. `ActivationStore.open` reads all parts as one.

**Whole or not there.** A shard enters its part's manifest when it is on the disk, and a manifest is replaced in one
go. So whatever a manifest names was whole when it was written, and a killed writer loses at most three shards: the one
that is being computed, and two before it, which are written meanwhile. On opening a store is read through; a shard
that was cut short or altered since is named in a warning, and it and those after it in its part are left out, so that
writing goes on from there. Whatever is read later is checked again, chunk by chunk.

**Read shuffled.** `shuffled` maps a step to a batch: every row once an epoch, in an order that a resumed run finds
again from the step alone. Chunks are taken in random order, some hundred at a time are held in memory, and batches are
drawn from among them. Rows lie mixed within a shard, so a batch holds little more pairs of tokens of one prompt than
one drawn from all rows would. The store may be larger than memory.

Hazard: two processes must not write the same part at once.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import Array, Bool, Float, Int

from interp_jax.activations.shard import Filling, PendingShard, Shard, ShardArrays, norms_of, start_writing
from interp_jax.activations.storage import Storage
from interp_jax.progress import working

__all__ = ["SHARD_BYTES", "ActivationStore", "Statistics"]

_MANIFEST = "manifest.json"
_FORMAT = 2
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_CHUNK_BYTES = 1 << 19
"""What is read at a time: a request to a bucket is worth its while, and the rows are from many prompts all the same."""
SHARD_BYTES = 1 << 26
"""Of a shard, about: fewer syncs than shards of a few megabytes, and little lost in a kill."""
_WRITTEN_AT_ONCE = 2
"""Shards: one reaches the disk while the next is encoded."""
_HELD_BYTES = 1 << 27
"""Chunks held in memory at a time while reading shuffled."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of all activations of a store without reading them."""

    n_rows: int
    """How many they are."""
    mean: Float[np.ndarray, "d_in"]
    """Their mean."""
    mean_square: float
    """The mean of the squares of all their numbers."""


class ActivationStore:
    """Activations of one site; appended to by one process, or by several in a part each, and read by any number."""

    def __init__(
        self,
        directory: str | os.PathLike[str] | dict[str, Any],
        *,
        d_in: int,
        dtype: str = "float32",
        provenance: dict[str, Any] | None = None,
        part: tuple[int, int] = (0, 1),
        verify: bool = True,
    ):
        """Opens a store to write to, or makes one. Its own part is all that a writer of several sees.

        Args:
            directory: a folder, or a URL of a bucket (`gs://bucket/path`, `s3://bucket/path`; see `Storage`).
            d_in: width of the activations.
            dtype: what they are stored as: float32, float16 or bfloat16.
            provenance: where they are from (model, site, layer, text); JSON. A store made with another is refused.
            part: the number of this process's part, from 0, and how many parts there are.
            verify: read everything through on opening. False for a store too large for that: a damaged shard is then an
                error when it is read.

        Raises:
            ValueError: for another dtype than these, or a store of another width, dtype, provenance or number of parts,
                or whose manifest does not parse.
            OSError: if it cannot be written to.
        """
        if dtype not in _DTYPES or d_in < 1:
            raise ValueError(
                f"dtype is {dtype!r} and d_in {d_in}; expected one of {', '.join(_DTYPES)}, and at least 1."
            )
        number, n_parts = part
        if not 0 <= number < n_parts:
            raise ValueError(f"part is {part}; expected the part's number, from 0, and how many there are.")
        storage = Storage(directory)
        facts = {
            "format": _FORMAT,
            "d_in": d_in,
            "dtype": dtype,
            "n_parts": n_parts,
            "provenance": provenance or {},
        }
        facts = json.loads(json.dumps(facts))
        found = _parsed(storage, _MANIFEST, storage.write_new(_MANIFEST, json.dumps(facts, indent=1).encode()), facts)
        differing = [f"{name} {found[name]!r}, not {facts[name]!r}" for name in facts if found[name] != facts[name]]
        if differing:
            raise ValueError(
                f"{storage.path(_MANIFEST)} is of other activations: {'; '.join(differing)}. Use another folder."
            )
        self._open(storage, found, [number], verify)

    @classmethod
    def open(cls, directory: str | os.PathLike[str] | dict[str, Any], *, verify: bool = True) -> "ActivationStore":
        """Opens a store that is there, all its parts as one.

        Args:
            directory: the folder, or the URL of the bucket.
            verify: read everything through first.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if its manifest does not parse.
        """
        storage = Storage(directory)
        content = storage.read(_MANIFEST)
        if content is None:
            raise FileNotFoundError(f"{storage.path(_MANIFEST)} is not there: {storage} holds no activation store.")
        names = ("format", "d_in", "dtype", "n_parts", "provenance")
        facts = _parsed(storage, _MANIFEST, content, names)
        if facts["format"] != _FORMAT:
            raise ValueError(
                f"{storage.path(_MANIFEST)} has format {facts['format']}; this version reads {_FORMAT}. Make it anew."
            )
        store = cls.__new__(cls)
        store._open(storage, facts, list(range(facts["n_parts"])), verify)
        unfinished = [part for part in store._parts if not store._finished[part]]
        if unfinished and facts["n_parts"] > 1:
            warnings.warn(
                f"{storage}: {len(unfinished)} of {facts['n_parts']} parts are not finished, part {unfinished[0]} "
                "among them. What they hold so far is read.",
                stacklevel=2,
            )
        return store

    def _open(self, storage: Storage, facts: dict[str, Any], parts: list[int], verify: bool) -> None:
        self.storage = storage
        self.d_in: int = facts["d_in"]
        self.dtype: str = facts["dtype"]
        self._numpy_dtype = np.dtype(_DTYPES[self.dtype])
        self.provenance: dict[str, Any] = facts["provenance"]
        self._row_bytes = self.d_in * self._numpy_dtype.itemsize
        self._parts = parts
        self._finished: dict[int, bool] = {}
        self._shards: list[ShardArrays] = []
        for part in parts:
            self._shards += self._part(part, verify)
        self._count()

    @property
    def n_rows(self) -> int:
        """Activations that are stored."""
        return int(self._starts[-1])

    @property
    def n_batches(self) -> int:
        """Batches that they came in: where the source must start for writing to go on."""
        return sum(one.shard.batches for one in self._shards)

    @property
    def is_finished(self) -> bool:
        """Whether every part was said to be finished."""
        return all(self._finished.values())

    def extend(
        self,
        batches: Iterable[Any],
        *,
        shard_rows: int | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Appends activations. To go on after an interruption, pass the batches from number `n_batches` on.

        Args:
            batches: `[n, d_in]` arrays.
            shard_rows: rows after which a shard is closed, at the end of a batch; None is some 64 MB of them. Batches
                of unlike lengths make it shorter: one that does not fit begins the next.
            advance: told how many rows each batch had, once it is taken in.

        Raises:
            ValueError: for a batch of another width, or with NaN or infinity (also where the dtype cannot hold its
                numbers); the shards before it stay.
            OSError: if it cannot be written, for instance since the disk is full; the shards before it stay.
        """
        with self.appending(shard_rows=shard_rows) as append:
            for batch in batches:
                append(batch)
                advance(len(batch))

    @contextlib.contextmanager
    def appending(self, *, shard_rows: int | None = None) -> Iterator[Callable[[Any], None]]:
        """Appends activations batch by batch, where `extend` cannot ask for them.

        Args:
            shard_rows: as `extend` takes it.

        Yields:
            A function that takes a `[n, d_in]` array; it raises what `extend` does.
        """
        if len(self._parts) > 1:
            raise ValueError(
                f"{self.storage} has {len(self._parts)} parts: open the one that is to be written, by "
                "ActivationStore(..., part=(number, count))."
            )
        if shard_rows is None:
            shard_rows = max(1, SHARD_BYTES // self._row_bytes)
        chunk_rows = max(1, _CHUNK_BYTES // self._row_bytes)
        self.storage.tidy(_part_folder(self._parts[0]))
        self._write_manifest(finished=False)  # which also forgets what is damaged
        filling: Filling | None = None
        pending: collections.deque[PendingShard] = collections.deque()

        def write() -> None:
            nonlocal filling
            enter(_WRITTEN_AT_ONCE - 1)
            if filling is not None:
                name = f"{_part_folder(self._parts[0])}/shard_{len(self._shards) + len(pending):05d}"
                full, filling = filling, None
                pending.append(start_writing(self.storage, name, full, chunk_rows))

        def enter(left: int) -> None:
            while len(pending) > left:
                try:
                    shard = pending.popleft().result()
                except BaseException:
                    while pending:  # what comes after a gap is of no use
                        pending.pop().drop()
                    raise
                self._enter(shard)

        def append(batch: Any) -> None:
            nonlocal filling
            number = self.n_batches + sum(one.n_batches for one in pending)
            number += 0 if filling is None else filling.n_batches
            rows = np.asarray(batch)
            if rows.ndim != 2 or rows.shape[1] != self.d_in or len(rows) == 0:
                raise ValueError(f"batch {number} has shape {rows.shape}; expected [n, {self.d_in}], not empty.")
            with np.errstate(over="ignore"):
                rows = rows.astype(self._numpy_dtype, copy=False)
            norms = norms_of(rows)
            if not np.isfinite(norms).all():
                raise ValueError(
                    f"batch {number} holds NaN, infinity, or numbers too large for {self.dtype}. If the "
                    "model's output is in order, use bfloat16 or float32."
                )
            if filling is not None and not filling.has_room(len(rows)):
                write()
            if filling is None:
                room = -(-shard_rows // len(rows)) * len(rows)  # for batches of one length it will be full
                seed = (self._parts[0], len(self._shards) + len(pending))
                filling = Filling(room, self.d_in, self._numpy_dtype, seed)
            filling.add(rows, norms)
            if not filling.has_room(1):
                write()

        try:
            yield append
            write()
        finally:
            enter(0)

    def finish(self) -> None:
        """Says that the part is finished, for those who open a store of several parts.

        Raises:
            OSError: if that cannot be written.
        """
        self._write_manifest(finished=True)

    def rows(self, indices: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n d_in"]:
        """Rows by number, in the order of the text. Neighbours are read at the cost of a shard, then from memory.

        Args:
            indices: row numbers, in any order.

        Raises:
            IndexError: if one is out of range.
            OSError: if a shard is damaged.
        """
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.n_rows):
            raise IndexError(f"rows {indices.min()} to {indices.max()} were asked for; the store holds {self.n_rows}.")
        found = np.empty((len(indices), self.d_in), self._numpy_dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shards):
            here = np.flatnonzero(shards == number)
            one = self._shards[number]
            positions = one.summary.positions[indices[here] - self._starts[number]]
            if len(here) * one.shard.chunk_rows < one.shard.rows:
                try:
                    found[here] = one.array[positions].read().result()
                except ValueError as error:
                    raise one.damaged(str(error)) from None
            else:  # rows lie mixed: so many are in about all chunks
                found[here] = np.take(self._whole(number), positions, axis=0)
        return found

    def norms(self) -> Float[np.ndarray, "rows"]:
        """The Euclidean norm of every row, in the order of the text; they were stored beside the rows.

        Raises:
            OSError: if a shard is damaged.
        """
        return np.concatenate([np.zeros(0, np.float32), *(one.summary.norms for one in self._shards)])

    def statistics(self) -> Statistics:
        """What is known of all rows without reading them.

        Raises:
            ValueError: if there are none.
            OSError: if a shard is damaged.
        """
        if self.n_rows == 0:
            raise ValueError(f"{self.storage} holds no activations yet.")
        total = sum(
            (one.shard.rows * one.summary.mean.astype(np.float64) for one in self._shards), start=np.zeros(self.d_in)
        )
        square_sum = sum(one.shard.square_sum for one in self._shards)
        mean = (total / self.n_rows).astype(np.float32)
        return Statistics(self.n_rows, mean, square_sum / (self.n_rows * self.d_in))

    def shuffled(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        among: Int[np.ndarray, "n"] | None = None,
        on_device: bool = False,
    ) -> Callable[[int], Any]:
        """A function from a step to its batch, for `train`: every row once an epoch, in an order of its own for each.

        Rows at an epoch's end that fill no batch are left out in that epoch.

        Args:
            batch_size: rows a batch.
            seed: seed of the order.
            among: the numbers of the rows to take, each once; all when None.
            on_device: whether all rows are read once, here, into the memory of JAX's default device, and batches are
                taken there. They are the same batches. For an accelerator, whose steps are shorter than a disk is
                fast; the store must fit into the host's memory, and into the device's.

        Returns:
            From a step to `[batch, d_in]`: an array of NumPy's, or on the device one of JAX's.

        Raises:
            ValueError: if there are fewer rows than a batch, a number occurs twice, or the device has no room.
            IndexError: if a number is out of range.
        """
        kept = None if among is None else self._where_they_lie(np.asarray(among))
        starts, sizes = self._chunks()
        counts = sizes if kept is None else np.add.reduceat(kept, starts, dtype=np.int64) if len(starts) else sizes
        n_rows = int(counts.sum())
        if not 1 <= batch_size <= n_rows:
            raise ValueError(f"batch_size is {batch_size}; expected 1 to {n_rows}, the rows in {self.storage}.")
        per_epoch = n_rows // batch_size
        # A batch shall be a small share of what is held.
        held = max(1, max(_HELD_BYTES // self._row_bytes, 8 * batch_size) // int(sizes.max()))

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            """The epoch's chunks, and how many rows have come when those that are held together are used up."""
            chunks = np.random.default_rng((seed, epoch)).permutation(len(counts))
            ends = np.cumsum(counts[chunks])
            return chunks, np.append(ends[held - 1 : -1 : held], ends[-1])

        @functools.lru_cache(maxsize=2)
        def mixed(epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
            """The chunks that are held together, and the order of the rows in them."""
            chunks = order(epoch)[0][number * held : (number + 1) * held]
            which = np.arange(int(sizes[chunks].sum()))
            if kept is not None:
                which = which[np.concatenate([kept[starts[c] : starts[c] + sizes[c]] for c in chunks])]
            return chunks, np.random.default_rng((seed, epoch, number + 1)).permutation(which)

        def parts(step: int) -> Iterator[tuple[int, int, slice]]:
            """What a batch is made of: the epoch, the number of chunks that are held together, and of their rows."""
            epoch, number = divmod(step, per_epoch)
            start, stop = number * batch_size, (number + 1) * batch_size
            ends = order(epoch)[1]
            first, last = (int(np.searchsorted(ends, row, "right")) for row in (start, stop - 1))
            for one in range(first, last + 1):
                before = int(ends[one - 1]) if one else 0
                yield epoch, one, slice(max(start - before, 0), stop - before)

        one_at_a_time = threading.Lock()
        if on_device:
            rows = self._all_on_device(starts, sizes)

            @functools.lru_cache(maxsize=2)
            def places(epoch: int, number: int) -> np.ndarray:
                """Where the rows lie that are held together, in their order."""
                chunks, which = mixed(epoch, number)
                return np.concatenate([int(starts[c]) + np.arange(int(sizes[c])) for c in chunks])[which]

            def gathered(step: int) -> Float[Array, "batch d_in"]:
                with one_at_a_time:
                    chosen = np.concatenate([places(epoch, number)[some] for epoch, number, some in parts(step)])
                return _rows_at(rows, jnp.asarray(chosen, jnp.int32))

            return gathered

        held_rows: dict[tuple[int, int], np.ndarray] = {}
        """Of the chunks that are held together: those of this batch, and of the one before."""

        def hold(epoch: int, number: int) -> np.ndarray:
            if (epoch, number) not in held_rows:
                # Memory is used again: new pages would cost as much time as reading does.
                room = held_rows.pop(next(iter(held_rows))) if len(held_rows) == 2 else None
                if room is None:
                    room = np.empty((min(held, len(counts)) * int(sizes.max()), self.d_in), self._numpy_dtype)
                self._read_chunks(mixed(epoch, number)[0], starts, sizes, room)
                held_rows[epoch, number] = room
            return held_rows[epoch, number]

        def batch(step: int) -> Float[np.ndarray, "batch d_in"]:
            with one_at_a_time:
                taken = [
                    np.take(hold(epoch, number), mixed(epoch, number)[1][some], axis=0)
                    for epoch, number, some in parts(step)
                ]
            return taken[0] if len(taken) == 1 else np.concatenate(taken)

        return batch

    def fits_on_device(self) -> bool:
        """Whether an accelerator is JAX's default device, with room for all rows in a quarter of its memory."""
        room = _device_memory()
        return jax.default_backend() != "cpu" and math.isfinite(room) and self.n_rows * self._row_bytes <= room / 4

    def _all_on_device(self, starts: Int[np.ndarray, "chunks"], sizes: Int[np.ndarray, "chunks"]) -> Array:
        """All rows, as they lie, `[rows, d_in]`."""
        needed, room = self.n_rows * self._row_bytes, _device_memory()
        if needed > room:
            raise ValueError(
                f"{self.storage} holds {needed / 1e9:.1f} GB and the device {room / 1e9:.1f} GB: leave on_device out, "
                "and batches are read from the disk."
            )
        rows = np.empty((self.n_rows, self.d_in), self._numpy_dtype)
        with working(f"Reading {self.n_rows:,} activations, {rows.nbytes / 1e9:.1f} GB"):
            self._read_chunks(np.arange(len(starts)), starts, sizes, rows)
            return jax.block_until_ready(jnp.asarray(rows))

    def _chunks(self) -> tuple[Int[np.ndarray, "chunks"], Int[np.ndarray, "chunks"]]:
        """Where each chunk starts among all rows as they lie, and its rows."""
        starts, sizes = [np.zeros(0, int)], [np.zeros(0, int)]
        for start, one in self._placed():
            within = np.arange(0, one.shard.rows, one.shard.chunk_rows)
            starts.append(start + within)
            sizes.append(np.minimum(one.shard.chunk_rows, one.shard.rows - within))
        return np.concatenate(starts), np.concatenate(sizes)

    def _placed(self) -> Iterable[tuple[int, ShardArrays]]:
        return zip(map(int, self._starts[:-1]), self._shards, strict=True)

    def _where_they_lie(self, among: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "rows"]:
        """Which of the rows, as they lie, are among some given by number."""
        if among.size and not (among.min() >= 0 and among.max() < self.n_rows):
            raise IndexError(f"rows {among.min()} to {among.max()} were asked for; the store holds {self.n_rows}.")
        wanted = np.zeros(self.n_rows, bool)
        wanted[among] = True
        if np.count_nonzero(wanted) != len(among):
            raise ValueError("among names a row twice.")
        lying = np.zeros(self.n_rows, bool)
        for start, one in self._placed():
            stop = start + one.shard.rows
            lying[start:stop][one.summary.positions] = wanted[start:stop]
        return lying

    def _read_chunks(
        self,
        chunks: Int[np.ndarray, "n"],
        starts: Int[np.ndarray, "chunks"],
        sizes: Int[np.ndarray, "chunks"],
        room: Float[np.ndarray, "room d_in"],
    ) -> int:
        """Reads some chunks straight to their place in `room`, one after another, and says how many rows they are."""
        ends = np.cumsum(sizes[chunks])
        target = ts.array(room, copy=False, write=True)
        reads = []
        for chunk, stop in zip(chunks, map(int, ends), strict=True):
            number = int(np.searchsorted(self._starts, starts[chunk], "right")) - 1
            start, size = int(starts[chunk] - self._starts[number]), int(sizes[chunk])
            source = self._shards[number].array[start : start + size].translate_to[stop - size, 0]
            reads.append((number, target[stop - size : stop].write(source)))
        for number, read in reads:
            try:
                read.result()
            except ValueError as error:
                raise self._shards[number].damaged(str(error)) from None
        return int(ends[-1])

    def _enter(self, shard: Shard) -> None:
        self._shards.append(self._arrays(shard))
        try:
            self._write_manifest(finished=False)
        except BaseException:
            self._shards.pop()
            raise
        self._count()

    def _arrays(self, shard: Shard) -> ShardArrays:
        return ShardArrays(self.storage, shard, self.d_in, self.dtype)

    def _count(self) -> None:
        self._starts = np.cumsum([0, *(one.shard.rows for one in self._shards)])
        # One shard: text is read in its order, and neighbours lie apart in one.
        self._whole = functools.lru_cache(maxsize=1)(lambda number: self._shards[number].read())

    def _write_manifest(self, *, finished: bool) -> None:
        """Of the one part that is written."""
        part = self._parts[0]
        shards = [dataclasses.asdict(one.shard) for one in self._shards]
        manifest = {"finished": finished, "rows": sum(one["rows"] for one in shards), "shards": shards}
        self.storage.write(_part_manifest(part), json.dumps(manifest, indent=1).encode())
        self._finished[part] = finished

    def _part(self, part: int, verify: bool) -> list[ShardArrays]:
        """The whole shards of a part."""
        key = _part_manifest(part)
        content = self.storage.read(key)
        self._finished[part] = False
        if content is None:
            return []
        manifest = _parsed(self.storage, key, content, ("finished", "shards"))
        try:
            shards = [self._arrays(Shard(**shard)) for shard in manifest["shards"]]
        except TypeError as error:
            raise _unparsed(self.storage, key, error) from None
        for number, one in enumerate(shards if verify else []):
            problem = one.problem()
            if problem:
                left = len(shards) - number - 1
                warnings.warn(
                    f"{self.storage.path(one.shard.name)} {problem}: it and the {left} shards after it are left out. "
                    "Extend the store to write them again.",
                    stacklevel=4,
                )
                return shards[:number]
        self._finished[part] = bool(manifest["finished"])
        return shards


def _device_memory() -> float:
    """Bytes that JAX may use of its first device; without limit where it does not say, as on a CPU."""
    return float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf))


@jax.jit
def _rows_at(rows: Float[Array, "rows d_in"], places: Int[Array, "n"]) -> Float[Array, "n d_in"]:
    return rows[places]


def _part_folder(part: int) -> str:
    return f"part_{part:05d}"


def _part_manifest(part: int) -> str:
    return f"{_part_folder(part)}/{_MANIFEST}"


def _parsed(storage: Storage, key: str, content: bytes, names: Iterable[str]) -> dict[str, Any]:
    """What a manifest says, with all names that are looked for."""
    try:
        manifest = json.loads(content)
        return {name: manifest[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise _unparsed(storage, key, error) from None


def _unparsed(storage: Storage, key: str, error: Exception) -> ValueError:
    return ValueError(
        f"{storage.path(key)} is not the manifest of an activation store ({error!r}). Use another folder."
    )

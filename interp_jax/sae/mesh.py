"""Training on a mesh of devices: what lies where, and how that is checked.

A mesh has two axes. Over `data` the rows of a batch are split; over `latent` the dictionary is: an encoder's columns, a
decoder's rows, and all that has one number a latent, the optimiser's moments included. What is left, biases of the
activations' width and scalars, lies on every device.

    W_enc [d_in, d_sae]: P(None, "latent")     W_dec [d_sae, d_out]: P("latent", None)     batch: P("data", None)

No device ever holds the whole dictionary, nor its gradient. Most of a step is left to XLA, which partitions it by where
its inputs lie. What it would partition badly, gathers by a latent's number, is written for one shard each
(`topk.reconstruct_on_mesh`, `sparse_pairs.decode_largest_on_mesh`), with the few collectives that are needed.

Losses are those of one device but for the order of sums.

The devices may be those of several processes (`jax.distributed`). Each process then gives its own rows of a batch,
those that its devices hold (`own_rows`), and all call the same functions in the same order.

Hazard: `jax.make_mesh` makes axes whose shardings are part of an array's type. What is left to XLA must not be on such
a mesh, so `training_mesh` takes the devices and gives the axes back to XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

__all__ = [
    "DATA",
    "LATENT",
    "WEIGHTS",
    "first_latent",
    "mesh_over_devices",
    "on_host",
    "own_rows",
    "place_batch",
    "shardings",
    "sum_over_shards",
    "training_mesh",
]

DATA = "data"
LATENT = "latent"

WEIGHTS = (P(None, LATENT), P(LATENT), P(LATENT, None), P())
"""Where W_enc, b_enc, W_dec and the input's shift lie: what the sparse derivatives are taken by."""

_ONE_A_LATENT = ("idle", "began", "firings", "frequency")
"""What a training state counts of each latent."""


def training_mesh(mesh: Mesh, d_sae: int) -> Mesh:
    """A mesh to train on, of the devices of one that was given.

    Args:
        mesh: its axes are `data` and `latent`, in any order.
        d_sae: number of latents, which the size of `latent` must divide.

    Raises:
        ValueError: for other axes, or a size that does not divide d_sae.
    """
    if set(mesh.axis_names) != {DATA, LATENT}:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}; expected ('{DATA}', '{LATENT}'). One that is not needed has size 1: "
            f"jax.make_mesh((8, 1), ('{DATA}', '{LATENT}'))."
        )
    n_shards = mesh.shape[LATENT]
    if d_sae % n_shards:
        raise ValueError(
            f"the mesh's axis '{LATENT}' has {n_shards} devices, which must divide d_sae = {d_sae}. Take another "
            "d_sae, or put more of the devices on the other axis."
        )
    return Mesh(mesh.devices, mesh.axis_names)


def mesh_over_devices(data: int, latent: int) -> Mesh:
    """A mesh over the devices that there are.

    Args:
        data: shards of a batch.
        latent: shards of the dictionary.

    Raises:
        ValueError: if there are fewer devices; with several processes also if there are more, since each takes part.
    """
    devices = jax.devices()
    needed = data * latent
    if data < 1 or latent < 1:
        raise ValueError(f"a mesh of {DATA}={data}, {LATENT}={latent}: expected at least 1 of each.")
    if needed > len(devices) or (jax.process_count() > 1 and needed != len(devices)):
        where = f"{len(devices)} {devices[0].platform} devices"
        if jax.process_count() > 1:
            where += f" in {jax.process_count()} processes, which must all take part"
        raise ValueError(
            f"a mesh of {DATA}={data}, {LATENT}={latent} needs {needed} devices; there are {where}. Choose sizes "
            f"whose product is {len(devices)}; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes more."
        )
    return Mesh(np.asarray(devices[:needed]).reshape(data, latent), (DATA, LATENT))


def own_rows(mesh: Mesh, batch: int) -> Int[np.ndarray, "n"]:
    """Which rows of a batch this process gives: all of them where it is the only one.

    Args:
        mesh: the mesh.
        batch: rows of the whole batch.

    Raises:
        ValueError: if the axis' size does not divide their number.
    """
    _check_rows(batch, mesh.shape[DATA], "")
    held = NamedSharding(mesh, P(DATA)).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in held if index is not None]))


def place_batch(mesh: Mesh, rows: Any) -> Array:
    """Rows split over `data`.

    Args:
        mesh: the mesh.
        rows: `[batch, d]`, on the host or on any device. Where there are several processes, each gives its own
            (`own_rows`), or all an array that already lies on all of them.

    Raises:
        ValueError: if the axis' size does not divide their number.
    """
    split = NamedSharding(mesh, P(DATA, None))
    if jax.process_count() == 1 or (isinstance(rows, jax.Array) and not rows.is_fully_addressable):
        _check_rows(len(rows), mesh.shape[DATA], "")
        return jax.device_put(rows, split)
    n_own = len(own_rows(mesh, mesh.shape[DATA]))  # shards of this process
    _check_rows(len(rows), n_own, " of this process")
    whole = (len(rows) // n_own * mesh.shape[DATA], rows.shape[1])
    return jax.make_array_from_process_local_data(split, np.asarray(rows), whole)


def on_host(tree: Any) -> Any:
    """Arrays that lie on a mesh, whole, for one device: what is saved and judged.

    Args:
        tree: of arrays; with several processes all of them call this.
    """

    def whole(leaf: Array) -> Array:
        gathered = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        return jnp.asarray(np.asarray(gathered))

    return jax.tree.map(whole, tree)


def _check_rows(batch: int, n_shards: int, of_whom: str) -> None:
    if batch % n_shards:
        raise ValueError(
            f"the mesh's axis '{DATA}' has {n_shards} devices{of_whom}, which must divide the batch of {batch} "
            f"rows{of_whom}. Take other batches, or put more of the devices on the other axis."
        )


def shardings(mesh: Mesh, state: Any) -> Any:
    """Where each leaf of a training state lies.

    Args:
        mesh: the mesh.
        state: a `TrainState`, of arrays or of their shapes; or a sweep's, with an axis of the runs before the others.

    Returns:
        The state's structure with a sharding in the place of each leaf.
    """
    per_latent = {*state.sae.per_latent, *_ONE_A_LATENT}

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # Moments are named as their parameters are, behind a prefix.
        names = set(jax.tree_util.keystr(path, simple=True, separator=".").split("."))
        own: tuple[str | None, ...] = ()
        if "W_enc" in names:
            own = (None, LATENT)
        elif "W_dec" in names:
            own = (LATENT, None)
        elif names & per_latent:
            own = (LATENT,)
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - len(own)), *own) if own else P())

    return jax.tree.map_with_path(of_leaf, state)


def sum_over_shards(by_weights: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    """Sums one shard's part of the gradients by `WEIGHTS` over all that hold the same weights; inside `jax.shard_map`.

    Args:
        by_weights: gradients by W_enc, b_enc, W_dec and the input's shift.
    """
    *of_latents, by_shift = by_weights
    W_enc, b_enc, W_dec = jax.lax.psum(tuple(of_latents), DATA)
    return W_enc, b_enc, W_dec, jax.lax.psum(by_shift, (DATA, LATENT))


def first_latent(n_local: int) -> Array:
    """The number of a shard's first latent, inside `jax.shard_map`.

    Args:
        n_local: latents a shard.
    """
    return jax.lax.axis_index(LATENT).astype(jnp.int32) * n_local

"""Training on a mesh of devices: what lies where, and how that is checked.

A mesh has two axes. Over `data` the rows of a batch are split; over `latent` the dictionary is: an encoder's columns, a
decoder's rows, and all that has one number a latent, the optimiser's moments included. What is left, biases of the
activations' width and scalars, lies on every device.

    W_enc [d_in, d_sae]: P(None, "latent")     W_dec [d_sae, d_out]: P("latent", None)     batch: P("data", None)

No device ever holds the whole dictionary, nor its gradient. Most of a step is left to XLA, which partitions it by where
its inputs lie. What it would partition badly, gathers by a latent's number, is written for one shard each
(`topk.reconstruct_on_mesh`, `sparse_pairs.decode_largest_on_mesh`), with the few collectives that are needed.

Losses are those of one device but for the order of sums.

Hazard: `jax.make_mesh` makes axes whose shardings are part of an array's type. What is left to XLA must not be on such
a mesh, so `training_mesh` takes the devices and gives the axes back to XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

__all__ = ["DATA", "LATENT", "WEIGHTS", "first_latent", "place_batch", "shardings", "sum_over_shards", "training_mesh"]

DATA = "data"
LATENT = "latent"

WEIGHTS = (P(None, LATENT), P(LATENT), P(LATENT, None), P())
"""Where W_enc, b_enc, W_dec and the input's shift lie: what the sparse derivatives are taken by."""

_ONE_A_LATENT = ("idle", "firings", "frequency")
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


def place_batch(mesh: Mesh, rows: Any) -> Array:
    """Rows split over `data`.

    Args:
        mesh: the mesh.
        rows: `[batch, d]`, on the host or on any device. Where there are several processes, each gives the same rows,
            or an array that already lies on all of them.

    Raises:
        ValueError: if the axis' size does not divide their number.
    """
    batch, n_shards = len(rows), mesh.shape[DATA]
    if batch % n_shards:
        raise ValueError(
            f"the mesh's axis '{DATA}' has {n_shards} devices, which must divide the batch of {batch} rows. Take other "
            "batches, or put more of the devices on the other axis."
        )
    return jax.device_put(rows, NamedSharding(mesh, P(DATA, None)))


def shardings(mesh: Mesh, state: Any) -> Any:
    """Where each leaf of a training state lies.

    Args:
        mesh: the mesh.
        state: a `TrainState`, of arrays or of their shapes.

    Returns:
        The state's structure with a sharding in the place of each leaf.
    """
    per_latent = {*state.sae.per_latent, *_ONE_A_LATENT}

    def of_leaf(path: tuple[Any, ...], _: Any) -> NamedSharding:
        # Moments are named as their parameters are, behind a prefix.
        names = set(jax.tree_util.keystr(path, simple=True, separator=".").split("."))
        if "W_enc" in names:
            return NamedSharding(mesh, P(None, LATENT))
        if "W_dec" in names:
            return NamedSharding(mesh, P(LATENT, None))
        return NamedSharding(mesh, P(LATENT) if names & per_latent else P())

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

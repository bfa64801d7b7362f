"""A model's activations over rows of tokens, stored: computed once, and on from where an interrupted run stopped.

A store knows the tokens by their checksum, so that activations of another text are never taken for those of this one.
Several sites are read in one pass, and each has a store of its own. Several processes take a range of the rows each.
"""

import contextlib
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from interp_jax.activations.store import SHARD_BYTES, ActivationStore
from interp_jax.activations.stream import Site, stream_sites
from interp_jax.instrument import SiteError, list_sites
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import advancing, note

__all__ = ["site_folder", "store_activations", "store_sites"]


def store_activations(
    model: LanguageModel,
    rows: Int[np.ndarray, "rows context"],
    directory: str | os.PathLike[str],
    *,
    site: str,
    layer: int | None,
    batch_rows: int = 8,
    part: tuple[int, int] = (0, 1),
) -> ActivationStore:
    """Activations at one site, but those of each row's first position, in the order of the rows; with progress.

    They are stored in float32, or in the narrower dtype that the model computes in.

    Args:
        model: the model.
        rows: the tokens; the last rows that fill no batch are left out.
        directory: the store's folder, or a bucket's URL. What is there already is not computed again.
        site: the site's name.
        layer: its layer, None outside the layers.
        batch_rows: rows a forward pass.
        part: of several processes, the number of this one and how many there are: each is given all rows and takes a
            range of them.

    Returns:
        The store; of several processes, this one's part of it. `ActivationStore.open` reads them all.

    Raises:
        SiteError: before anything is computed, if there is no such site; it lists those of that layer.
        ValueError: if the folder holds activations of something else.
        OSError: before anything is computed, if there is no room for what is to come.
    """
    stores = _stored(model, rows, {(layer, site): directory}, batch_rows=batch_rows, part=part)
    return stores[layer, site]


def store_sites(
    model: LanguageModel,
    rows: Int[np.ndarray, "rows context"],
    directory: str | os.PathLike[str],
    *,
    sites: Sequence[Site],
    batch_rows: int = 8,
    part: tuple[int, int] = (0, 1),
) -> dict[Site, ActivationStore]:
    """Activations at several sites from one pass over the tokens, a store for each.

    Args:
        model: the model.
        rows: the tokens; the last rows that fill no batch are left out.
        directory: a folder, or a bucket's URL; each store is `site_folder(directory, (layer, name))`.
        sites: pairs of layer and name.
        batch_rows: rows a forward pass.
        part: as `store_activations` takes it.

    Returns:
        The stores by `(layer, name)`.

    Raises:
        SiteError: before anything is computed, if a site is not there; it lists those of its layer.
        ValueError: if a folder holds activations of something else, or a site is named twice.
        OSError: before anything is computed, if there is no room for what is to come.
    """
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites is {list(sites)}; expected at least one (layer, name), each once.")
    places = {site: site_folder(directory, site) for site in sites}
    return _stored(model, rows, places, batch_rows=batch_rows, part=part)


def site_folder(directory: str | os.PathLike[str], site: Site) -> str:
    """Where `store_sites` puts a site's store.

    Args:
        directory: the folder or URL of all.
        site: layer and name.
    """
    layer, name = site
    folder = name if layer is None else f"{name}.{layer}"
    directory = os.fspath(directory)
    return f"{directory.rstrip('/')}/{folder}" if "://" in directory else str(pathlib.Path(directory) / folder)


def _stored(
    model: LanguageModel,
    rows: Int[np.ndarray, "rows context"],
    places: dict[Site, Any],
    *,
    batch_rows: int,
    part: tuple[int, int],
) -> dict[Site, ActivationStore]:
    context = rows.shape[1]
    n_all = len(rows) // batch_rows
    tokens = jax.ShapeDtypeStruct((batch_rows, context), jnp.int32)
    known = {(row.layer, row.name): row for row in list_sites(model.forward)(model.params, tokens)}
    for layer, name in places:
        if (layer, name) not in known:
            here = ", ".join(name for at, name in known if at == layer)
            raise SiteError(f"{model.name} has no site {name!r} at layer {layer}; there are {here}.")
    rows = rows[: n_all * batch_rows]
    tokens_sha256 = hashlib.sha256(np.ascontiguousarray(rows, "<i4").data).hexdigest()
    widths = {site: math.prod(known[site].shape[2:]) for site in places}
    wide = jnp.dtype(jnp.float32)
    dtypes = {site: min(wide, jnp.dtype(known[site].dtype), key=lambda dtype: dtype.itemsize) for site in places}
    stores = {}
    for (layer, name), place in places.items():
        provenance = {
            "model": model.name,
            "site": name,
            "layer": layer,
            "rows": len(rows),
            "context": context,
            "tokens_sha256": tokens_sha256,
        }
        width, dtype = widths[layer, name], dtypes[layer, name].name
        stores[layer, name] = ActivationStore(place, d_in=width, dtype=dtype, provenance=provenance, part=part)
    # This process's range of the batches.
    first, last = (n_all * number // part[1] for number in (part[0], part[0] + 1))
    n_batches = last - first
    done = min(store.n_batches for store in stores.values())
    if done == n_batches:
        note(f"{sum(store.n_rows for store in stores.values()):,} activations are in "
             f"{', '.join(str(store.storage) for store in stores.values())} from a run before.")  # fmt: skip
    else:
        per_batch = batch_rows * (context - 1)
        for site, store in stores.items():
            left = (n_batches - store.n_batches) * per_batch
            what = f"what is still to come, {left:,} activations,"
            store.storage.check_room(left * widths[site] * dtypes[site].itemsize, what)
        # All stores close their shards at the same batches, so that none is far ahead of another after a kill.
        row_bytes = max(widths[site] * dtypes[site].itemsize for site in places)
        shard_batches = max(1, SHARD_BYTES // (per_batch * row_bytes))
        batches = rows.reshape(n_all, batch_rows, context)[first + done : last]
        stream = stream_sites(model.forward, model.params, batches, sites=list(places), skip_first=1)
        what = " and ".join(f"{name} of layer {layer}" if layer is not None else name for layer, name in places)
        total = n_batches * batch_rows * context
        with (
            advancing(f"Streaming {what}", total, done=done * batch_rows * context) as advance,
            contextlib.ExitStack() as stack,
        ):
            stored = {site: store.n_batches for site, store in stores.items()}
            append = {
                site: stack.enter_context(store.appending(shard_rows=shard_batches * per_batch))
                for site, store in stores.items()
            }
            for number, values in enumerate(stream, done):
                for site, value in values.items():
                    if number >= stored[site]:
                        append[site](value)
                advance(batch_rows * context)
    for store in stores.values():
        if not store.is_finished:
            store.finish()
    return stores

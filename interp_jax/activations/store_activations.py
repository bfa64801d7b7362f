"""A model's activations over rows of tokens, on disk: computed once, and on from where an interrupted run stopped.

The store knows the tokens by their checksum, so that activations of another text are never taken for those of this one.
"""

import hashlib
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from interp_jax.activations.store import ActivationStore
from interp_jax.activations.stream import stream_activations
from interp_jax.instrument import SiteError, list_sites
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import advancing, note

__all__ = ["store_activations"]


def store_activations(
    model: LanguageModel,
    rows: Int[np.ndarray, "rows context"],
    directory: str | os.PathLike[str],
    *,
    site: str,
    layer: int | None,
    batch_rows: int = 8,
) -> ActivationStore:
    """Activations at one site, but those of each row's first position, in the order of the rows; with progress.

    Args:
        model: the model.
        rows: the tokens; the last rows that fill no batch are left out.
        directory: the store's folder. What is there already is not computed again.
        site: the site's name.
        layer: its layer, None outside the layers.
        batch_rows: rows a forward pass.

    Raises:
        SiteError: before anything is computed, if there is no such site; it lists those of that layer.
        ValueError: if the folder holds activations of something else.
    """
    n_batches, context = len(rows) // batch_rows, rows.shape[1]
    rows = rows[: n_batches * batch_rows]
    sites = list_sites(model.forward)(model.params, jax.ShapeDtypeStruct((batch_rows, context), jnp.int32))
    here = {row.name: row.shape for row in sites if row.layer == layer}
    if site not in here:
        raise SiteError(f"{model.name} has no site {site!r} at layer {layer}; there are {', '.join(here)}.")
    provenance = {
        "model": model.name,
        "site": site,
        "layer": layer,
        "rows": len(rows),
        "context": context,
        "tokens_sha256": hashlib.sha256(np.ascontiguousarray(rows, "<i4").tobytes()).hexdigest(),
    }
    store = ActivationStore(directory, d_in=math.prod(here[site][2:]), provenance=provenance)
    done = store.n_batches
    if done == n_batches:
        note(f"{store.n_rows:,} activations are in {directory} from a run before.")
    else:
        batches = rows.reshape(n_batches, batch_rows, context)[done:]
        stream = stream_activations(model.forward, model.params, batches, site=site, layer=layer, skip_first=1)
        per_batch = batch_rows * context
        with advancing(f"Streaming {site} of layer {layer}", rows.size, done=done * per_batch) as advance:
            store.extend(stream, shard_rows=16 * batch_rows * (context - 1), advance=lambda _: advance(per_batch))
    return store

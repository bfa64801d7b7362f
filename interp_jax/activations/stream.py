"""From tokens to activations: a model run as far as the last wanted site, batch by batch.

The pass stops there: what stands above is neither computed nor, where the site is not inside a function that JAX traces
as a whole, traced. Several sites are read in one pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.instrument import SiteError, iterate

__all__ = ["Site", "stream_activations", "stream_sites"]

Site = tuple[int | None, str]
"""`(layer, name)`, the layer None outside the layers."""


def stream_activations(
    forward: Callable[[Any, Array], Any],
    params: Any,
    token_batches: Iterable[Any],
    *,
    site: str,
    layer: int | None,
    skip_first: int = 0,
) -> Iterator[Float[Array, "n d_in"]]:
    """The activations at one site, one array a batch of tokens, in the order of the text.

    Args:
        forward: `forward(params, tokens)`, with the site inside.
        params: the model's parameters.
        token_batches: int arrays `[batch, seq]`, all of one shape where each is not to be compiled for.
        site: the site's name.
        layer: its layer, None outside the layers.
        skip_first: positions at the start of each row that are left out. Most language models keep a huge, constant
            activation at the first one, which would dominate a dictionary's loss; pass 1 there.

    Yields:
        `[batch * (seq - skip_first), d_in]`, row after row of the text; an activation of more axes, as a value per
        head, is flattened to d_in.

    Raises:
        SiteError: at the first batch, if there is no such site; it lists those that exist.
        ValueError: at the first batch, if it is not `[batch, seq]` or `skip_first` leaves nothing of it.
    """
    streams = stream_sites(forward, params, token_batches, sites=[(layer, site)], skip_first=skip_first)
    return (values[layer, site] for values in streams)


def stream_sites(
    forward: Callable[[Any, Array], Any],
    params: Any,
    token_batches: Iterable[Any],
    *,
    sites: Sequence[Site],
    skip_first: int = 0,
) -> Iterator[dict[Site, Float[Array, "n _"]]]:
    """The activations at several sites, all from one pass a batch of tokens.

    Args:
        forward: `forward(params, tokens)`, with the sites inside.
        params: the model's parameters.
        token_batches: int arrays `[batch, seq]`, all of one shape where each is not to be compiled for.
        sites: pairs of layer and name.
        skip_first: positions at the start of each row that are left out, as `stream_activations` does.

    Yields:
        What `stream_activations` yields, by `(layer, name)`, in the order of `sites`.

    Raises:
        SiteError: at the first batch, if a site is not there; it lists those that are.
        ValueError: if `sites` is empty or names one twice; at the first batch, if that is not `[batch, seq]` or
            `skip_first` leaves nothing of it.
    """
    wanted = list(sites)
    if skip_first < 0:
        raise ValueError(f"skip_first is {skip_first}; expected zero or more positions.")
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"sites is {wanted}; expected at least one (layer, name), each once.")
    names, layers = {name for _, name in wanted}, {layer for layer, _ in wanted}

    def passed(params: Any, tokens: Array, *, stop: bool) -> dict[Any, Array]:
        left = set(wanted)
        for layer, name, value in (running := iterate(forward, sites=names, layers=layers)(params, tokens)):
            if (layer, name) in wanted:
                running.save((layer, name), value)
                left.discard((layer, name))
            del value  # where the site is inside a checkpoint, it must not outlive the pass
            if stop and not left:
                break
        if left:
            there = sorted(running.saved, key=str)
            raise SiteError(f"The pass has no site {sorted(left, key=str)}; of those asked for it has {there}.")
        return running.saved

    @jax.jit
    def run(params: Any, tokens: Array) -> list[Array]:
        # A value saved inside a function that JAX traces as a whole (scan, checkpoint) leaves it only when that
        # function ends, so such a pass is not broken off; XLA then drops what nothing depends on.
        saved = passed(params, tokens, stop=True)
        if len(saved) < len(wanted):
            saved = passed(params, tokens, stop=False)
        return [saved[site] for site in wanted]

    def values() -> Iterator[dict[Site, Float[Array, "n _"]]]:
        for number, batch in enumerate(token_batches):
            tokens = jnp.asarray(batch)
            if tokens.ndim != 2 or tokens.shape[1] <= skip_first:
                raise ValueError(
                    f"token batch {number} has shape {tokens.shape}; expected [batch, seq] with more than "
                    f"{skip_first} positions."
                )
            found = (value[:, skip_first:] for value in run(params, tokens))
            flat = (value.reshape(value.shape[0] * value.shape[1], -1) for value in found)
            yield dict(zip(wanted, flat, strict=True))

    return values()

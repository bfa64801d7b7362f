"""From tokens to activations: a model run as far as one site, batch by batch.

The pass stops at the site: what stands above it is neither computed nor, where the site is not inside a function that
JAX traces as a whole, traced.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.instrument import iterate

__all__ = ["stream_activations"]


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
    if skip_first < 0:
        raise ValueError(f"skip_first is {skip_first}; expected zero or more positions.")

    def passed(params: Any, tokens: Array, *, stop: bool) -> dict[str, Array]:
        for _, _, value in (running := iterate(forward, sites=(site,), layers=(layer,))(params, tokens)):
            running.save("activation", value)
            del value  # where the site is inside a checkpoint, it must not outlive the pass
            if stop:
                break
        return running.saved

    @jax.jit
    def run(params: Any, tokens: Array) -> Array:
        # A value saved inside a function that JAX traces as a whole (scan, checkpoint) leaves it only when that
        # function ends, so such a pass is not broken off; XLA then drops what nothing depends on.
        saved = passed(params, tokens, stop=True) or passed(params, tokens, stop=False)
        return saved["activation"]

    for number, batch in enumerate(token_batches):
        tokens = jnp.asarray(batch)
        if tokens.ndim != 2 or tokens.shape[1] <= skip_first:
            raise ValueError(
                f"token batch {number} has shape {tokens.shape}; expected [batch, seq] with more than "
                f"{skip_first} positions."
            )
        value = run(params, tokens)[:, skip_first:]
        yield value.reshape(value.shape[0] * value.shape[1], -1)

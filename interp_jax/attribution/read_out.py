"""From the final stream to logits: the last steps of a model, by themselves.

The logit lens and direct logit attribution put values of their own at the last `resid_post`. On this project's
`Transformer` only its final norm and unembedding then run. On any other model its own forward pass runs with the value
planted there, as a batch of rows of the same shape: all that is asked of the model is that site.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.attribution.wrapped_forward import innermost
from interp_jax.instrument import inject
from interp_jax.models import transformer

__all__ = ["read_out"]


def read_out(
    forward: Callable[..., Array], n_layers: int, params: Any, stream: Float[Array, "batch seq d_model"]
) -> Float[Array, "batch seq vocab"]:
    """The logits of values at the last `resid_post`.

    Args:
        forward: `forward(params, tokens) -> logits`.
        n_layers: How many layers it has.
        params: Its parameters.
        stream: What stands at the last `resid_post`; at most the model's context of positions.

    Returns:
        The logits, in the dtype of the model.

    Raises:
        SiteError: The model has no `resid_post` in its last layer.
    """
    forward, params = innermost(forward, params)
    if forward is not transformer.apply:
        tokens = jnp.zeros(stream.shape[:2], jnp.int32)
        return inject(forward)({(n_layers - 1, "resid_post"): stream}, params, tokens)
    config = params.config
    normed = params.final_norm(stream)
    logits = normed @ params.unembedding.astype(normed.dtype)
    if config.unembed_bias:
        logits = logits + params.b_unembed[...].astype(normed.dtype)
    cap = config.logit_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

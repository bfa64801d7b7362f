"""Splicing: put something else in the place of an activation, and see what the model loses by it.

This is how a dictionary is judged: the loss with the activation replaced by its reconstruction, beside the loss of the
clean model and of a model whose activation is ablated.

**Attention sinks are left alone.** Language models keep a huge, nearly constant activation at the first token of a row,
and at a few tokens elsewhere, which attention uses as a rest position. It says nothing about the text, yet is most of
the variance (SmolLM2, layer 15: 1 token in 5000 has 80 times the usual norm, and 83 % of the variance is theirs), and
replacing it breaks the model out of all proportion. So the first position is never replaced, nor is an activation
whose norm is above `keep_above`. Training keeps the same rule (`stream_activations` with `skip_first`, and a
store's rows `among` the others).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_losses

__all__ = ["mean_loss", "splice"]

Replace = Callable[..., Array]
"""`replace(value, *args) -> value`, both `[batch, seq, d_in]`."""


def splice(
    forward: Callable[[Any, Array], Array],
    replace: Replace,
    *,
    site: str,
    layer: int | None,
    keep_above: float = float("inf"),
) -> Callable[..., Array]:
    """Makes of a forward pass one in which one activation is replaced, but at the first position and at other sinks.

    Args:
        forward: `forward(params, tokens) -> logits`.
        replace: gives what stands in the activation's place.
        site: the site's name.
        layer: its layer.
        keep_above: the Euclidean norm above which an activation is left alone.

    Returns:
        `spliced(params, tokens, *args) -> logits`; `args` are handed to `replace`.

    Raises:
        SiteError: on the call, if there is no such site; it lists those that exist.
    """

    def spliced(params: Any, tokens: Array, *args: Any) -> Array:
        for _, _, value in (running := iterate(forward, sites=site, layers=(layer,))(params, tokens)):
            is_sink = jnp.linalg.norm(value, axis=-1, keepdims=True) > keep_above
            is_sink |= jnp.arange(value.shape[1])[:, None] == 0
            running.modified_value = jnp.where(is_sink, value, replace(value, *args).astype(value.dtype))
        return running.retval

    return spliced


def mean_loss(
    language_model: LanguageModel,
    tokens: Int[np.ndarray, "rows context"],
    replace: Replace | None = None,
    *args: Any,
    site: str = "resid_post",
    layer: int | None = None,
    keep_above: float = float("inf"),
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """The next-token loss of a model on text, clean or spliced.

    Args:
        language_model: the model.
        tokens: the text; the last rows that fill no batch are left out.
        replace: gives what stands in the activation's place; None for the clean model.
        *args: arrays that `replace` is given (a dictionary's parameters), so that they are not compiled in.
        site: the site's name.
        layer: its layer.
        keep_above: the Euclidean norm above which an activation is left alone.
        batch_size: rows a batch.
        advance: told how many tokens were done, batch by batch.

    Returns:
        The mean over all predictions but the first of each row, whose position is never spliced, in nats a token.

    Raises:
        ValueError: if there are fewer rows than `batch_size`.
    """
    if len(tokens) < batch_size:
        raise ValueError(
            f"{len(tokens)} rows do not fill a batch of {batch_size}: pass more text or a smaller batch_size"
        )
    forward = language_model.forward
    if replace is not None:
        forward = splice(forward, replace, site=site, layer=layer, keep_above=keep_above)
    run = _losses(forward)
    sums = []
    for start in range(0, len(tokens) - batch_size + 1, batch_size):
        batch = jnp.asarray(tokens[start : start + batch_size])
        sums.append(float(run(language_model.params, batch, *args)))
        advance(batch.size)
    return float(np.mean(sums))


def _losses(forward: Callable[..., Array]) -> Callable[..., Float[Array, ""]]:
    @jax.jit
    def run(params: Any, tokens: Array, *args: Any) -> Float[Array, ""]:
        return next_token_losses(forward(params, tokens, *args), tokens)[:, 1:].mean()

    return run

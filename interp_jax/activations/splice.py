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
from jaxtyping import Array, Bool, Float, Int

from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_losses

__all__ = ["SINK_NORM", "is_sink", "mean_loss", "splice", "substituted", "unheaded"]

SINK_NORM = 3.0
"""Activations of more than so many times the median norm are taken for sinks where nothing else is said."""

Replace = Callable[..., Array]
"""`replace(value, *args) -> value`, both `[batch, seq, d_in]`; a value per head is flattened to d_in."""


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
            flat = unheaded(value, tokens, site)
            running.modified_value = substituted(value, replace(flat, *args), is_sink(flat, keep_above))
            del value, flat  # where the site is inside a checkpoint, they must not outlive the step
        return running.retval

    return spliced


def unheaded(value: Float[Array, "batch *rest"], tokens: Array, site: str) -> Float[Array, "batch seq d_in"]:
    """An activation of any axes as one vector a position, as `stream_activations` gives it.

    Args:
        value: as it stands at the site.
        tokens: `[batch, seq]`, what went in.
        site: the site's name, for the error.

    Raises:
        ValueError: if it is not an activation a position, as attention probabilities are not.
    """
    if value.shape[:2] != tokens.shape or value.ndim < 3:
        raise ValueError(
            f"site {site!r} has shape {value.shape} for tokens of shape {tokens.shape}; what is wanted is one vector a "
            "position, [batch, seq, ...]. Choose a site such as resid_post or mlp_out."
        )
    return value.reshape(*value.shape[:2], -1)


def is_sink(value: Float[Array, "batch seq d_in"], keep_above: float) -> Bool[Array, "batch seq"]:
    """Which positions are left alone: the first, and those of a norm above `keep_above`."""
    is_first = jnp.arange(value.shape[1]) == 0
    return is_first | (jnp.linalg.norm(value, axis=-1) > keep_above)


def substituted(
    value: Float[Array, "batch seq *rest"],
    replacement: Float[Array, "batch seq d_in"],
    is_kept: Bool[Array, "batch seq"],
) -> Float[Array, "batch seq *rest"]:
    """An activation with another in its place, but where it is to be kept; shape and dtype stay."""
    axes = (1,) * (value.ndim - 2)
    replacement = replacement.astype(value.dtype).reshape(value.shape)
    return jnp.where(is_kept.reshape(*is_kept.shape, *axes), value, replacement)


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

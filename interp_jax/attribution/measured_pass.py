"""The pass that ends in a metric: what attribution runs, over and over, is no more of the model than the metric needs.

A metric of one position needs the logits there, and the unembedding is a fifth of SmolLM2's forward pass; a batch whose
rows are alike up to a layer needs the layers from there on. Both are known of this project's `Transformer` only: any
other model, and whatever wraps this one, runs as it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from interp_jax.attribution.metric import at_one_position, check_varies
from interp_jax.attribution.nodes import Family
from interp_jax.models import transformer
from interp_jax.models.language_model import LanguageModel

__all__ = ["MeasuredPass", "measured_on_both", "measured_pass"]


class MeasuredPass(NamedTuple):
    """`metric(forward(params, tokens))`, and a way into its middle."""

    forward: Callable[..., Any]
    """`forward(params, tokens) -> logits`, of all positions or of the metric's only."""
    params: Any
    """What `forward` and `enter` take."""
    metric: Any
    """The metric of these logits."""
    enter: Callable[..., Any] | None
    """`enter(params, tokens, stream, layer) -> logits`, as `transformer.apply_from`; None if there is no such way."""


def measured_pass(language_model: LanguageModel, families: Sequence[Family], metric: Any) -> MeasuredPass:
    """The pass for a metric, in which all sites of some nodes are what they are in the model's own.

    Args:
        language_model: The model.
        families: The nodes.
        metric: From `metric_of`.
    """
    model = language_model
    # By the function itself: one that wraps it may compute anything.
    if model.forward is not transformer.apply:
        return MeasuredPass(model.forward, model.params, metric, None)
    narrowed = at_one_position(metric)
    if narrowed is None or any(family.site in ("final_norm", "logits") for family in families):
        return MeasuredPass(model.forward, model.params, metric, transformer.apply_from)
    one, position = narrowed
    return MeasuredPass(_at_position, (model.params, position), one, _enter_at_position)


def measured_on_both(run: MeasuredPass, tokens: Int[Array, "2 seq"]) -> tuple[float, float]:
    """The metric on both prompts, before anything long.

    Args:
        run: The pass.
        tokens: The clean prompt and the corrupted one.

    Raises:
        ValueError: It is the same on both, or not finite.
    """
    clean, corrupted = map(float, _measured(run.forward, run.params, run.metric, tokens))
    check_varies(clean, corrupted)
    return clean, corrupted


@functools.partial(jax.jit, static_argnums=0)
def _measured(forward: Callable[..., Any], params: Any, metric: Any, tokens: Int[Array, "2 seq"]) -> Float[Array, "2"]:
    return metric(forward(params, tokens))


def _at_position(params: Any, tokens: Any) -> Any:
    model, position = params
    return transformer.apply_at(model, tokens, position)


def _enter_at_position(params: Any, tokens: Any, stream: Any, layer: Any) -> Any:
    model, position = params
    return transformer.apply_from(model, tokens, stream, layer, position)

"""What an effect is measured on: one number a row, from the logits.

A metric is any function `logits[batch, seq, vocab] -> [batch]`. The classes here are pytrees whose answers and
positions are arrays, so that the next prompt pair runs in the program that is already compiled. A plain function works
as well; it is part of the program, so give one that is defined once, in a module, not a lambda made anew for each call
(a `jax.tree_util.Partial` of it carries arrays that vary). The fields are `Any`, for JAX puts more than arrays in them.

Hazard: `KL` is 0 and flat at its own reference. Patching measures it well; attribution by gradients at that prompt
gives 0 everywhere, to first order rightly so.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.models.loss import next_token_losses

__all__ = ["KL", "LogProbability", "LogitDifference", "Loss", "Metric", "at_one_position", "check_varies", "metric_of"]

Metric = Callable[[Float[Array, "batch seq vocab"]], Float[Array, "batch"]]
"""A function of the logits, one number a row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """The answer's logit less the wrong token's."""

    answer: Any
    """The id that should be predicted."""
    wrong: Any
    """The id that it is compared with."""
    position: Any = -1
    """Where; negative from the end."""

    def __call__(self, logits: Float[Array, "batch seq vocab"]) -> Float[Array, "batch"]:
        """The metric."""
        at = logits[:, self.position].astype(jnp.float32)
        return at[:, self.answer] - at[:, self.wrong]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbability:
    """The answer's log-probability, in nats."""

    answer: Any
    """The id that should be predicted."""
    position: Any = -1
    """Where; negative from the end."""

    def __call__(self, logits: Float[Array, "batch seq vocab"]) -> Float[Array, "batch"]:
        """The metric."""
        at = logits[:, self.position].astype(jnp.float32)
        return at[:, self.answer] - jax.nn.logsumexp(at, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KL:
    """How far the prediction is from a reference, KL(reference || prediction) in nats."""

    reference_log_probs: Any
    """`[vocab]` log-probabilities of the reference, say the clean prompt's."""
    position: Any = -1
    """Where; negative from the end."""

    def __call__(self, logits: Float[Array, "batch seq vocab"]) -> Float[Array, "batch"]:
        """The metric."""
        log_probs = jax.nn.log_softmax(logits[:, self.position].astype(jnp.float32), axis=-1)
        reference = self.reference_log_probs
        return jnp.sum(jnp.exp(reference) * (reference - log_probs), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean next-token loss of a row of tokens, in nats a token."""

    tokens: Any
    """`[seq]` tokens to predict, usually the clean prompt's."""

    def __call__(self, logits: Float[Array, "batch seq vocab"]) -> Float[Array, "batch"]:
        """The metric."""
        tokens = jnp.broadcast_to(jnp.asarray(self.tokens), logits.shape[:2])
        return next_token_losses(logits, tokens).mean(axis=-1)


def metric_of(metric: Metric | None, pair: PromptPair, vocab_size: int) -> Any:
    """The metric as a pytree that a compiled program can take.

    Args:
        metric: a metric; None stands for the pair's own: the logit difference, or the answer's log-probability where
            the pair has no wrong token.
        pair: the pair.
        vocab_size: how many tokens the model knows.

    Returns:
        The metric with arrays for leaves.

    Raises:
        ValueError: without a metric, if the pair has no answer; for a token or a position that does not exist, or a
            metric that does not give one number a row.
    """
    if metric is None:
        if pair.answer is None:
            raise ValueError("There is nothing to measure: give the pair an answer (and a wrong token), or metric=.")
        metric = LogProbability(pair.answer) if pair.wrong is None else LogitDifference(pair.answer, pair.wrong)
    if jax.tree.structure(metric) == jax.tree.structure(0):  # a leaf: a plain function
        metric = Partial(metric)
    _check_places(metric, pair.seq, vocab_size)
    metric = jax.tree.map(jnp.asarray, metric)
    found = jax.eval_shape(_applied, metric, jax.ShapeDtypeStruct((2, pair.seq, vocab_size), jnp.float32))
    if getattr(found, "shape", None) != (2,) or not jnp.issubdtype(found.dtype, jnp.floating):
        shown = f"{found.dtype}{list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise ValueError(
            f"Of the logits [2, {pair.seq}, {vocab_size}] of two rows the metric gives {shown}; it must give one "
            "floating-point number a row, [2]."
        )
    return metric


def _check_places(metric: Any, seq: int, vocab_size: int) -> None:
    """Refuses tokens and positions that indexing would silently move to the nearest that there is."""
    wanted = {KL: ("reference_log_probs", vocab_size), Loss: ("tokens", seq)}.get(type(metric))
    if wanted is not None and (given := np.shape(getattr(metric, wanted[0])))[-1:] != (wanted[1],):
        raise ValueError(f"The metric's {wanted[0]} has shape {given}; it must be [{wanted[1]}].")
    limits = {"answer": (0, vocab_size), "wrong": (0, vocab_size), "position": (-seq, seq)}
    for name, (low, end) in limits.items():
        if type(metric) in (LogitDifference, LogProbability, KL) and hasattr(metric, name):
            at = np.asarray(getattr(metric, name))
            if not np.issubdtype(at.dtype, np.integer):
                raise ValueError(
                    f"The metric's {name} is {getattr(metric, name)!r}; it must be an id or a position, an integer."
                )
            if ((at < low) | (at >= end)).any():
                raise ValueError(f"The metric's {name} is {at}; it can be {low} to {end - 1}.")


def _applied(metric: Any, logits: Any) -> Any:
    return metric(logits)


def at_one_position(metric: Any) -> tuple[Any, Any] | None:
    """A metric that reads one position alone, as one of that position's logits `[batch, 1, vocab]`.

    Args:
        metric: from `metric_of`.

    Returns:
        That metric, and the position; None for a metric that may read more.
    """
    if type(metric) not in (LogitDifference, LogProbability, KL) or jnp.ndim(metric.position):
        return None
    return dataclasses.replace(metric, position=jnp.zeros_like(metric.position)), metric.position


def check_varies(clean: Any, corrupted: Any) -> None:
    """Refuses a metric that is the same on both prompts: every effect would be a rounding error.

    Args:
        clean: its value on the clean prompt.
        corrupted: on the corrupted one.

    Raises:
        ValueError: if both are the same, or one is not finite; it shows both.
    """
    clean, corrupted = float(clean), float(corrupted)
    values = f"{clean:.6g} on the clean prompt and {corrupted:.6g} on the corrupted one"
    if not abs(clean - corrupted) < float("inf"):
        raise ValueError(f"The metric is {values}: it must be finite. Look at the model's logits.")
    if abs(clean - corrupted) <= 1e-6 * max(1.0, abs(clean), abs(corrupted)):
        raise ValueError(
            f"The metric is {values}: it does not tell them apart, so there is nothing to attribute. "
            "Choose prompts, an answer or a position for which it does."
        )

"""The next-token loss of a language model: the one number by which a splice, an ablation or a loaded checkpoint is
judged.

It is computed in float32 whatever the logits' dtype, as logsumexp minus the target's logit, so that the
log-probabilities of the whole vocabulary are never stored beside the logits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["next_token_loss", "next_token_losses"]


def next_token_losses(logits: Float[Array, "batch seq vocab"], tokens: Int[Array, "batch seq"]) -> Float[Array, "..."]:
    """The loss of each prediction: position t's logits against token t + 1.

    Args:
        logits: what the model gives for `tokens`.
        tokens: the ids that went in. Ids outside the vocabulary give NaN.

    Returns:
        [batch, seq - 1] negative log-likelihoods in nats, float32.

    Raises:
        ValueError: when rows hold fewer than two tokens, so that nothing is predicted.
    """
    if tokens.shape[1] < 2:
        raise ValueError(f"The next-token loss needs rows of at least 2 tokens, got tokens of shape {tokens.shape}.")
    predictions = logits[:, :-1].astype(jnp.float32)
    targets = tokens[:, 1:, None]
    # mode="fill": an id outside the vocabulary must not be clipped into a plausible loss. Negative ids would wrap.
    targets = jnp.where(targets < 0, predictions.shape[-1], targets)
    picked = jnp.take_along_axis(predictions, targets, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return jax.nn.logsumexp(predictions, axis=-1) - picked


def next_token_loss(logits: Float[Array, "batch seq vocab"], tokens: Int[Array, "batch seq"]) -> Float[Array, ""]:
    """The mean of `next_token_losses`, in nats a token over positions 1 and on.

    Args:
        logits: what the model gives for `tokens`.
        tokens: the ids that went in.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: when rows hold fewer than two tokens.
    """
    return jnp.mean(next_token_losses(logits, tokens))

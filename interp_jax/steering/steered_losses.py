"""What an edit breaks: the next-token loss on ordinary text, never on what the model itself wrote.

A row of text is taken for a conversation: its first `n_prompt` tokens are the prompt, the rest is what would be
generated. The edit acts where it would act then, and losses are counted over the predictions that are made after the
prompt. With an edit of the prompt's tokens those are all positions after the steered ones. An edit of every position,
or of the generated ones, acts on what is counted too, as it does in generation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_losses
from interp_jax.models.token_ids import check_ids
from interp_jax.steering.edits import Edit, check_edits, check_strengths, steered_forward
from interp_jax.steering.steer import finite_coefficients

__all__ = ["steered_losses"]


def steered_losses(
    language_model: LanguageModel,
    tokens: Int[np.ndarray, "rows context"],
    edits: Any,
    *,
    coefficients: Sequence[float],
    n_prompt: int = 16,
    batch_rows: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> Float[np.ndarray, "coefficients rows"]:
    """The loss on text at each strength of an edit; all strengths run in one compiled program.

    Args:
        language_model: the model.
        tokens: the text, as ids; each row begins as a text does.
        edits: a `SteeringVector`, an edit, or several that act together.
        coefficients: the strengths; 0 is the unsteered model.
        n_prompt: how many tokens of each row are taken for the prompt.
        batch_rows: rows of a pass.
        advance: told how many tokens are done, over all strengths.

    Returns:
        For each strength and row the mean over the predictions of tokens `n_prompt + 1` and later, in nats a token.

    Raises:
        ValueError: if rows have no token to predict after the prompt, an id is no token, or as for `steer`.
        FloatingPointError: if a loss is not finite, which a too large coefficient brings about.
    """
    strengths = finite_coefficients(coefficients)
    rows, context = tokens.shape
    if rows == 0 or context < n_prompt + 2:
        raise ValueError(
            f"{rows} rows of {context} tokens have nothing to predict after a prompt of {n_prompt}; give at least one "
            f"row of {n_prompt + 2} tokens."
        )
    check_ids(tokens, language_model.vocab_size)
    checked = check_edits(edits, language_model, [n_prompt])
    check_strengths(checked, strengths, language_model)
    found = []
    for start in range(0, rows, batch_rows):
        batch = tokens[start : start + batch_rows]
        n = len(batch)
        batch = np.concatenate([batch, np.repeat(batch[:1], batch_rows - n, axis=0)])
        losses = _losses(
            language_model.forward, language_model.params, jnp.asarray(batch), checked, jnp.asarray(strengths), n_prompt
        )
        found.append(np.asarray(losses)[:, :n])
        advance(n * context * len(strengths))
    every = np.concatenate(found, axis=1)
    if not np.isfinite(every).all():
        worst = strengths[int(np.argmin(np.isfinite(every).all(axis=1)))]
        raise FloatingPointError(
            f"The loss at coefficient {worst:g} is not finite: the edit is too large for {language_model.name}'s "
            "number format. Use a smaller coefficient."
        )
    return every


@functools.partial(jax.jit, static_argnums=(0, 5))
def _losses(
    forward: Callable[[Any, Array], Array],
    params: Any,
    tokens: Int[Array, "rows context"],
    edits: tuple[Edit, ...],
    strengths: Float[Array, "coefficients"],
    n_prompt: int,
) -> Float[Array, "coefficients rows"]:
    steered = steered_forward(forward)

    def at(strength: Float[Array, ""]) -> Float[Array, "rows"]:
        scaled = tuple(edit.scaled(strength[None]) for edit in edits)
        logits = steered(params, tokens, scaled, n_prompt)
        # Losses stand at the position that predicts: those from the first position after the prompt on.
        return next_token_losses(logits, tokens)[:, n_prompt:].mean(axis=1)

    return jax.lax.map(at, strengths)

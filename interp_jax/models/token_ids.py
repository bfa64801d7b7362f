"""Token ids as users give them: refused where they are none, since a lookup would give NaN or another token's row."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

__all__ = ["check_ids", "token_rows"]


def check_ids(tokens: Any, vocab_size: int, name: str = "tokens") -> None:
    """Refuses ids that are no tokens, where their values are known: not under jit.

    Args:
        tokens: an array.
        vocab_size: how many tokens the model knows.
        name: what the array is called, for the error.

    Raises:
        ValueError: if an id is no integer of the vocabulary; it says which.
    """
    if isinstance(tokens, jax.core.Tracer):
        return
    host = np.asarray(tokens)
    if not np.issubdtype(host.dtype, np.integer):
        raise ValueError(f"{name} has dtype {host.dtype}; token ids are integers. tokenizer.encode gives a text's.")
    wrong = np.argwhere((host < 0) | (host >= vocab_size))
    if len(wrong):
        at = tuple(map(int, wrong[0]))
        raise ValueError(f"{name}{list(at) if at else ''} is {host[at]}; the model's tokens are 0 to {vocab_size - 1}.")


def token_rows(tokens: Any, vocab_size: int, name: str = "tokens") -> Int[Array, "batch seq"]:
    """Rows of token ids as an array.

    Args:
        tokens: an array `[batch, seq]`, or lists of one length.
        vocab_size: how many tokens the model knows.
        name: what they are called, for the error.

    Raises:
        ValueError: if they are not rows of one length, or an id is no token.
    """
    if not hasattr(tokens, "ndim"):
        lengths = [len(row) if hasattr(row, "__len__") else None for row in tokens]
        if len(set(lengths)) > 1:
            raise ValueError(f"{name} has rows of {', '.join(map(str, lengths))} tokens; they must be of one length.")
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"{name} has shape {tokens.shape}; it must be [batch, seq]: jnp.array([ids]) for one prompt.")
    check_ids(tokens, vocab_size, name)
    return jnp.asarray(tokens)

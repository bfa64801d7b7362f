"""What directions in the residual stream say: the tokens that they promote and suppress through the unembedding."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.models.language_model import LanguageModel

__all__ = ["TokenLogit", "promoted_tokens"]


@dataclasses.dataclass(frozen=True)
class TokenLogit:
    """A token and what a direction adds to its logit."""

    token: str
    """The token as a printable string."""
    logit: float
    """The logit, up to the final norm's division: comparable within one latent only."""


def promoted_tokens(
    language_model: LanguageModel,
    directions: Float[Array, "n d_model"] | Float[np.ndarray, "n d_model"],
    *,
    count: int = 10,
    among: Int[np.ndarray, "ids"] | None = None,
) -> list[tuple[tuple[TokenLogit, ...], tuple[TokenLogit, ...]]]:
    """The tokens whose logits directions in the residual stream raise and lower most, straight through the unembedding.

    Args:
        language_model: the model whose unembedding is used.
        directions: one row a direction.
        count: how many tokens each way.
        among: the ids that may be named; all when None. A large vocabulary has tokens that training hardly ever saw,
            and they crowd every list: pass those that occur in a text.

    Returns:
        For each direction (promoted, suppressed), the strongest first. Ids that the model's padded vocabulary has and
        the tokenizer lacks are left out.
    """
    tokenizer = language_model.tokenizer
    logits = np.asarray(language_model.unembed(language_model.params, jnp.asarray(directions)), np.float32)
    named = np.arange(tokenizer.vocab_size) if among is None else np.asarray(among)
    logits = logits[:, named]
    count = min(count, logits.shape[1])
    found = []
    for row in logits:
        order = np.argsort(row, kind="stable")
        ends = (order[::-1][:count], order[:count])
        found.append(
            tuple(
                tuple(
                    TokenLogit(token, float(row[i]))
                    for token, i in zip(tokenizer.readable(named[ids].tolist()), ids, strict=True)
                )
                for ids in ends
            )
        )
    return found

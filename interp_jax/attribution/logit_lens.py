"""The logit lens: what a model would predict if it stopped at a layer (nostalgebraist 2020).

Any value in the stream's space is put through the model's own final norm and unembedding, layer by layer and position
by position: the likeliest tokens, how far that prediction is from the final one (KL divergence), and how a chosen
token ranks. One layer's logits exist at a time.

`resid_post` of the last layer gives the model's own prediction. A part's output (`attn_out`, `mlp_out`) has a norm of
its own; what the lens says of it is a reading of its direction, not a share of a logit: for that see
`direct_logit_attribution`.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.attribution.read_out import read_out
from interp_jax.instrument import SiteValues, fetch
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import check_ids, token_rows
from interp_jax.models.tokenizer import Tokenizer

__all__ = ["LogitLens", "logit_lens"]

_STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """What each layer would predict; the first axis of every array is that of `layers`."""

    site: str
    """Where the values were read."""
    layers: tuple[int | None, ...]
    """The layers, in order."""
    tokens: Int[np.ndarray, "batch seq"]
    """The prompts."""
    top_tokens: Int[np.ndarray, "layers batch seq top"]
    """The likeliest next tokens, the likeliest first."""
    top_probabilities: Float[np.ndarray, "layers batch seq top"]
    """Their probabilities."""
    kl: Float[np.ndarray, "layers batch seq"]
    """KL(final prediction || this one), in nats."""
    target_rank: Int[np.ndarray, "layers batch seq"] | None
    """How many tokens are likelier than the target; None without one."""
    target_probability: Float[np.ndarray, "layers batch seq"] | None
    """The target's probability."""
    tokenizer: Tokenizer
    """For the tables."""

    def table(self, row: int = 0, position: int | None = None) -> str:
        """The lens as text.

        Args:
            row: Which prompt.
            position: For one position, a line a layer with its likeliest tokens, the divergence, and the target's
                rank; None for the likeliest token at every position.

        Returns:
            The lines, the last layer first.
        """
        readable = self.tokenizer.readable
        if position is None:
            header = ["layer", *readable([int(token) for token in self.tokens[row]])]
            lines = [
                [str(layer), *readable([int(token) for token in self.top_tokens[at, row, :, 0]])]
                for at, layer in enumerate(self.layers)
            ]
            return _aligned([header, *reversed(lines)])
        header = ["layer", "KL", *([] if self.target_rank is None else ["rank"]), "next token, probability"]
        lines = []
        for at, layer in enumerate(self.layers):
            words = readable([int(token) for token in self.top_tokens[at, row, position]])
            pairs = zip(words, self.top_probabilities[at, row, position], strict=True)
            rank = [] if self.target_rank is None else [str(self.target_rank[at, row, position])]
            predictions = [f"{word!r} {probability:.3f}" for word, probability in pairs]
            lines.append([str(layer), f"{self.kl[at, row, position]:.3f}", *rank, *predictions])
        return _aligned([header, *reversed(lines)])

    __str__ = table


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(f"{cell:<{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows)


def logit_lens(
    language_model: LanguageModel,
    tokens: Int[Array, "batch seq"],
    *,
    site: str = "resid_post",
    layers: int | Collection[int] | None = None,
    top: int = 5,
    target: int | Sequence[int] | Int[Array | np.ndarray, "batch"] | None = None,
) -> LogitLens:
    """What each layer would predict.

    Args:
        language_model: A model that has the site, and `resid_post` in its last layer.
        tokens: The prompts.
        site: A site in the stream's space.
        layers: Which layers; None for all that have the site.
        top: How many tokens to name.
        target: A token to rank, one for all prompts or one a prompt.

    Returns:
        The predictions, as NumPy arrays.

    Raises:
        ValueError: The site is not in the stream's space; tokens are no rows, or no tokens; `top` or the target is out
            of range.
        SiteError: The model has no such site or layer.
    """
    if site not in _STREAM:
        raise ValueError(f"The logit lens reads the stream, at one of {', '.join(_STREAM)}; {site!r} is none of them.")
    tokens = token_rows(tokens, language_model.vocab_size)
    if not 1 <= top <= language_model.vocab_size:
        raise ValueError(f"top={top}; it must be 1 to {language_model.vocab_size}, the size of the vocabulary.")
    targets = None
    if target is not None:
        check_ids(target, language_model.vocab_size, "target")
        targets = jnp.broadcast_to(jnp.asarray(target, jnp.int32), tokens.shape[:1])
    wanted = (
        None if layers is None else (layers,) if isinstance(layers, int | np.integer) else tuple(sorted(set(layers)))
    )
    by_layer = _lens(
        language_model.forward,
        language_model.n_layers,
        site,
        wanted,
        top,
        language_model.params,
        tokens,
        targets,
    )
    found: _Prediction = jax.tree.map(lambda *layers: np.stack(layers), *by_layer.values())
    return LogitLens(
        site=site,
        layers=tuple(layer for layer, _ in by_layer),
        tokens=np.asarray(tokens),
        top_tokens=found.tokens,
        top_probabilities=found.probabilities,
        kl=found.kl,
        target_rank=found.target_rank,
        target_probability=found.target_probability,
        tokenizer=language_model.tokenizer,
    )


class _Prediction(NamedTuple):
    """What one layer would predict."""

    tokens: Any
    probabilities: Any
    kl: Any
    target_rank: Any
    target_probability: Any


@functools.partial(jax.jit, static_argnames=("forward", "n_layers", "site", "layers", "top"))
def _lens(
    forward: Callable[..., Array],
    n_layers: int,
    site: str,
    layers: tuple[int, ...] | None,
    top: int,
    params: Any,
    tokens: Array,
    targets: Array | None,
) -> SiteValues:
    logits, values = fetch(forward, site, layers)(params, tokens)
    final = jax.nn.log_softmax(logits.astype(jnp.float32))

    def predicted(stream: Array) -> _Prediction:
        log_probabilities = jax.nn.log_softmax(read_out(forward, n_layers, params, stream).astype(jnp.float32))
        chosen, chosen_tokens = jax.lax.top_k(log_probabilities, top)
        # Of two equal predictions the sum may be a rounding error below zero.
        kl = jnp.maximum(jnp.sum(jnp.exp(final) * (final - log_probabilities), axis=-1), 0)
        if targets is None:
            return _Prediction(chosen_tokens, jnp.exp(chosen), kl, None, None)
        of_target = jnp.take_along_axis(log_probabilities, targets[:, None, None], axis=-1)
        rank = jnp.sum(log_probabilities > of_target, axis=-1)
        return _Prediction(chosen_tokens, jnp.exp(chosen), kl, rank, jnp.exp(of_target[..., 0]))

    stacked = jax.lax.map(predicted, jnp.stack(list(values.values())))
    return SiteValues({key: jax.tree.map(lambda each, i=i: each[i], stacked) for i, key in enumerate(values)})

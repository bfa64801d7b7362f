"""How much of an activation the last few tokens alone explain, layer by layer.

The activation at a text's last token is compared with the one that the same token has when only the last k tokens are
there (Nanda et al., December 2023, "Fact Finding: Do early layers specialise in local processing?"). The cosine
similarity is taken after each set's mean over texts is subtracted: activations of one layer share a large mean, and
without that any two of them look alike. What unrelated texts give is 0.

Hazard: with learned absolute positions (GPT-2) the truncated text also stands at other positions.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.attribution.activations_at import activations_at
from interp_jax.attribution.nodes import sites_of
from interp_jax.models.language_model import LanguageModel

__all__ = ["TruncatedContext", "truncated_context_similarity"]


@dataclasses.dataclass(frozen=True)
class TruncatedContext:
    """Similarities by how many tokens were kept and by layer."""

    lengths: tuple[int, ...]
    """How many of the last tokens were kept."""
    layers: tuple[int | None, ...]
    """The layers, in order."""
    similarity: Float[np.ndarray, "lengths layers n"]
    """Of each text."""

    @property
    def mean(self) -> Float[np.ndarray, "lengths layers"]:
        """Over texts."""
        return self.similarity.mean(axis=-1)

    @property
    def standard_error(self) -> Float[np.ndarray, "lengths layers"]:
        """Of the mean."""
        return self.similarity.std(axis=-1, ddof=1) / self.similarity.shape[-1] ** 0.5

    def table(self) -> str:
        """The means: a line a layer, a column for each number of kept tokens."""
        header = "layer  " + "  ".join(f"last {length:>3}" for length in self.lengths)
        by_layer = zip(self.layers, self.mean.T, strict=True)
        lines = [f"{layer!s:>5}  " + "  ".join(f"{one:>8.3f}" for one in row) for layer, row in by_layer]
        return "\n".join([header, *lines])


def truncated_context_similarity(
    language_model: LanguageModel,
    tokens: Int[Array | np.ndarray, "n seq"],
    lengths: Sequence[int] = (1, 2, 5, 10, 20),
    *,
    site: str = "resid_post",
    layers: int | Collection[int] | None = None,
    batch_size: int = 32,
) -> TruncatedContext:
    """Compares activations at the last token with and without the context before the last few tokens.

    Args:
        language_model: The model.
        tokens: Texts of one length; where the model expects a first token of its own (`bos_id`), with it. It is kept.
        lengths: How many of the last tokens to keep, each at most as many as there are.
        site: A site with one vector a position.
        layers: Which layers; None for all.
        batch_size: Texts a pass.

    Returns:
        The similarities.

    Raises:
        ValueError: Fewer than three texts, or a length that the texts do not have.
        SiteError: The model has no such site or layer.
    """
    rows = np.asarray(tokens)
    bos_id = language_model.tokenizer.bos_id
    start = rows[:, :1] if bos_id is not None and (rows[:, 0] == bos_id).all() else rows[:, :0]
    seq = rows.shape[1] - start.shape[1]
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} texts; the mean over texts is subtracted, so give many, at least three.")
    wrong = [length for length in lengths if not 1 <= length <= seq]
    if wrong or not lengths:
        raise ValueError(f"lengths={tuple(lengths)}; the texts have {seq} tokens, so each must be 1 to {seq}.")

    def last_token(given: np.ndarray) -> np.ndarray:
        """`[layers, n, d]`, all in the program of the whole texts' width."""
        found = activations_at(
            language_model, given, site=site, layers=layers, batch_size=batch_size, pad_to=rows.shape[1]
        )
        return _directions(found[:, 0])

    whole = last_token(rows)
    similarity = [
        np.einsum("lnd,lnd->ln", last_token(np.concatenate([start, rows[:, -length:]], axis=1)), whole)
        for length in lengths
    ]
    named = {layers} if isinstance(layers, int | np.integer) else layers
    there = (row.layer for row in sites_of(language_model, rows.shape[1]) if row.name == site)
    in_order = tuple(layer for layer in there if named is None or layer in named)
    return TruncatedContext(tuple(lengths), in_order, np.stack(similarity))


def _directions(values: Float[np.ndarray, "layers n d"]) -> Float[np.ndarray, "layers n d"]:
    centred = values - values.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), np.finfo(np.float32).tiny)

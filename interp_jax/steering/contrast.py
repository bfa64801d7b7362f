"""Steering vectors from contrasts: two texts, or two collections of texts.

- `from_pair`: the difference of two texts' activations, a row a position ("activation addition": Turner et al. 2023,
  "Steering Language Models With Activation Engineering").
- `mean_difference`: between the means over two collections (Marks & Tegmark 2023; Rimsky et al. 2024, "Steering Llama 2
  via Contrastive Activation Addition").
- `principal_component`: the direction in which pairs differ most (Zou et al. 2023, "Representation Engineering").
"""

from collections.abc import Sequence

import numpy as np

from interp_jax.models.language_model import LanguageModel
from interp_jax.steering.prompts import n_begin, padded_pair
from interp_jax.steering.reading_activations import Read, activations_of, read_activations
from interp_jax.steering.steering_vector import SteeringVector

__all__ = ["from_pair", "mean_difference", "principal_component"]


def from_pair(
    language_model: LanguageModel,
    positive: str,
    negative: str,
    *,
    layer: int,
    site: str = "resid_post",
    pad: str | None = None,
    positions: tuple[int, ...] | None = None,
) -> SteeringVector:
    """The activations of one text minus those of another, position by position.

    Both texts begin with the token that begins a text, where the tokenizer has one; its position, where they agree, is
    left out.

    Args:
        language_model: the model.
        positive: what the model shall be steered to.
        negative: what it shall be steered away from.
        layer: the site's layer.
        site: the site's name.
        pad: what the shorter text is filled up with at its end, a text of one token such as " "; None if both have the
            same number of tokens.
        positions: the positions that are kept, counted as in the row; all but the beginning when None.

    Returns:
        A vector with a row a position, added at the same positions of a prompt. Its `mean()` is one direction, to be
        added everywhere.

    Raises:
        ValueError: if the lengths differ and there is no `pad`, or a position is outside the texts or named twice.
    """
    layer = language_model.layer_or_middle(layer)
    rows = padded_pair(language_model, positive, negative, pad)
    first, second = activations_of(language_model, [row.tolist() for row in rows], site=site, layer=layer)
    length = len(first)
    kept = tuple(range(n_begin(language_model), length)) if positions is None else positions
    outside = [at for at in kept if not -length <= at < length]
    if outside or not kept:
        raise ValueError(
            f"positions={kept} are not all in the texts, which have {length} tokens: "
            f"{language_model.tokenizer.readable(rows[0].tolist())}. Their positions are 0 to {length - 1}."
        )
    kept = tuple(at % length for at in kept)
    if len(set(kept)) < len(kept):
        raise ValueError(f"positions={positions} name a token of the texts' {length} twice.")
    source = f"{positive!r} minus {negative!r}" + ("" if pad is None else f", padded with {pad!r}")
    return SteeringVector((first - second)[list(kept)], layer, site, source, kept, language_model.name)


def mean_difference(
    language_model: LanguageModel,
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    layer: int,
    site: str = "resid_post",
    read: Read = "mean",
) -> SteeringVector:
    """The mean activation of texts minus that of others: one direction, to be added everywhere.

    Args:
        language_model: the model.
        positives: texts of what the model shall be steered to.
        negatives: texts of what it shall be steered away from; they need not be as many.
        layer: the site's layer.
        site: the site's name.
        read: `last`, the activation of each text's last token; `mean`, the mean over its tokens.

    Returns:
        The vector.

    Raises:
        ValueError: if there are no texts.
    """
    layer = language_model.layer_or_middle(layer)
    first, second = (
        read_activations(language_model, texts, site=site, layer=layer, read=read) for texts in (positives, negatives)
    )
    source = f"mean of {len(positives)} texts minus mean of {len(negatives)}, {_SAID[read]}"
    return SteeringVector(first.mean(axis=0) - second.mean(axis=0), layer, site, source, model=language_model.name)


def principal_component(
    language_model: LanguageModel,
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    layer: int,
    site: str = "resid_post",
    read: Read = "last",
) -> SteeringVector:
    """The direction that the differences of pairs have most in common: their first right singular vector, not centred.

    It points to the positives, and is as long as the root mean square of the differences along it.

    Args:
        language_model: the model.
        positives: texts of what the model shall be steered to.
        negatives: for each of them a text of what it shall be steered away from.
        layer: the site's layer.
        site: the site's name.
        read: which activation stands for a text, as for `mean_difference`.

    Returns:
        The vector.

    Raises:
        ValueError: if the collections are not of the same size, or all pairs are equal.
    """
    if len(positives) != len(negatives):
        raise ValueError(
            f"{len(positives)} positive and {len(negatives)} negative texts make no pairs; mean_difference needs none."
        )
    layer = language_model.layer_or_middle(layer)
    first, second = (
        read_activations(language_model, texts, site=site, layer=layer, read=read) for texts in (positives, negatives)
    )
    differences = (first - second).astype(np.float64)
    _, singular, components = np.linalg.svd(differences, full_matrices=False)
    if not singular[0]:
        raise ValueError("The two texts of every pair have equal activations, so no direction tells them apart.")
    direction = components[0] * (1 if (differences @ components[0]).sum() >= 0 else -1)
    source = f"first principal component of {len(positives)} differences of texts, {_SAID[read]}"
    direction = direction * singular[0] / np.sqrt(len(differences))
    return SteeringVector(direction, layer, site, source, model=language_model.name)


_SAID = {"last": "each text's last token", "mean": "each text's mean"}

"""Generation with a direction added to the stream, or with latents clamped: one continuation a coefficient.

All coefficients run as the rows of one batch, and direction, coefficients, prompt and temperature are arguments of one
compiled program: a sweep compiles once, and so does the next sweep with a prompt of about the same length.

Every row draws with the same random numbers, so what differs between two rows is the coefficient's doing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from interp_jax.instrument import Activation
from interp_jax.models.continue_rows import checked_settings, continue_rows, row_keys
from interp_jax.models.decoding import NonFiniteLogitsError, Place
from interp_jax.models.language_model import LanguageModel
from interp_jax.steering.edits import Edit, apply_edits, check_edits, check_strengths, places_of
from interp_jax.steering.positions import Positions, check_positions
from interp_jax.steering.prompts import begun
from interp_jax.steering.steering_vector import SteeringVector

__all__ = ["Continuation", "continuations", "finite_coefficients", "steer"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MULTIPLE = 8  # prompts are padded to a multiple of so many tokens: one program serves those of similar lengths


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What the model said with one coefficient."""

    coefficient: float
    """The strength of the edits; 0 is the unsteered model."""
    text: str
    """The continuation, without the prompt."""


def steer(
    language_model: LanguageModel,
    prompt: str | Sequence[int],
    direction: Float[Array, "width"] | Float[np.ndarray, "width"] | SteeringVector | Edit | Sequence[Any],
    *,
    layer: int | None = None,
    coefficients: Sequence[float] | None = None,
    norms: Sequence[float] | None = None,
    site: str | None = None,
    positions: Positions | None = None,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    key: Any = None,
) -> list[Continuation]:
    """Continues a prompt under an intervention, once for each of its strengths.

    Args:
        language_model: the model.
        prompt: the text to continue, after the token that begins a text where the tokenizer has one; or ids, which are
            taken as they are.
        direction: a `SteeringVector`, or plain numbers as wide as the site, added `coefficient` times; an edit, such as
            `clamp_latents` gives, at `coefficient` times its strength; or several of them, which act together.
        layer: the layer, of plain numbers.
        coefficients: the strengths; 0 gives the unsteered text.
        norms: instead of coefficients: the vector is added scaled to each of these Euclidean norms.
        site: the site's name, of plain numbers; `resid_post` when None.
        positions: where a vector is added, if not where it says itself; see `interp_jax.steering.positions`.
        max_new_tokens: how many tokens are generated at most.
        temperature: 0 picks the most likely token each time; above it, tokens are drawn from
            softmax(logits / temperature).
        key: a PRNG key, needed above temperature 0.

    Returns:
        One continuation a coefficient, in the given order.

    Raises:
        ValueError: when the prompt is empty or does not fit the context, there is no such layer or site, the direction
            is of another width or outside the prompt, a coefficient is not finite, or a place is given for what says
            itself where it acts.
        FloatingPointError: when a coefficient is so large that the logits, or the square of what is added, are not
            finite.
    """
    edits = _as_vectors(language_model, direction, layer, site, positions)
    ids = begun(language_model, prompt)
    if norms is not None:
        if coefficients is not None or len(edits) != 1 or not isinstance(edits[0], SteeringVector):
            raise ValueError("norms scales one SteeringVector, instead of coefficients; give the one or the other.")
        unit = edits[0].norm
        if not unit:
            raise ValueError("The vector is zero, and cannot be scaled to a norm.")
        coefficients = [norm / unit for norm in norms]
    strengths = finite_coefficients(coefficients)
    rows = [ids] * len(strengths)
    # The same key in every row: see the module's docstring. It is the one that `generate` gives its first prompt.
    keys = None if key is None else jnp.stack([jax.random.fold_in(key, 0)] * len(strengths))
    texts = continuations(
        language_model, rows, keys, check_edits(edits, language_model, [len(ids)]), strengths,
        max_new_tokens=max_new_tokens, temperature=temperature,
    )  # fmt: skip
    return [Continuation(float(c), text) for c, text in zip(strengths, texts, strict=True)]


def finite_coefficients(coefficients: Sequence[float] | None) -> Float[np.ndarray, "n"]:
    """Coefficients as float32, checked.

    Args:
        coefficients: the coefficients.

    Raises:
        ValueError: if there is none, or one is not finite.
    """
    if coefficients is None or not len(coefficients):
        raise ValueError("There is no coefficient; give at least one, 0 for the unsteered text.")
    for coefficient in coefficients:
        if not abs(coefficient) <= _FLOAT32_MAX:
            raise ValueError(f"The coefficient {coefficient} is not a finite float32; give a smaller number.")
    return np.asarray(coefficients, np.float32)


def continuations(
    language_model: LanguageModel,
    rows: Sequence[Sequence[int]],
    keys: Any,
    edits: tuple[Edit, ...],
    strengths: Float[np.ndarray, "batch"],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    """Rows continued, each with the edits at a strength of its own, in one compiled program.

    Args:
        language_model: the model.
        rows: the prompts as ids.
        keys: a PRNG key a row; None at temperature 0.
        edits: the edits, checked.
        strengths: one a row.
        max_new_tokens: how many tokens are generated at most.
        temperature: as for `steer`.

    Returns:
        A text a row, without the stop token.

    Raises:
        ValueError: as for `steer`.
        FloatingPointError: the logits are not finite.
    """
    settings = checked_settings(temperature, None, None, keys, language_model.stop_tokens, language_model.vocab_size)
    keys = row_keys(None, len(rows)) if keys is None else keys
    check_strengths(edits, strengths, language_model)
    scaled = tuple(edit.scaled(jnp.asarray(strengths)) for edit in edits)
    try:
        decoded = continue_rows(
            language_model, rows, keys, settings, max_new_tokens=max_new_tokens,
            intervention=Partial(_edited, scaled), places=places_of(edits), multiple=_MULTIPLE,
        )  # fmt: skip
    except NonFiniteLogitsError as error:
        raise FloatingPointError(
            f"With coefficient {strengths[error.row]:g} {language_model.name}'s logits are not finite: the edit is too "
            "large for its number format. Use a smaller coefficient."
        ) from error
    stops = settings.sampling.stop_tokens
    texts = []
    for row, n in zip(np.asarray(decoded.tokens), np.asarray(decoded.n_generated), strict=True):
        ids = row[:n].tolist()
        texts.append(language_model.tokenizer.decode(ids[:-1] if ids[-1] in stops else ids))
    return texts


def _edited(edits: tuple[Edit, ...], activation: Activation, place: Place) -> Array | None:
    return apply_edits(edits, activation, place)


def _as_vectors(
    language_model: LanguageModel, direction: Any, layer: int | None, site: str | None, positions: Positions | None
) -> list[Any]:
    """Edits and vectors, of whatever was given."""
    if positions is not None:
        check_positions(positions)
    is_numbers = not isinstance(direction, list | tuple) or any(isinstance(one, float | int) for one in direction)
    given = [direction] if is_numbers else direction
    made = []
    for one in given:
        if isinstance(one, SteeringVector):
            _check_place(one, layer, site)
            made.append(one if positions is None else one.at(positions))
        elif isinstance(one, Edit):
            _check_place(one, layer, site)
            if positions not in (None, one.positions):
                raise ValueError(
                    f"positions is {positions!r}, and an edit says itself where it acts: make it with its positions, "
                    "such as clamp_latents(..., positions=...)."
                )
            made.append(one)
        elif layer is None:
            raise ValueError(f"Which layer? Pass layer=, one of 0 to {language_model.n_layers - 1}.")
        else:
            made.append(SteeringVector(np.asarray(one), layer, site or "resid_post", "", positions))
    return made


def _check_place(one: SteeringVector | Edit, layer: int | None, site: str | None) -> None:
    """Refuses another place than the one that a vector or an edit is for."""
    for name, own, got in (("layer", one.layer, layer), ("site", one.site, site)):
        if got not in (None, own):
            kind = type(one).__name__
            raise ValueError(f"The {kind} is for {name} {own}, got {name}={got}; leave {name} out.")

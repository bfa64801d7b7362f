"""Generation with a direction added to the stream, one continuation a coefficient.

All coefficients run as the rows of one batch, and direction, coefficients, prompt and temperature are arguments of one
compiled program: a sweep compiles once, and so does the next sweep with a prompt of about the same length.

Where the direction is added, in words that `positions` takes:

- `all`: at every position. The first new token is already under its influence.
- `prompt`: at the prompt's tokens only; what is generated attends to the changed prompt.
- `generated`: at the generated tokens only. The first of them is picked from the last position of the prompt, which is
  left alone, so it is always the unsteered one.

Every row draws with the same random numbers, so what differs between two rows is the coefficient's doing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from interp_jax.instrument import Activation
from interp_jax.models.language_model import LanguageModel
from interp_jax.steering.decoding import decode
from interp_jax.steering.steering_vector import SteeringVector

__all__ = ["Continuation", "Positions", "steer"]

Positions = Literal["prompt", "generated", "all"]
"""Where a direction is added; see the module's docstring."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What the model said with one coefficient."""

    coefficient: float
    """How many times the direction was added; 0 is the unsteered model."""
    text: str
    """The continuation, without the prompt."""


@dataclasses.dataclass(frozen=True)
class _AddDirection:
    """The edit. Equal ones hash alike, so the compiled program is found again."""

    positions: Positions

    def __call__(
        self,
        activation: Activation,
        is_prompt: Bool[Array, "batch seq"],
        direction: Float[Array, "width"],
        coefficients: Float[Array, "batch"],
    ) -> Array:
        value = activation.value
        if value.ndim != 3 or value.shape[-1] != direction.shape[0]:
            raise ValueError(
                f"The direction has {direction.shape[0]} entries, but {activation.name} of layer {activation.layer} "
                f"has shape {value.shape}; expected [batch, seq, {direction.shape[0]}]. "
                "Was the direction made for another model or site?"
            )
        added = coefficients[:, None, None] * direction
        if self.positions != "all":
            added = added * (is_prompt if self.positions == "prompt" else ~is_prompt)[..., None]
        return value + added.astype(value.dtype)


def steer(
    language_model: LanguageModel,
    prompt: str,
    direction: Float[Array, "width"] | Float[np.ndarray, "width"] | SteeringVector,
    *,
    layer: int | None = None,
    coefficients: Sequence[float],
    site: str = "resid_post",
    positions: Positions = "all",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    key: Any = None,
) -> list[Continuation]:
    """Continues a prompt with `coefficient * direction` added at one site, for each coefficient.

    Args:
        language_model: the model.
        prompt: the text to continue.
        direction: what is added, in the activation's units and as wide as the site; or a `SteeringVector`, which says
            itself at which layer and site.
        layer: the site's layer. Left out with a `SteeringVector`.
        coefficients: how many times the direction is added; 0 gives the unsteered text.
        site: the site's name. Not looked at with a `SteeringVector`.
        positions: `all`, `prompt` or `generated`.
        max_new_tokens: how many tokens are generated at most.
        temperature: 0 picks the most likely token each time; above it, tokens are drawn from
            softmax(logits / temperature).
        key: a PRNG key, needed above temperature 0.

    Returns:
        One continuation a coefficient, in the given order.

    Raises:
        ValueError: when the prompt is empty or does not fit the context, there is no such layer or site, the
            direction is of another width, or a coefficient is not finite.
        FloatingPointError: when a coefficient is so large that the logits are not finite.
    """
    if isinstance(direction, SteeringVector):
        if layer is not None and layer != direction.layer:
            raise ValueError(f"The SteeringVector is for layer {direction.layer}, got layer={layer}; leave layer out.")
        layer, site, direction = direction.layer, direction.site, direction.direction
    elif layer is None:
        raise ValueError(f"Which layer? Pass layer=, one of 0 to {language_model.n_layers - 1}.")
    if layer is not None and not 0 <= layer < language_model.n_layers:
        layers = ", ".join(str(i) for i in range(language_model.n_layers))
        raise ValueError(f"{language_model.name} has no layer {layer}; its layers are {layers}.")
    if positions not in get_args(Positions):
        raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}; got {positions!r}.")
    if len(coefficients) == 0:
        raise ValueError("There is no coefficient; give at least one, 0 for the unsteered text.")
    for coefficient in coefficients:
        if not abs(coefficient) <= _FLOAT32_MAX:
            raise ValueError(f"The coefficient {coefficient} is not a finite float32; give a smaller number.")
    vector = np.asarray(direction)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ValueError(f"The direction must be one vector of finite numbers, got shape {vector.shape} or NaN in it.")
    prompt_ids = language_model.encode_prompt(prompt)
    # The same key in every row: see the module's docstring. It is the one that `generate` gives its first prompt.
    keys = None if key is None else jnp.stack([jax.random.fold_in(key, 0)] * len(coefficients))
    continuations = decode(
        language_model,
        [prompt_ids] * len(coefficients),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        keys=keys,
        intervention=_AddDirection(positions),
        intervention_args=(jnp.asarray(vector, jnp.float32), jnp.asarray(coefficients, jnp.float32)),
        sites=(site,),
        layers=(layer,),
    )
    texts = [language_model.tokenizer.decode(ids) for ids in continuations]
    return [Continuation(float(c), text) for c, text in zip(coefficients, texts, strict=True)]

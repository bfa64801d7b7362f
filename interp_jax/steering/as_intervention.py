"""Edits as an intervention of `ij.generate`, which takes several prompts, draws in more ways, and fetches sites."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from interp_jax.instrument import Activation
from interp_jax.models.decoding import Place, Places
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.transformer import Transformer
from interp_jax.steering.edits import (
    AddVector,
    ClampLatents,
    Edit,
    apply_edits,
    as_edits,
    check_edits,
    check_strengths,
    places_of,
)
from interp_jax.steering.steering_vector import SteeringVector

__all__ = ["EditsInGeneration", "as_intervention"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["edits"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class EditsInGeneration:
    """Edits that generation calls at their sites; a `decoding.SelfPlaced`."""

    edits: tuple[Edit, ...]

    @property
    def places(self) -> Places:
        """The sites that they are for."""
        return places_of(self.edits)

    def check(self, model: LanguageModel | Transformer, n_prompt: Sequence[int]) -> None:
        """Refuses edits of another model, outside a prompt, or too large; see `check_edits` and `check_strengths`."""
        check_edits(self.edits, model, n_prompt)
        check_strengths(self.edits, np.ones(1), model)

    def __call__(self, activation: Activation, place: Place) -> Array | None:
        """The value after the edits."""
        return apply_edits(self.edits, activation, place)


def as_intervention(edits: SteeringVector | Edit | Sequence[Any]) -> EditsInGeneration:
    """What `ij.generate(..., interventions=...)` takes: edits, each where it says itself, the same in every row.

    A program of `generate` serves all vectors of one place: their numbers are arguments of it. A text begins as
    `generate` has it, with a begin token only where the tokenizer has a `bos_id`; `steer` may put the token between
    documents there. To compare the two, give ids.

    Args:
        edits: a vector, which is added as it is (`as_intervention(2 * vector)`), an edit such as `clamp_latents` gives,
            or several, which act together.

    Raises:
        ValueError: if there is none, it is nothing to steer with, or it has a strength a row.
    """
    made = as_edits(edits)
    for edit in made:
        n = len(edit.strengths) if isinstance(edit, AddVector | ClampLatents) else 1
        if n != 1:
            raise ValueError(
                f"The edit of {edit.site} has {n} strengths, and ij.generate steers every row alike; give it one, or "
                "use steer(..., coefficients=...)."
            )
    return EditsInGeneration(made)

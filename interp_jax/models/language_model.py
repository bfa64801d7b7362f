"""What an experiment is given: a model ready to run, whatever library its code is from.

Steering, dashboards, splices and benchmarks take a `LanguageModel` and ask nothing else of the model. `forward` is a
pure function of `params`, so jit, grad and `interp_jax.iterate` apply to it directly; every site inside it bears the
names that the whole project uses and an int layer (None for `embed`, `final_norm` and `logits`).

Hazard: a `LanguageModel` is no pytree. Close over it, or pass `language_model.params` to a jitted function; passing
    the object
itself as an argument of a jitted function is an error.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from interp_jax.models.tokenizer import Tokenizer

__all__ = ["LanguageModel"]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model ready to run: a pure function, its parameters, its tokenizer and the few facts that experiments need."""

    name: str
    """How the model is called in tables and pages, for example `SmolLM2-135M-Instruct`."""
    forward: Callable[[Any, Int[Array, "batch seq"]], Float[Array, "batch seq vocab"]]
    """`forward(params, tokens) -> logits`, causal, every site inside."""
    params: Any
    """The parameters, a pytree of arrays."""
    tokenizer: Tokenizer
    """Text to ids and back."""
    n_layers: int
    """How many blocks; layers are numbered from 0."""
    d_model: int
    """The width of the residual stream."""
    vocab_size: int
    """The width of the logits. The tokenizer's vocabulary may be smaller, where a model pads its embedding."""
    context: int
    """The longest row of tokens that the model was made for."""
    unembed: Callable[[Any, Float[Array, "n d_model"]], Float[Array, "n vocab"]]
    """`unembed(params, directions)`: the logits that directions in the residual stream promote. The final norm's scale
    is folded in; its division by the mean square is not done, so only logits of one direction compare with each
    other."""

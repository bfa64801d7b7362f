"""What an experiment is given: a model ready to run, whatever library its code is from.

Steering, dashboards, splices and benchmarks take a `LanguageModel` and ask nothing else of the model. `forward` is a
pure function of `params`, so jit, grad and `interp_jax.iterate` apply to it directly; every site inside it bears the
names that the whole project uses and an int layer (None for `embed`, `final_norm` and `logits`).

Hazard: a `LanguageModel` is no pytree. Close over it, or pass `language_model.params` to a jitted function; passing the
object itself as an argument of a jitted function is an error.
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
    more_stop_tokens: tuple[int, ...] = ()
    """Ids at which generation stops, besides those of the tokenizer: the end of a turn, say."""

    def layer_or_middle(self, layer: int | None) -> int:
        """A layer's number, checked.

        Args:
            layer: the number; None is the middle layer.

        Raises:
            ValueError: if there is no such layer.
        """
        if layer is None:
            return self.n_layers // 2
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"{self.name} has no layer {layer}; its layers are 0 to {self.n_layers - 1}.")
        return layer

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids that stand for a prompt: its text, after the tokenizer's `bos_id` where the model expects one.

        Args:
            prompt: a text of at least one token.

        Returns:
            The ids.

        Raises:
            ValueError: when the prompt is empty.
        """
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError(
                f"The prompt {prompt!r} has no token to continue from. "
                "Give at least one, for example the end-of-text token as text."
            )
        bos_id = self.tokenizer.bos_id
        return ids if bos_id is None else [bos_id, *ids]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's `eos_id` and `end_of_text_id`, and `more_stop_tokens`."""
        found = {self.tokenizer.eos_id, self.tokenizer.end_of_text_id, *self.more_stop_tokens}
        return tuple(sorted(each for each in found if each is not None))

"""Text generation under any intervention, written as what the loop's body does at a site.

An intervention is a function of one `Activation`. It returns the value to go on with, or None to leave it alone:

    def quiet_head(activation):
        if activation.name == "attn_heads" and activation.layer == 6:
            return activation.value.at[:, :, 3].set(0.0)

It is called while the decoding step is traced, once a site, with traced values `[batch, buffer, ...]`; the buffer
holds the prompts, what has been generated and padding.

Hazard: since what an intervention closes over may have changed between two calls, a call with an intervention
compiles anew. Where only arrays vary, `steer` compiles once. Without an intervention nothing is compiled twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from interp_jax.instrument import Activation
from interp_jax.models.language_model import LanguageModel
from interp_jax.steering.decoding import decode

__all__ = ["Intervention", "generate"]

Intervention = Callable[[Activation], Any]
"""`(activation) -> value | None`."""


def generate(
    language_model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    key: Any = None,
    intervention: Intervention | None = None,
) -> list[str]:
    """Continues texts.

    Args:
        language_model: the model.
        prompts: the texts, of any lengths; each gets the tokenizer's `bos_id` in front where there is one.
        max_new_tokens: how many tokens each gets at most; it ends earlier at the end of a text.
        temperature: 0 picks the most likely token each time; above it, tokens are drawn from
            softmax(logits / temperature).
        key: a PRNG key, needed above temperature 0. Prompt i draws with `fold_in(key, i)`.
        intervention: applied at every site of every step; see the module's docstring.

    Returns:
        One continuation a prompt, without the prompt.

    Raises:
        ValueError: when a prompt is empty or does not fit the model's context, or temperature and key do not agree.
        FloatingPointError: when the intervention makes the logits infinite or NaN.
    """
    if isinstance(prompts, str):
        raise TypeError("generate takes a list of prompts, got one string; put it into a list.")
    keys = None if key is None else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jax.numpy.arange(len(prompts)))
    continuations = decode(
        language_model,
        [language_model.encode_prompt(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        keys=keys,
        # A new object each time: see the hazard above.
        intervention=None if intervention is None else lambda activation, is_prompt: intervention(activation),
    )
    return [language_model.tokenizer.decode(ids) for ids in continuations]

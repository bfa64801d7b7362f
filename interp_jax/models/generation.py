"""Generation with a cache of keys and values, in which the same interventions work as in a forward pass.

`generate` runs one compiled program: a pass over the prompts (the *prefill*), then a loop of one-token passes over the
cache (the *steps*). An intervention is a function from an `Activation` to its new value or None. It is called while the
program is traced: once a site in the prefill, where values are `[batch, prompt, ...]`, and once a site in a step, where
they are `[batch, 1, ...]`.

Arrays that an intervention closes over are constants of the program, and another function is another program, seconds
of compilation. What shall vary goes into a `jax.tree_util.Partial(function, array, ...)`: its arrays are arguments of
the program, in which the function is called as `function(array, ..., activation)`.

A model of another library has no cache here. It generates all the same, by a pass over the whole text for each token
(`uncached_decoding`); an intervention then sees `[batch, buffer, ...]` values, padded on the right. The tokens are the
same: the cache changes nothing but the time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Int, PRNGKeyArray

from interp_jax.instrument import Activation, SiteValues
from interp_jax.models.continue_rows import Prompts, as_rows, checked_rows, checked_settings, continue_rows, row_keys
from interp_jax.models.decoding import Place, SelfPlaced
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer

__all__ = ["Generation", "generate"]

Intervention = Callable[[Activation], Any]
Sites = str | Sequence[str] | None
Layers = int | Sequence[int | None] | None


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated."""

    tokens: Int[Array, "batch max_new_tokens"]
    """The new tokens, the stop token included; what stands after it is -1."""
    n_generated: Int[Array, "batch"]
    """How many there are, the stop token included."""
    stop_tokens: tuple[int, ...]
    """The ids at which a row ended."""
    tokenizer: Tokenizer | None
    """The model's, where it has one."""
    activations: SiteValues
    """For each site that was fetched, `[batch, max_new_tokens, ...]`: its value at the position from which each new
    token was predicted. The first is the prompt's last. `attn_logits` and `attn_probs` are `[batch, max_new_tokens,
    n_heads, slots]`, over the padded prompt and the new tokens. What follows a stop token means nothing."""

    def rows(self) -> list[list[int]]:
        """The new tokens of each row, without what stands after the stop token."""
        counted = zip(np.asarray(self.tokens), np.asarray(self.n_generated), strict=True)
        return [row[:n].tolist() for row, n in counted]

    def texts(self) -> list[str]:
        """What was written in each row, without the stop token.

        Raises:
            ValueError: The model was given without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "A Transformer has no tokenizer; give generate the LanguageModel, or decode rows() yourself."
            )
        rows = (row[:-1] if row and row[-1] in self.stop_tokens else row for row in self.rows())
        return [self.tokenizer.decode(row) for row in rows]


def generate(
    model: Transformer | LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    stop_tokens: Sequence[int] | None = None,
    interventions: Intervention | SelfPlaced | None = None,
    where: str = "both",
    fetch_sites: Sites = (),
    fetch_layers: Layers = None,
) -> Generation:
    """Continues prompts, a batch at a time, in one compiled program.

    Args:
        model: A `Transformer`, or a `LanguageModel`, whatever library its code is from.
        prompts: A text or texts, or token ids, a list a row; lengths may differ. A text needs a `LanguageModel` and is
            encoded by its `encode_prompt`; ids are taken as they are.
        max_new_tokens: How many to generate at most.
        temperature: What logits are divided by before sampling; 0 takes the most likely token.
        top_k: Sample among this many likeliest tokens only.
        top_p: Sample among the fewest likeliest tokens whose probabilities reach this only.
        key: Draws the tokens; needed unless the temperature is 0. A row's draw depends on its place in the batch, and
            on nothing else of the other rows.
        stop_tokens: Ids that end a row; when None, those of the model's tokenizer if it has one. `()` for none.
        interventions: From an `Activation` to its new value, or None to leave it alone. A function that is passed again
            is not traced again; nor is a `jax.tree_util.Partial` of it with other arrays. Vectors and other edits go
            in by `interp_jax.steering.as_intervention`.
        where: Whether a function acts on the prompts' positions, on those of generated tokens, or on both. Edits of
            `as_intervention` say it themselves.
        fetch_sites: Sites whose activations are given back.
        fetch_layers: Layers whose activations are given back; all when None.

    Returns:
        The tokens and what was fetched.

    Raises:
        ValueError: A prompt is empty, too long for the context or holds an id that is no token, or an argument is out
            of its range.
        FloatingPointError: The logits are not finite, which a too large edit brings about.
    """
    prompts, stop_tokens, tokenizer = as_rows(model, prompts, stop_tokens)
    vocab_size = model.vocab_size if isinstance(model, LanguageModel) else model.config.vocab_size
    settings = checked_settings(temperature, top_k, top_p, key, stop_tokens, vocab_size)
    if where not in ("prompt", "generated", "both"):
        raise ValueError(f"where={where!r}; it must be 'prompt', 'generated' or 'both'.")
    if interventions is not None and not callable(interventions):
        raise ValueError(
            f"interventions is a {type(interventions).__name__}; it must be one function from an Activation to its new "
            "value or None. Of a SteeringVector, interp_jax.steering.as_intervention makes what goes here."
        )
    places = None
    if isinstance(interventions, SelfPlaced):
        if where != "both":
            raise ValueError(f"where={where!r}, but these edits say themselves where they act; leave where out.")
        interventions.check(model, [len(row) for row in checked_rows(model, prompts, max_new_tokens)])
        places = interventions.places
        placed = Partial(_self_placed, interventions)
    elif isinstance(interventions, Partial):
        placed = Partial(_Unplaced(interventions.func), *interventions.args, **interventions.keywords)
    else:
        placed = None if interventions is None else _Unplaced(interventions)
    decoded = continue_rows(
        model, prompts, row_keys(key, len(prompts)), settings, max_new_tokens=max_new_tokens, intervention=placed,
        where=where, places=places,
        fetch_sites=(fetch_sites,) if isinstance(fetch_sites, str) else tuple(fetch_sites or ()),
        fetch_layers=(
            (fetch_layers,) if isinstance(fetch_layers, int) else None if fetch_layers is None else tuple(fetch_layers)
        ),
    )  # fmt: skip
    stops = settings.sampling.stop_tokens
    return Generation(decoded.tokens, decoded.n_generated, stops, tokenizer, decoded.activations)


def _self_placed(intervention: SelfPlaced, activation: Activation, place: Place) -> Any:
    return intervention(activation, place)


@dataclasses.dataclass(frozen=True)
class _Unplaced:
    """An intervention that does not ask where it stands. Equal ones hash alike: its program is found again."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*args[:-1], **keywords)

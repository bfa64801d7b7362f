"""A generation as an ordinary `for` loop over every site of every pass, with concrete values.

For looking, printing and branching in Python; it is as slow as eager execution is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from interp_jax.instrument import SiteValues, iterate
from interp_jax.instrument.running_pass import Loop
from interp_jax.models.cached_decoding import prefill, step
from interp_jax.models.continue_rows import Prompts, Settings, as_rows, checked_rows, checked_settings, padded, row_keys
from interp_jax.models.decoding import NonFiniteLogitsError, ends, picked, usable
from interp_jax.models.generation import Generation, Layers, Sites
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer, empty_cache

__all__ = ["GenerationStep", "RunningGeneration", "iterate_generation"]


class GenerationStep(NamedTuple):
    """One site of one pass."""

    position: int
    """How many tokens of the longest row stand before the pass's first: 0 in the prefill, then one more a token."""
    layer: int | None
    """The layer, None for the whole model's sites."""
    name: str
    """The site's name."""
    value: Any
    """`[batch, prompt, ...]` in the prefill, `[batch, 1, ...]` after it."""


class RunningGeneration(Loop):
    """Prompts being continued, to be looped over once; made by `iterate_generation`."""

    __slots__ = ("_position", "_running", "_stop_tokens", "_tokenizer")

    def __init__(
        self, model: Transformer, tokens: Any, is_token: Any, keys: Any, settings: Settings, max_new_tokens: int,
        sites: Sites, layers: Layers, tokenizer: Tokenizer | None,
    ):  # fmt: skip
        self._position, self._stop_tokens, self._tokenizer = 0, settings.sampling.stop_tokens, tokenizer

        def run() -> tuple[Array, Array]:
            batch, length = tokens.shape
            cache = empty_cache(model, batch, length + max_new_tokens)
            logits, cache = prefill(model, cache, jnp.asarray(tokens), jnp.asarray(is_token))
            _check_finite(logits[:, -1])
            drawn = [picked(logits[:, -1], keys, 0, settings.temperature, settings.top_p, settings.sampling)]
            is_done = ends(drawn[0], settings.sampling)
            new, n_generated = drawn[0][:, None], jnp.ones(batch, jnp.int32)
            for number in range(1, max_new_tokens):
                if bool(is_done.all()):
                    break
                self._position = length + number - 1
                logits, cache = step(model, cache, drawn[-1][:, None])
                _check_finite(logits[:, -1], is_done)
                drawn.append(
                    picked(logits[:, -1], keys, number, settings.temperature, settings.top_p, settings.sampling)
                )
                new = jnp.concatenate([new, jnp.where(is_done, -1, drawn[-1])[:, None]], axis=1)
                n_generated = n_generated + ~is_done
                is_done = is_done | ends(drawn[-1], settings.sampling)
            missing = max_new_tokens - new.shape[1]
            return jnp.pad(new, ((0, 0), (0, missing)), constant_values=-1), n_generated

        self._running = iterate(run, sites=sites, layers=layers)()

    def __iter__(self) -> Iterator[GenerationStep]:
        """Starts it. The loop must be the only holder of what this returns, so that `break` ends the pass."""
        for layer, name, value in self._running:
            yield GenerationStep(self._position, layer, name, value)

    @property
    def modified_value(self) -> Any:
        """What was assigned at this site. Assign to it to replace the activation; leave it alone to keep it."""
        return self._running.modified_value

    @modified_value.setter
    def modified_value(self, new: Any) -> None:
        self._running.modified_value = new

    def save(self, name: Any, value: Any) -> None:
        """Carries a value out, to `saved[name]` after the loop; a name of its own for each value."""
        self._running.save(name, value)

    @property
    def saved(self) -> dict[Any, Any]:
        """What was saved."""
        return self._running.saved

    @property
    def retval(self) -> Generation:
        """What was generated. It is there once the loop has run to its end."""
        new, n_generated = self._running.retval
        return Generation(new, n_generated, self._stop_tokens, self._tokenizer, SiteValues())


def _check_finite(logits: Array, is_done: Any = False) -> None:
    """Refuses logits from which no token can be picked, in rows that go on."""
    is_bad = ~(usable(logits) | is_done)
    if is_bad.any():
        raise NonFiniteLogitsError(int(is_bad.argmax()), len(logits), is_edited=True)


def iterate_generation(
    model: Transformer | LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    stop_tokens: Sequence[int] | None = None,
    sites: Sites = None,
    layers: Layers = None,
) -> RunningGeneration:
    """A `for` loop over every site of every pass of a generation, with concrete values.

    ```python
    for position, layer, name, value in (running := ij.iterate_generation(model, prompts, max_new_tokens=8)):
        if name == "resid_post" and layer == 3 and position > 0:  # generated tokens only
            running.modified_value = value + direction
    print(running.retval.rows())
    ```

    Args:
        model: As for `generate`.
        prompts: As for `generate`.
        max_new_tokens: As for `generate`.
        temperature: As for `generate`.
        top_k: As for `generate`.
        top_p: As for `generate`.
        key: As for `generate`; the same key draws the same tokens.
        stop_tokens: As for `generate`.
        sites: Only these names; all when None.
        layers: Only these layers; all when None.

    Returns:
        To be looped over once. `retval` is the `Generation` after the loop.

    Raises:
        ValueError: As for `generate`.
        FloatingPointError: As for `generate`; in the loop, at the end of the pass.
    """
    prompts, stop_tokens, tokenizer = as_rows(model, prompts, stop_tokens)
    transformer = model.params if isinstance(model, LanguageModel) else model
    if not isinstance(transformer, Transformer):
        raise ValueError(
            "This model runs on another library's code, which has no cache here. Load its files with "
            "ij.load(path), or use ij.generate, which needs none."
        )
    tokens, is_token = padded(checked_rows(transformer, prompts, max_new_tokens))
    settings = checked_settings(temperature, top_k, top_p, key, stop_tokens, transformer.config.vocab_size)
    keys = row_keys(key, len(tokens))
    return RunningGeneration(transformer, tokens, is_token, keys, settings, max_new_tokens, sites, layers, tokenizer)

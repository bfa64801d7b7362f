"""Generation with a cache of keys and values, in which the same interventions work as in a forward pass.

`generate` runs one compiled program: a pass over the prompts (the *prefill*), then a loop of one-token passes over the
cache (the *steps*). An intervention is a function from an `Activation` to its new value or None. It is called while the
program is traced: once a site in the prefill, where values are `[batch, prompt, ...]`, and once a site in a step, where
they are `[batch, 1, ...]`.

Arrays that an intervention closes over are constants of the program, and another function is another program, seconds
of compilation. What shall vary goes into a `jax.tree_util.Partial(function, array, ...)`: its arrays are arguments of
the program, in which the function is called as `function(array, ..., activation)`.

`iterate_generation` is the same as an ordinary `for` loop over every site of every pass, with concrete values: for
looking, printing and branching in Python. It is as slow as eager execution is.

Prompts of different lengths stand flush right, padded on the left; no token sees padding, so each row is what it would
be alone. The tokens are those that passes over the whole text would give: the cache changes nothing but the time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from interp_jax.instrument import Activation, SiteError, SiteValues, fetch, iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import KeyValueCache, Transformer, empty_cache

__all__ = ["Generation", "GenerationStep", "RunningGeneration", "generate", "iterate_generation"]

Intervention = Callable[[Activation], Any]
Prompts = str | Sequence[str] | Sequence[Sequence[int]]
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
    interventions: Intervention | None = None,
    where: str = "both",
    fetch_sites: Sites = (),
    fetch_layers: Layers = None,
) -> Generation:
    """Continues prompts, a batch at a time, in one compiled program.

    Args:
        model: A `Transformer`, or a `LanguageModel` that runs on one.
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
            is not traced again; nor is a `jax.tree_util.Partial` of it with other arrays.
        where: Whether interventions act on the prompts' positions, on those of generated tokens, or on both.
        fetch_sites: Sites whose activations are given back.
        fetch_layers: Layers whose activations are given back; all when None.

    Returns:
        The tokens and what was fetched.

    Raises:
        ValueError: A prompt is empty, too long for the context or holds an id that is no token, or an argument is out
            of its range.
    """
    prompts, stop_tokens, tokenizer = _asked(model, prompts, stop_tokens)
    model = _transformer(model)
    tokens, is_token = _padded(model, prompts, max_new_tokens)
    settings = _settings(temperature, top_k, top_p, key, stop_tokens, model.config.vocab_size)
    if where not in ("prompt", "generated", "both"):
        raise ValueError(f"where={where!r}; it must be 'prompt', 'generated' or 'both'.")
    fetched = (fetch_sites,) if isinstance(fetch_sites, str) else tuple(fetch_sites or ())
    layers = (fetch_layers,) if isinstance(fetch_layers, int) else None if fetch_layers is None else tuple(fetch_layers)
    varying, fixed = (interventions, None) if isinstance(interventions, Partial) else (None, interventions)
    out, activations = _generate(
        model, tokens, is_token, key if key is not None else jax.random.key(0), settings.temperature,
        settings.top_p, varying, max_new_tokens, settings.static, fixed, where, fetched, layers,
    )  # fmt: skip
    new, n_generated = out
    return Generation(new, n_generated, settings.static.stop_tokens, tokenizer, activations)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What decides the program."""

    is_greedy: bool
    top_k: int | None
    has_top_p: bool
    stop_tokens: tuple[int, ...]


class _Settings(NamedTuple):
    temperature: float
    top_p: float
    static: _Static


def _settings(
    temperature: float, top_k: int | None, top_p: float | None, key: Any, stop_tokens: Sequence[int], vocab: int
) -> _Settings:
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; it must be at least 0.")
    if temperature > 0 and key is None:
        raise ValueError("Sampling needs key=jax.random.key(seed); temperature=0 takes the most likely token.")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k={top_k}; it must be from 1 to the vocabulary's {vocab}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; it must be above 0 and at most 1.")
    wrong = [stop for stop in stop_tokens if not 0 <= stop < vocab]
    if wrong:
        raise ValueError(f"stop_tokens holds {wrong}; the model's tokens are 0 to {vocab - 1}.")
    return _Settings(
        temperature or 1.0, 1.0 if top_p is None else top_p,
        _Static(temperature == 0, top_k, top_p is not None, tuple(stop_tokens)),
    )  # fmt: skip


def _asked(
    model: Transformer | LanguageModel, prompts: Prompts, stop_tokens: Sequence[int] | None
) -> tuple[Sequence[Sequence[int]], Sequence[int], Tokenizer | None]:
    """Prompts as ids, stop tokens, and the tokenizer."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(model, LanguageModel):
        rows = [model.encode_prompt(each) if isinstance(each, str) else each for each in texts]
        return rows, model.stop_tokens if stop_tokens is None else stop_tokens, model.tokenizer
    if any(isinstance(each, str) for each in texts):
        raise ValueError("A Transformer has no tokenizer for texts; give generate the LanguageModel, or token ids.")
    return cast(Any, texts), stop_tokens or (), None


def _transformer(model: Transformer | LanguageModel) -> Transformer:
    if isinstance(model, LanguageModel):
        if not isinstance(model.params, Transformer):
            raise ValueError(
                f"{model.name} runs on another library's code, which has no cache here. Load its files with "
                "ij.load(path), or use interp_jax.steering, which needs none."
            )
        return model.params
    return model


def _padded(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
    config = model.config
    rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
    if not rows:
        raise ValueError("There are no prompts.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1.")
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"Prompt {i} is empty: begin it with the tokenizer's bos_id or end_of_text_id.")
        wrong = row[(row < 0) | (row >= config.vocab_size)]
        if len(wrong):
            raise ValueError(f"Prompt {i} holds {wrong[0]}; the model's tokens are 0 to {config.vocab_size - 1}.")
        if len(row) + max_new_tokens > config.context:
            raise ValueError(
                f"Prompt {i} has {len(row)} tokens; with {max_new_tokens} new ones that exceeds the context of "
                f"{config.context}."
            )
    longest = max(map(len, rows))
    tokens, is_token = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :], is_token[i, longest - len(row) :] = row, True
    return tokens, is_token


def _prefill(model: Transformer, cache: KeyValueCache, tokens: Any, is_token: Any) -> tuple[Array, KeyValueCache]:
    return model.extend(cache, tokens, is_token=is_token, last_only=True)


def _step(model: Transformer, cache: KeyValueCache, tokens: Any) -> tuple[Array, KeyValueCache]:
    return model.extend(cache, tokens)


def _instrumented(
    function: Callable[..., Any], intervention: Intervention | None, sites: tuple[str, ...], layers: Any
) -> Callable[..., tuple[Any, SiteValues]]:
    """One pass, with an intervention in it, that also gives activations as the pass carried on with them."""
    if intervention is None:
        return fetch(function, sites, layers) if sites else lambda *args: (function(*args), SiteValues())

    def run(*args: Any) -> tuple[Any, SiteValues]:
        names: set[str] = set()
        for activation in (running := iterate(function)(*args)):
            layer, name, value = activation
            names.add(name)
            new = intervention(activation)
            if new is not None:
                running.modified_value = new
            if name in sites and (layers is None or layer in layers):
                running.save((layer, name), value if new is None else running.modified_value)
        if not set(sites) <= names:
            raise SiteError(f"fetch_sites={sites} are not all there; the model's sites are {', '.join(sorted(names))}")
        return running.retval, SiteValues(running.saved)

    return run


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10, 11, 12))
def _generate(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    is_token: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    temperature: Any,
    top_p: Any,
    varying: Partial | None,
    max_new_tokens: int,
    static: _Static,
    fixed: Intervention | None,
    where: str,
    fetch_sites: tuple[str, ...],
    fetch_layers: tuple[int | None, ...] | None,
) -> tuple[Any, Any]:
    batch, length = tokens.shape
    intervention = fixed if varying is None else varying
    in_prompt, in_steps = (intervention if where != but else None for but in ("generated", "prompt"))
    prefill = _instrumented(_prefill, in_prompt, fetch_sites, fetch_layers)
    step = _instrumented(_step, in_steps, fetch_sites, fetch_layers)

    cache = empty_cache(model, batch, length + max_new_tokens)
    (logits, cache), found = prefill(model, cache, tokens, is_token)
    first = _picked(logits[:, -1], key, 0, temperature, top_p, static)
    kept = SiteValues()
    for at, value in found.items():
        value = _by_position(at[1], value)
        buffer = jnp.zeros((batch, max_new_tokens, *value.shape[2:]), value.dtype)
        kept[at] = _at_step(buffer, value[:, -1:], 0)
    new = jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first)

    def goes_on(state: Any) -> Bool[Array, ""]:
        number, _, _, _, is_done, _, _ = state
        return (number < max_new_tokens) & ~is_done.all()

    def body(state: Any) -> Any:
        number, cache, last, new, is_done, n_generated, kept = state
        (logits, cache), found = step(model, cache, last[:, None])
        kept = SiteValues({at: _at_step(kept[at], _by_position(at[1], found[at]), number) for at in kept})
        picked = _picked(logits[:, -1], key, number, temperature, top_p, static)
        new = new.at[:, number].set(jnp.where(is_done, -1, picked))
        n_generated = n_generated + ~is_done
        return number + 1, cache, picked, new, is_done | _stops(picked, static), n_generated, kept

    start = (
        jnp.ones((), jnp.int32), cache, first, new, _stops(first, static), jnp.ones(batch, jnp.int32), kept,
    )  # fmt: skip
    _, _, _, new, _, n_generated, kept = jax.lax.while_loop(goes_on, body, start)
    return (new, n_generated), kept


def _by_position(name: str, value: Array) -> Array:
    """With the axis of positions second; over what is attended to, it stands third."""
    return value.swapaxes(1, 2) if name in ("attn_logits", "attn_probs") else value


def _at_step(buffer: Array, value: Array, number: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), number, 1)


def _stops(tokens: Int[Array, "batch"], static: _Static) -> Bool[Array, "batch"]:
    return jnp.isin(tokens, jnp.asarray(static.stop_tokens, jnp.int32))


def _picked(
    logits: Float[Array, "batch vocab"], key: PRNGKeyArray, number: Any, temperature: Any, top_p: Any, static: _Static
) -> Int[Array, "batch"]:
    """The next token of each row."""
    if static.is_greedy:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if static.top_k is not None:
        least = jax.lax.top_k(logits, static.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if static.has_top_p:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # Those before which the sum has not yet reached top_p; the likeliest is always among them.
        is_in = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.where(is_in, descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, number), row))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


# ---------------------------------------------------------------- as a loop


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


class RunningGeneration:
    """Prompts being continued, to be looped over once; made by `iterate_generation`."""

    def __init__(
        self, model: Transformer, tokens: Any, is_token: Any, key: Any, settings: _Settings, max_new_tokens: int,
        sites: Sites, layers: Layers, tokenizer: Tokenizer | None,
    ):  # fmt: skip
        self._position, self._stop_tokens, self._tokenizer = 0, settings.static.stop_tokens, tokenizer

        def run() -> tuple[Array, Array]:
            batch, length = tokens.shape
            cache = empty_cache(model, batch, length + max_new_tokens)
            logits, cache = _prefill(model, cache, jnp.asarray(tokens), jnp.asarray(is_token))
            picked = [_picked(logits[:, -1], key, 0, settings.temperature, settings.top_p, settings.static)]
            is_done = _stops(picked[0], settings.static)
            new, n_generated = picked[0][:, None], jnp.ones(batch, jnp.int32)
            for number in range(1, max_new_tokens):
                if bool(is_done.all()):
                    break
                self._position = length + number - 1
                logits, cache = _step(model, cache, picked[-1][:, None])
                picked.append(
                    _picked(logits[:, -1], key, number, settings.temperature, settings.top_p, settings.static)
                )
                new = jnp.concatenate([new, jnp.where(is_done, -1, picked[-1])[:, None]], axis=1)
                n_generated = n_generated + ~is_done
                is_done = is_done | _stops(picked[-1], settings.static)
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
    """
    prompts, stop_tokens, tokenizer = _asked(model, prompts, stop_tokens)
    model = _transformer(model)
    tokens, is_token = _padded(model, prompts, max_new_tokens)
    settings = _settings(temperature, top_k, top_p, key, stop_tokens, model.config.vocab_size)
    key = jax.random.key(0) if key is None else key
    return RunningGeneration(model, tokens, is_token, key, settings, max_new_tokens, sites, layers, tokenizer)

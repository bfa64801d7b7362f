"""Sampled continuations at several strengths of an edit, many seeds each: what success is measured on.

All of them are rows of one compiled program, `batch_rows` at a time. A seed draws the same random numbers at every
strength, and for every method, so that methods are compared on equal luck.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from interp_jax.models.language_model import LanguageModel
from interp_jax.steering.edits import check_edits
from interp_jax.steering.prompts import begun
from interp_jax.steering.steer import continuations, finite_coefficients
from interp_jax.steering.vocabulary import Judge
from interp_jax.whole_file import write_whole

__all__ = ["Rollouts", "roll_out"]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Continuations by prompt, strength and seed."""

    prompts: tuple[str, ...]
    coefficients: tuple[float, ...]
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    """`texts[coefficient][prompt][seed]`, without the prompt."""

    def successes(self, judge: Judge) -> Bool[np.ndarray, "coefficients rollouts"]:
        """Whether each rollout is successful.

        Args:
            judge: from a continuation, without its prompt, to whether it is.
        """
        return np.asarray([[bool(judge(text)) for of_prompt in row for text in of_prompt] for row in self.texts])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of them as JSON, atomically.

        Args:
            path: the file.
        """
        write_whole(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rollouts":
        """Reads what `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: when it is not a file of `save`.
        """
        try:
            read = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            texts = tuple(tuple(tuple(of_prompt) for of_prompt in row) for row in read["texts"])
            return cls(tuple(read["prompts"]), tuple(read["coefficients"]), texts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no rollouts: {error!r}. Write them with Rollouts.save.") from error


def roll_out(
    language_model: LanguageModel,
    prompts: str | Sequence[str],
    edits: Any,
    *,
    coefficients: Sequence[float],
    n_seeds: int,
    key: Any,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    batch_rows: int = 128,
    advance: Callable[[int], None] = lambda _: None,
) -> Rollouts:
    """Samples continuations of each prompt at each strength.

    Args:
        language_model: the model.
        prompts: the texts to continue.
        edits: a `SteeringVector`, an edit, or several that act together.
        coefficients: the strengths; 0 is the unsteered model.
        n_seeds: how many continuations of each prompt at each strength.
        key: a PRNG key. Seed s of a prompt draws with the same numbers at every strength.
        max_new_tokens: how many tokens a continuation has at most.
        temperature: what logits are divided by before drawing.
        batch_rows: rows of a program.
        advance: told how many continuations are done.

    Returns:
        The continuations.

    Raises:
        ValueError: as for `steer`, or if there is no prompt, no seed or no key.
        FloatingPointError: as for `steer`.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts or n_seeds < 1:
        raise ValueError(f"{len(prompts)} prompts of {n_seeds} seeds are nothing to sample; give at least one of each.")
    if key is None:
        raise ValueError("Rollouts are drawn: give key=jax.random.key(seed).")
    strengths = finite_coefficients(coefficients)
    rows = [begun(language_model, prompt) for prompt in prompts]
    edits = check_edits(edits, language_model, [len(row) for row in rows])
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(len(prompts) * n_seeds))
    one_strength = [row for row in rows for _ in range(n_seeds)]
    of_all = one_strength * len(strengths)
    every_key = jnp.tile(keys, len(strengths))
    every_strength = np.repeat(strengths, len(one_strength))
    # Parts of one size, which share a program. The last is filled up with rows that are thrown away.
    size = -(-len(of_all) // -(-len(of_all) // batch_rows))
    n_missing = -len(of_all) % size
    of_all += one_strength[:1] * n_missing
    every_key = jnp.concatenate([every_key, every_key[:n_missing]])
    every_strength = np.concatenate([every_strength, every_strength[:n_missing]])
    texts: list[str] = []
    for start in range(0, len(of_all), size):
        part = slice(start, start + size)
        texts += continuations(
            language_model, of_all[part], every_key[part], edits, every_strength[part],
            max_new_tokens=max_new_tokens, temperature=temperature,
        )  # fmt: skip
        advance(min(size, len(of_all) - n_missing - start))
    texts = texts[: len(of_all) - n_missing]
    shaped = np.asarray(texts, object).reshape(len(strengths), len(prompts), n_seeds)
    nested = tuple(tuple(tuple(str(text) for text in of) for of in row) for row in shaped)
    return Rollouts(prompts, tuple(float(c) for c in strengths), nested)

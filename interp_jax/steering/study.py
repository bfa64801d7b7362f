"""A study of steering: many ways to one concept, each swept over strengths, on one figure.

The ways are those of the DeepMind interpretability team's Progress Update of April 2024 and their usual rivals. Half of
them add a vector once, at the first positions of the prompt, as the two texts of the pair had it; half add one
direction, or hold a latent, at every position. With no autoencoder, those that need one are left out.

Strengths mean the same for all that add: at 1 the added rows are as long as the model's activations usually are (the
median norm over the text), in the mean over the rows. A clamped latent is set to so many times that norm.
"""

import dataclasses
import importlib.resources
import pathlib
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from interp_jax.models.language_model import LanguageModel
from interp_jax.pursuit import PursuitEncoder
from interp_jax.sae import Autoencoder
from interp_jax.steering.contrast import from_pair, mean_difference, principal_component
from interp_jax.steering.decomposition import Decomposition, codes_of, decompose, from_latents, latent_difference
from interp_jax.steering.edits import clamp_latents
from interp_jax.steering.frontier import FrontierPoint, frontier
from interp_jax.steering.positions import Positions
from interp_jax.steering.prompts import begun, n_begin, padded_pair
from interp_jax.steering.reading_activations import activations_of
from interp_jax.steering.reading_vector import ReadVector, latent_densities, read_vector
from interp_jax.steering.rollouts import Rollouts, roll_out
from interp_jax.steering.steered_losses import steered_losses
from interp_jax.steering.steering_vector import SteeringVector
from interp_jax.steering.vocabulary import Judge, Vocabulary

__all__ = ["BUILT_IN", "Concept", "Method", "MethodResult", "Strengths", "methods_of", "run_method"]

BUILT_IN = ("anger", "wedding")
"""Concepts that come with the package."""

DENSE = 0.5
"""Latents that are active on more than this share of tokens are left out."""

_SOME_ROWS = 8
_LISTS = ("prompts", "positives", "negatives", "vocabulary")


@dataclasses.dataclass(frozen=True)
class Concept:
    """What the model shall be steered to: what a study's file holds."""

    name: str
    positive: str
    """A text of it."""
    negative: str
    """A text of its contrary, or of anything else."""
    prompts: tuple[str, ...]
    """What is continued."""
    positives: tuple[str, ...]
    """More texts of it."""
    negatives: tuple[str, ...]
    """For each of them one that is not."""
    judge: Judge
    """Which continuations are successful."""
    pad: str | None = " "
    """What the shorter of the two texts is filled up with."""

    @classmethod
    def load(cls, name: str | pathlib.Path) -> "Concept":
        """Reads a study's file.

        Args:
            name: `anger`, `wedding`, or a TOML file with the same entries as those two.

        Raises:
            ValueError: if there is no such study, or an entry is missing or wrong.
        """
        if str(name) in BUILT_IN:
            text = (importlib.resources.files("interp_jax.steering") / "studies" / f"{name}.toml").read_text("utf-8")
        else:
            path = pathlib.Path(name)
            if not path.is_file():
                raise ValueError(f"There is no study {name}; expected {', '.join(BUILT_IN)} or a TOML file of yours.")
            text = path.read_text(encoding="utf-8")
        try:
            read = tomllib.loads(text)
            lists = {entry: _texts_of(read[entry], entry, name) for entry in _LISTS}
            positive, negative = (_text_of(read[entry], entry, name) for entry in ("positive", "negative"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{name} is no TOML: {error}") from error
        except KeyError as error:
            raise ValueError(
                f"{name} has no entry {error}; a study has positive, negative, prompts, positives, negatives and "
                "vocabulary, and may have name, pad and provenance."
            ) from error
        judge = Vocabulary.of(lists.pop("vocabulary"), read.get("provenance", str(name)))
        own_name = read.get("name", pathlib.Path(name).stem)
        return cls(own_name, positive, negative, judge=judge, pad=read.get("pad"), **lists)

    def check(self, language_model: LanguageModel) -> None:
        """Refuses what would fail in the middle of a study: a pair that no prompt has room for, texts without partners.

        Args:
            language_model: the model.

        Raises:
            ValueError: if it would.
        """
        if len(self.positives) != len(self.negatives):
            raise ValueError(
                f"{self.name} has {len(self.positives)} positives and {len(self.negatives)} negatives; give each its "
                "partner."
            )
        pair = [row.tolist() for row in padded_pair(language_model, self.positive, self.negative, self.pad)]
        for prompt in self.prompts:
            length = len(begun(language_model, prompt))
            if length < len(pair[0]):
                raise ValueError(
                    f"The pair is added token by token at the front of each prompt, and has {len(pair[0])} tokens: "
                    f"{' and '.join(str(language_model.tokenizer.readable(row)) for row in pair)}. The prompt "
                    f"{prompt!r} has only {length}. Give longer prompts, or a shorter positive and negative."
                )


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to steer."""

    name: str
    edit: Any
    """A `SteeringVector` or an edit, at strength 1."""
    adds_once: bool
    """Whether it acts at some positions of the prompt, and not at every position."""
    about: str
    """What was added, in words."""
    decomposition: Decomposition | None = None
    """The latents that it is made of, where it is."""


@dataclasses.dataclass(frozen=True)
class Strengths:
    """Strengths to try, as multiples of the usual norm."""

    once: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """For what acts at some positions of the prompt."""
    everywhere: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
    """For what acts at every position."""


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What came of one way to steer."""

    method: Method
    points: tuple[FrontierPoint, ...]
    rollouts: Rollouts
    reading: ReadVector | None
    """The latents, read, where there are any."""
    losses: Float[np.ndarray, "coefficients rows"]
    """The loss of each row of text at each strength, of which the points hold means and intervals."""


def methods_of(
    concept: Concept,
    language_model: LanguageModel,
    sae: Autoencoder | None,
    tokens: Int[np.ndarray, "rows context"],
    *,
    layer: int,
    site: str = "resid_post",
    usual_norm: float,
    l0: int = 32,
    n_parts: int = 6,
) -> Iterator[Method]:
    """The ways to steer to a concept.

    Args:
        concept: the concept.
        language_model: the model.
        sae: an autoencoder of the site; None for the ways that need none.
        tokens: text on which it is told which latents are dense.
        layer: the site's layer.
        site: the site's name.
        usual_norm: how long an activation usually is.
        l0: how many latents pursuit takes for each position.
        n_parts: how many (latent, position) parts the subset keeps.
    """
    concept.check(language_model)
    place: dict[str, Any] = {"layer": layer, "site": site}
    pair = from_pair(language_model, concept.positive, concept.negative, pad=concept.pad, **place)
    yield _method("difference of the pair", pair, usual_norm)
    padding = _padding(concept, language_model, tokens, place)
    if padding is not None:
        left = pair.without(padding)
        yield _method("the same without its padding", left, usual_norm)
    mean = mean_difference(language_model, concept.positives, concept.negatives, **place)
    yield _method("mean difference", mean, usual_norm)
    principal = principal_component(language_model, concept.positives, concept.negatives, read="mean", **place)
    yield _method("principal component", principal, usual_norm)
    if sae is None:
        return
    dense = np.flatnonzero(latent_densities(language_model, sae, tokens, **place) > DENSE)
    codes = latent_difference(language_model, concept.positive, concept.negative, sae, pad=concept.pad, **place)
    sparse = codes.without(dense)
    for name, found in (
        ("SAE(positive) - SAE(negative)", codes),
        *([("the same without dense latents", sparse)] if len(sparse.parts) < len(codes.parts) else []),
        (f"its {n_parts} largest parts", sparse.top(n_parts)),
        ("the SAE of the difference", decompose(pair, sae)),
        ("gradient pursuit of the difference", decompose(pair, PursuitEncoder(sae, l0))),
    ):
        if found.parts:  # an encoder may find nothing in a difference
            yield _method(name, found.vector(), usual_norm, found)
    latent = _latent_of(concept, language_model, sae, dense, place)
    if latent is not None:
        alone = from_latents(sae, {latent: 1.0}, **place)
        one = decompose(alone, sae)
        row = dataclasses.replace(one, parts=tuple(part for part in one.parts if part.latent == latent))
        yield _method(f"latent {latent}", alone, usual_norm, row if row.parts else None)
        clamped = clamp_latents(sae, {latent: usual_norm}, **place)
        yield Method(f"latent {latent} clamped", clamped, False, f"latent {latent} set to a value at every position")


def run_method(
    method: Method,
    concept: Concept,
    language_model: LanguageModel,
    sae: Autoencoder | None,
    tokens: Int[np.ndarray, "rows context"],
    *,
    strengths: Strengths,
    n_seeds: int,
    key: Any,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    advance: Callable[[int], None] = lambda _: None,
) -> MethodResult:
    """Sweeps one way to steer over its strengths.

    Args:
        method: the way.
        concept: the concept.
        language_model: the model.
        sae: the autoencoder, for the texts of a reading.
        tokens: ordinary text, each row begun as a text is; a row's first tokens play the prompt.
        strengths: the strengths.
        n_seeds: continuations of each prompt at each strength.
        key: a PRNG key; the same for all ways, or they are compared on unequal luck.
        max_new_tokens: tokens of a continuation.
        temperature: of the draws.
        advance: told how many tokens are done, over both measures.

    Returns:
        The points, and all continuations.
    """
    coefficients = strengths.once if method.adds_once else strengths.everywhere
    rollouts = roll_out(
        language_model, concept.prompts, method.edit, coefficients=coefficients, n_seeds=n_seeds, key=key,
        max_new_tokens=max_new_tokens, temperature=temperature, advance=lambda n: advance(n * max_new_tokens),
    )  # fmt: skip
    n_prompt = max(len(begun(language_model, prompt)) for prompt in concept.prompts)
    losses = steered_losses(
        language_model, tokens, method.edit, coefficients=coefficients, n_prompt=n_prompt, advance=advance
    )
    points = frontier(method.name, coefficients, rollouts.successes(concept.judge), losses)
    reading = None
    if method.decomposition is not None:
        reading = read_vector(method.decomposition, language_model, sae=sae, tokens=tokens if sae is not None else None)
    return MethodResult(method, points, rollouts, reading, losses)


def _text_of(entry: Any, key: str, name: object) -> str:
    if not isinstance(entry, str):
        raise ValueError(f"{key} of {name} is {entry!r}; expected a text.")
    return entry


def _texts_of(entry: Any, key: str, name: object) -> tuple[str, ...]:
    if not isinstance(entry, list) or not entry or not all(isinstance(one, str) for one in entry):
        raise ValueError(f"{key} of {name} is {entry!r}; expected a list of at least one text.")
    return tuple(entry)


def _padding(
    concept: Concept, language_model: LanguageModel, tokens: Int[np.ndarray, "rows context"], place: dict[str, Any]
) -> Float[np.ndarray, "width"] | None:
    """What sets the tokens that fill up the shorter text of the pair apart from ordinary text; None where none do."""
    texts = concept.positive, concept.negative
    lengths = [len(begun(language_model, text)) for text in texts]
    if lengths[0] == lengths[1]:
        return None
    filled = padded_pair(language_model, *texts, concept.pad)[int(np.argmin(lengths))].tolist()
    *ordinary, last = activations_of(language_model, [*tokens[:_SOME_ROWS].tolist(), filled], **place)
    usual = np.concatenate([value[n_begin(language_model) :] for value in ordinary]).mean(axis=0)
    return last[min(lengths) :].mean(axis=0) - usual


def _method(name: str, vector: SteeringVector, usual_norm: float, decomposition: Decomposition | None = None) -> Method:
    """A way that adds a vector, scaled so that its rows are in the mean as long as activations are."""
    length = float(np.linalg.norm(vector.rows, axis=1).mean())
    scaled = vector * (usual_norm / length) if length else vector
    positions: Positions | None = vector.positions
    return Method(name, scaled, not isinstance(positions, str), vector.source, decomposition)


def _latent_of(
    concept: Concept,
    language_model: LanguageModel,
    sae: Autoencoder,
    dense: Sequence[int] | Int[np.ndarray, "n"],
    place: dict[str, Any],
) -> int | None:
    """The latent that tells a concept's texts from the others best; of those that do it equally, the most active one.

    It is the one that is active in the most texts of the concept and the fewest others.
    """
    shares, means = [], []
    for texts in (concept.positives, concept.negatives):
        values = activations_of(language_model, [begun(language_model, text) for text in texts], **place)
        own = [value[n_begin(language_model) :] for value in values]
        codes = np.asarray(codes_of(sae, jnp.asarray(np.concatenate(own))))
        of_texts = np.split(codes, np.cumsum([len(value) for value in own])[:-1])
        shares.append(np.mean([(of > 0).any(axis=0) for of in of_texts], axis=0))
        means.append(codes.mean(axis=0))
    difference: Float[np.ndarray, "d_sae"] = shares[0] - shares[1]
    difference[np.asarray(dense, int)] = 0
    best = int(np.lexsort((means[0] - means[1], difference))[-1])
    return best if difference[best] > 0 else None

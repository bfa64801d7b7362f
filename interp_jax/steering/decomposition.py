"""A steering vector written in the latents of a dictionary: to read it, to keep the parts that mean something.

Three ways to one:

- `decompose(vector, sae)`: what the dictionary makes of the vector itself. With an autoencoder these are its encoder's
  codes, which no training has prepared for a difference of activations; with a `PursuitEncoder` the encoder is not
  asked. The vector is taken as it is, without the decoder's bias, and encoders are not linear: a short vector
  may activate nothing where a longer one does (`vector.to_norm`).
- `latent_difference(model, positive, negative, sae)`: codes of one text minus those of another, position by position.
- `from_latents(sae, {latent: code})`: chosen by hand.

Then `top`, `only` and `without` choose parts, and `vector` puts them together again.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.models.language_model import LanguageModel
from interp_jax.sae import Autoencoder
from interp_jax.steering.positions import Positions
from interp_jax.steering.prompts import n_begin, padded_pair
from interp_jax.steering.reading_activations import activations_of
from interp_jax.steering.steering_vector import SteeringVector

__all__ = ["Decomposition", "LatentPart", "codes_of", "decompose", "dictionary_of", "from_latents", "latent_difference"]


@dataclasses.dataclass(frozen=True)
class LatentPart:
    """One latent in one row of a vector."""

    latent: int
    row: int
    """Which of the vector's rows, from 0: of one position each, or the only one."""
    code: float
    """How much of the latent's decoder row is in it; negative where it is taken away."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decomposition:
    """Parts, each a latent's code in a row of a vector, and what they leave over."""

    parts: tuple[LatentPart, ...]
    """Only those that are not zero, in no order that means anything."""
    dictionary: Float[np.ndarray, "d_sae width"]
    """Decoder rows."""
    original: SteeringVector
    """What was decomposed; it says where it is added."""

    def vector(self) -> SteeringVector:
        """The parts put together: the sum of code times decoder row, without what was left over."""
        rows = np.zeros_like(self.original.rows)
        for part in self.parts:
            rows[part.row] += np.float32(part.code) * self.dictionary[part.latent]
        direction = rows if self.original.direction.ndim == 2 else rows[0]
        source = f"{len(self.parts)} parts of {self.n_latents} latents of ({self.original.source})"
        return dataclasses.replace(self.original, direction=direction, source=source)

    @property
    def n_latents(self) -> int:
        """How many latents occur."""
        return len({part.latent for part in self.parts})

    @property
    def share_explained(self) -> float:
        """1 - |vector - parts|^2 / |vector|^2: 1 where the parts are all of it; below 0 where nothing would be nearer.

        NaN where the original is zero.
        """
        original = self.original.rows
        whole = float(np.sum(original**2))
        return 1 - float(np.sum((original - self.vector().rows) ** 2)) / whole if whole else float("nan")

    def top(self, count: int) -> "Decomposition":
        """The (latent, position) parts that contribute the longest vectors.

        Args:
            count: how many.
        """
        norms = np.linalg.norm(self.dictionary, axis=1)
        ranked = sorted(self.parts, key=lambda part: -abs(part.code) * norms[part.latent])
        return dataclasses.replace(self, parts=tuple(ranked[:count]))

    def only(self, chosen: Iterable[int | tuple[int, int]]) -> "Decomposition":
        """Hand-picked parts.

        Args:
            chosen: latents, at all positions; or (latent, row) pairs.

        Raises:
            ValueError: if one is not among the parts.
        """
        chosen = set(chosen)
        kept = tuple(p for p in self.parts if p.latent in chosen or (p.latent, p.row) in chosen)
        there = {part.latent for part in kept} | {(part.latent, part.row) for part in kept}
        missing = [one for one in chosen if one not in there]
        if missing:
            raise ValueError(
                f"{missing[0]} is not among the {len(self.parts)} parts of {self.original.source or 'this vector'}; "
                "its table shows which latents are, and at which rows."
            )
        return dataclasses.replace(self, parts=kept)

    def without(self, latents: Collection[int] | Int[np.ndarray, "_n"]) -> "Decomposition":
        """All parts but those of some latents, dense ones for instance.

        Args:
            latents: the latents; those that do not occur are passed over.
        """
        left_out = {int(latent) for latent in latents}
        return dataclasses.replace(self, parts=tuple(part for part in self.parts if part.latent not in left_out))


def decompose(vector: SteeringVector, sae: Autoencoder) -> Decomposition:
    """What a dictionary makes of a vector, row by row.

    Args:
        vector: the vector.
        sae: an autoencoder of the same site, or a `PursuitEncoder`.

    Returns:
        Its parts, none of them negative. What they leave over may be large.

    Raises:
        ValueError: if the autoencoder is for another width.
    """
    _check_width(vector.width, sae)
    bias = sae.decode(jnp.zeros(sae.d_sae))
    codes = np.asarray(codes_of(sae, jnp.asarray(vector.rows) + bias))
    return Decomposition(_parts(codes), dictionary_of(sae), vector)


def latent_difference(
    language_model: LanguageModel,
    positive: str,
    negative: str,
    sae: Autoencoder,
    *,
    layer: int,
    site: str = "resid_post",
    pad: str | None = None,
) -> Decomposition:
    """The codes of one text minus those of another, at each position.

    Args:
        language_model: the model.
        positive: what the model shall be steered to.
        negative: what it shall be steered away from.
        sae: the autoencoder of that site, or a `PursuitEncoder`.
        layer: the site's layer.
        site: the site's name.
        pad: as for `from_pair`.

    Returns:
        Its parts; the original is the difference of the activations.

    Raises:
        ValueError: as `from_pair`, or if the autoencoder is for another width.
    """
    layer = language_model.layer_or_middle(layer)
    rows = padded_pair(language_model, positive, negative, pad)
    first, second = activations_of(language_model, [row.tolist() for row in rows], site=site, layer=layer)
    _check_width(first.shape[1], sae)
    start = n_begin(language_model)
    codes = [np.asarray(codes_of(sae, jnp.asarray(values[start:]))) for values in (first, second)]
    source = f"codes of {positive!r} minus codes of {negative!r}" + ("" if pad is None else f", padded with {pad!r}")
    positions = tuple(range(start, len(first)))
    original = SteeringVector((first - second)[start:], layer, site, source, positions, language_model.name)
    return Decomposition(_parts(codes[0] - codes[1]), dictionary_of(sae), original)


def from_latents(
    sae: Autoencoder,
    codes: dict[int, float],
    *,
    layer: int | None,
    site: str = "resid_post",
    positions: Positions = "all",
) -> SteeringVector:
    """A vector of hand-picked latents: the sum of their decoder rows, each of length 1 and times its code.

    Args:
        sae: the autoencoder.
        codes: for each latent how much of it, in the activation's units; the size of the latent's usual activation is
            where to start.
        layer: the site's layer.
        site: the site's name.
        positions: where it is added; see `positions`.

    Raises:
        ValueError: if a latent does not exist, or has no direction.
    """
    dictionary = dictionary_of(sae)
    wrong = [latent for latent in codes if not 0 <= latent < len(dictionary)]
    if wrong or not codes:
        raise ValueError(f"The latents are {list(codes)}; expected at least one of 0 to {len(dictionary) - 1}.")
    direction = np.zeros(dictionary.shape[1], np.float32)
    for latent, code in codes.items():
        norm = float(np.linalg.norm(dictionary[latent]))
        if not norm:
            raise ValueError(f"The decoder row of latent {latent} is zero; it has no direction.")
        direction += np.float32(code / norm) * dictionary[latent]
    named = " + ".join(f"{code:g} * latent {latent}" for latent, code in codes.items())
    return SteeringVector(direction, layer, site, named, positions)


@jax.jit
def codes_of(sae: Autoencoder, values: Float[Array, "rows width"]) -> Float[Array, "rows d_sae"]:
    """Codes of activations; compiled once a shape."""
    return sae.encode(values)


def dictionary_of(sae: Autoencoder) -> Float[np.ndarray, "d_sae width"]:
    """Decoder rows of any autoencoder, or of a pursuit's: what each latent adds to the decoded code.

    Args:
        sae: the autoencoder.
    """
    inner: Any = getattr(sae, "sae", sae)  # a pursuit's own autoencoder
    return np.asarray(inner.W_dec[...], np.float32)


def _parts(codes: Float[np.ndarray, "rows d_sae"]) -> tuple[LatentPart, ...]:
    rows, latents = np.nonzero(codes)
    return tuple(
        LatentPart(int(latent), int(row), float(codes[row, latent])) for row, latent in zip(rows, latents, strict=True)
    )


def _check_width(width: int, sae: Autoencoder) -> None:
    if (sae.d_in, sae.d_out) != (width, width):
        raise ValueError(
            f"The autoencoder reads {sae.d_in} and writes {sae.d_out} numbers; the vector has {width}. Take the one "
            "that was trained on the vector's site and layer."
        )

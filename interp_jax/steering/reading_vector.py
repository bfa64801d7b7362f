"""Reading a steering vector: the latents it is made of as a table, a latent a row."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.top_windows import top_windows
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.promoted_tokens import promoted_tokens
from interp_jax.sae import Autoencoder, evaluate
from interp_jax.steering.decomposition import Decomposition, dictionary_of
from interp_jax.steering.reading_activations import activations_of

__all__ = ["LatentRow", "ReadVector", "latent_densities", "read_vector"]

_BATCH = 8


@dataclasses.dataclass(frozen=True)
class LatentRow:
    """What one latent contributes."""

    latent: int
    code: float
    """Its codes summed over the rows of the vector; negative where it is taken away."""
    share: float
    """Its share of the sum of absolute codes (the L1)."""
    cosine: float
    """Cosine of its decoder row with the vector, with the mean over rows where there are several."""
    promoted: tuple[str, ...]
    """The tokens whose logits its direction raises most, of those that occur in the text where there is one; empty
    unless it stands in the residual stream."""
    texts: tuple[str, ...]
    """Where it is most active in a text, the peak's token in «»."""


@dataclasses.dataclass(frozen=True)
class ReadVector:
    """A decomposition as it is read: printed, it is a table."""

    rows: tuple[LatentRow, ...]
    """The latents with the largest shares, the largest first."""
    share_explained: float
    """How much of the vector all of its parts explain; see `Decomposition.share_explained`."""
    n_latents: int
    """How many latents have a part in it."""
    source: str
    """Where the vector came from."""

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.n_latents} latents, which explain {self.share_explained:.1%} of it",
            f"{'latent':>7} {'code':>9} {'share':>6} {'cosine':>6}  promoted; most active on",
        ]
        for row in self.rows:
            said = " ".join(repr(token) for token in row.promoted[:5])
            if row.texts:
                said += "; " * bool(said) + row.texts[0]
            lines.append(f"{row.latent:7d} {row.code:9.3f} {row.share:6.1%} {row.cosine:6.2f}  {said}")
        return "\n".join(lines)


def read_vector(
    decomposition: Decomposition,
    language_model: LanguageModel,
    *,
    sae: Autoencoder | None = None,
    tokens: Int[np.ndarray, "rows context"] | None = None,
    count: int = 10,
    n_texts: int = 3,
    n_promoted: int = 8,
) -> ReadVector:
    """A decomposition as a table.

    Args:
        decomposition: what is read.
        language_model: the model.
        sae: the autoencoder, where texts are wanted.
        tokens: rows of a text to look for activations in, where texts are wanted.
        count: how many latents.
        n_texts: how many texts a latent.
        n_promoted: how many promoted tokens a latent; with `tokens`, among those that occur there. A vocabulary has
            many that training hardly ever saw, and they crowd every list.

    Returns:
        The latents of the largest shares.

    Raises:
        ValueError: if only one of `sae` and `tokens` is given, or the vector is of another model or was not decomposed
            in `sae`.
    """
    if (sae is None) != (tokens is None):
        raise ValueError("Texts need both sae and tokens: give both, or neither.")
    if decomposition.original.model not in ("", language_model.name):
        raise ValueError(
            f"The vector is of {decomposition.original.model}'s activations, and this is {language_model.name}: its "
            "latents say nothing here."
        )
    if sae is not None and not np.array_equal(dictionary_of(sae), decomposition.dictionary):
        raise ValueError("The vector was decomposed in another dictionary; give the sae that it was decomposed in.")
    codes: dict[int, float] = {}
    weights: dict[int, float] = {}
    for part in decomposition.parts:
        codes[part.latent] = codes.get(part.latent, 0.0) + part.code
        weights[part.latent] = weights.get(part.latent, 0.0) + abs(part.code)
    whole = sum(weights.values()) or 1.0
    latents = sorted(weights, key=lambda latent: -weights[latent])[:count]
    mean = decomposition.original.rows.mean(axis=0)
    directions = decomposition.dictionary[latents]
    lengths = np.linalg.norm(directions, axis=1) * np.linalg.norm(mean)
    cosines = directions @ mean / np.where(lengths > 0, lengths, 1)
    promoted: list[tuple[str, ...]] = [()] * len(latents)
    if latents and _is_stream(decomposition, language_model):
        among = None if tokens is None else np.unique(tokens)
        found = promoted_tokens(language_model, directions, count=n_promoted, among=among)
        promoted = [tuple(one.token for one in up) for up, _ in found]
    texts: list[tuple[str, ...]] = [()] * len(latents)
    if latents and sae is not None and tokens is not None:
        original = decomposition.original
        active = _activations(language_model, sae, tokens, latents, original.site, original.layer)
        texts = [_texts(language_model, tokens, active[..., i], n_texts) for i in range(len(latents))]
    rows = tuple(
        LatentRow(latent, codes[latent], weights[latent] / whole, float(cosine), *said)
        for latent, cosine, *said in zip(latents, cosines, promoted, texts, strict=True)
    )
    source = decomposition.original.source or "a vector"
    return ReadVector(rows, decomposition.share_explained, decomposition.n_latents, source)


def latent_densities(
    language_model: LanguageModel,
    sae: Autoencoder,
    tokens: Int[np.ndarray, "rows context"],
    *,
    layer: int | None,
    site: str = "resid_post",
) -> Float[np.ndarray, "d_sae"]:
    """On which share of a text's tokens each latent is active; a row's first token is not counted.

    Latents that are active on more than half of all tokens are called dense. They say little about any one token, and
    are large in every difference of activations: `decomposition.without(np.flatnonzero(densities > 0.5))`.

    Args:
        language_model: the model.
        sae: the autoencoder.
        tokens: the text.
        layer: the site's layer.
        site: the site's name.
    """
    batches = (values[:, 1:].reshape(-1, values.shape[-1]) for values in _batches(language_model, tokens, site, layer))
    return evaluate(sae, batches).density


def _batches(
    language_model: LanguageModel, tokens: Int[np.ndarray, "rows context"], site: str, layer: int | None
) -> Iterator[Float[np.ndarray, "batch context width"]]:
    for start in range(0, len(tokens), _BATCH):
        rows = tokens[start : start + _BATCH].tolist()
        yield np.stack(activations_of(language_model, rows, site=site, layer=layer))


@jax.jit
def _codes_of(
    sae: Autoencoder, values: Float[Array, "rows context width"], latents: Int[Array, "latents"]
) -> Float[Array, "rows context latents"]:
    return sae.encode(values)[..., latents].at[:, 0].set(0.0)


def _activations(
    language_model: LanguageModel,
    sae: Autoencoder,
    tokens: Int[np.ndarray, "rows context"],
    latents: list[int],
    site: str,
    layer: int | None,
) -> Float[np.ndarray, "rows context latents"]:
    found = []
    for start in range(0, len(tokens), _BATCH):
        values = np.stack(
            activations_of(language_model, tokens[start : start + _BATCH].tolist(), site=site, layer=layer)
        )
        found.append(np.asarray(_codes_of(sae, jnp.asarray(values), jnp.asarray(latents))))
    return np.concatenate(found)


def _texts(
    language_model: LanguageModel,
    tokens: Int[np.ndarray, "rows context"],
    codes: Float[np.ndarray, "rows context"],
    n: int,
) -> tuple[str, ...]:
    said = []
    for row, start, stop, peak in top_windows(codes, count=n, before=8, after=3):
        shown = language_model.tokenizer.readable(tokens[row, start:stop].tolist())
        shown[peak - start] = f"«{shown[peak - start]}»"
        said.append("".join(shown))
    return tuple(said)


def _is_stream(decomposition: Decomposition, language_model: LanguageModel) -> bool:
    """Whether its directions stand in the residual stream, of which the unembedding reads."""
    sites = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    return decomposition.original.site in sites and decomposition.dictionary.shape[1] == language_model.d_model

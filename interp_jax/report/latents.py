"""From codes to dashboards: where latents are most active, and what their directions promote.

All of it is plain NumPy but for one unembedding of a few directions. Activations come in as a dense `[rows, context,
latents]` array of the few latents that are shown, never of the whole dictionary.

How a latent's snippets are chosen: the peak of each row of tokens stands for the row, and the rows with the highest
peaks are shown. A document that a latent likes therefore does not fill the list with itself, as it would if positions
were ranked.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.models.language_model import LanguageModel
from interp_jax.report.demo_report import LatentDashboard, Snippet, TokenLogit

__all__ = ["choose_latents", "latent_dashboards", "promoted_tokens", "top_windows"]


def choose_latents(
    densities: Float[np.ndarray, "d_sae"],
    count: int,
    *,
    seed: int = 0,
    min_density: float = 0.0,
    max_density: float = 0.1,
) -> Int[np.ndarray, "chosen"]:
    """Draws latents to show, uniformly from those that are alive and not always on: a sample, not a selection of
    pretty ones.

    Args:
        densities: share of tokens on which each latent is active.
        count: how many are wanted.
        seed: seeds the draw.
        min_density: latents at or below it are left out; 0 leaves out the dead ones.
        max_density: latents above it are left out.

    Returns:
        At most `count` indices, rising; fewer where fewer qualify.
    """
    alive = np.flatnonzero((densities > min_density) & (densities <= max_density))
    drawn = np.random.default_rng(seed).choice(alive, size=min(count, len(alive)), replace=False)
    return np.sort(drawn)


def top_windows(
    activations: Float[np.ndarray, "rows context"], *, count: int = 6, before: int = 14, after: int = 8
) -> list[tuple[int, int, int, int]]:
    """Where one latent is most active, one place a row of tokens.

    Args:
        activations: the latent's activation on every token.
        count: how many places are wanted.
        before: tokens shown before the peak.
        after: tokens shown after it.

    Returns:
        (row, start, stop, peak) for each place, highest peak first; ties go to the earlier row and position. Rows
        on which the latent is not active are left out, so there may be fewer than `count`.
    """
    if activations.size == 0:
        return []
    positions = activations.argmax(axis=1)
    peaks = activations[np.arange(len(activations)), positions]
    rows = [row for row in np.argsort(-peaks, kind="stable")[:count] if peaks[row] > 0]
    context = activations.shape[1]
    return [
        (int(row), max(0, int(p) - before), min(context, int(p) + after + 1), int(p))
        for row, p in ((row, positions[row]) for row in rows)
    ]


def promoted_tokens(
    language_model: LanguageModel,
    directions: Float[Array, "n d_model"] | Float[np.ndarray, "n d_model"],
    *,
    count: int = 10,
    among: Int[np.ndarray, "ids"] | None = None,
) -> list[tuple[tuple[TokenLogit, ...], tuple[TokenLogit, ...]]]:
    """The tokens whose logits directions in the residual stream raise and lower most, straight through the unembedding.

    Args:
        language_model: the model whose unembedding is used.
        directions: one row a direction.
        count: how many tokens each way.
        among: the ids that may be named; all when None. A large vocabulary has tokens that training hardly ever saw,
            and they crowd every list: pass those that occur in a text.

    Returns:
        For each direction (promoted, suppressed), the strongest first. Ids that the model's padded vocabulary has and
        the tokenizer lacks are left out.
    """
    tokenizer = language_model.tokenizer
    logits = np.asarray(language_model.unembed(language_model.params, jnp.asarray(directions)), np.float32)
    named = np.arange(tokenizer.vocab_size) if among is None else np.asarray(among)
    logits = logits[:, named]
    count = min(count, logits.shape[1])
    found = []
    for row in logits:
        order = np.argsort(row, kind="stable")
        ends = (order[::-1][:count], order[:count])
        found.append(
            tuple(
                tuple(
                    TokenLogit(token, float(row[i]))
                    for token, i in zip(tokenizer.readable(named[ids].tolist()), ids, strict=True)
                )
                for ids in ends
            )
        )
    return found


def latent_dashboards(
    language_model: LanguageModel,
    tokens: Int[np.ndarray, "rows context"],
    activations: Float[np.ndarray, "rows context latents"],
    latents: Sequence[int] | Int[np.ndarray, "latents"],
    directions: Float[Array, "latents d_model"] | Float[np.ndarray, "latents d_model"],
    *,
    snippets: int = 6,
    before: int = 14,
    after: int = 8,
    promoted: int = 10,
) -> tuple[LatentDashboard, ...]:
    """The dashboards of a few latents. Promoted and suppressed tokens are named among those that occur in the text.

    Args:
        language_model: the model, for its tokenizer and unembedding.
        tokens: the text, as ids.
        activations: the latents' activations on it, not negative.
        latents: their indices in the dictionary.
        directions: their decoder rows, in the residual stream.
        snippets: how many texts are shown a latent.
        before: tokens shown before the peak.
        after: tokens shown after it.
        promoted: how many promoted and suppressed tokens are shown.

    Returns:
        One dashboard a latent, in the given order.

    Raises:
        ValueError: when the shapes do not agree.
    """
    tokens, activations = np.asarray(tokens), np.asarray(activations)
    latents = [int(latent) for latent in latents]
    if activations.shape != (*tokens.shape, len(latents)) or len(directions) != len(latents):
        raise ValueError(
            f"Tokens {tokens.shape}, activations {activations.shape}, {len(latents)} latents and {len(directions)} "
            "directions do not fit together; expected activations [rows, context, latents], here "
            f"{(*tokens.shape, len(latents))}."
        )
    dashboards = []
    for i, (latent, (up, down)) in enumerate(
        zip(latents, promoted_tokens(language_model, directions, count=promoted, among=np.unique(tokens)), strict=True)
    ):
        codes = activations[..., i]
        shown = tuple(
            Snippet(
                tokens=tuple(language_model.tokenizer.readable(tokens[row, start:stop].tolist())),
                activations=tuple(float(a) for a in codes[row, start:stop]),
                peak=peak - start,
            )
            for row, start, stop, peak in top_windows(codes, count=snippets, before=before, after=after)
        )
        dashboards.append(
            LatentDashboard(
                latent=latent,
                density=float((codes > 0).mean()) if codes.size else 0.0,
                max_activation=float(codes.max(initial=0.0)),
                snippets=shown,
                promoted=up,
                suppressed=down,
            )
        )
    return tuple(dashboards)

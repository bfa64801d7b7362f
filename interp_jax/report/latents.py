"""From codes to dashboards: where latents are most active, and what their directions promote.

All of it is plain NumPy but for one unembedding of a few directions. Activations come in as a dense `[rows, context,
latents]` array of the few latents that are shown, never of the whole dictionary.

How a latent's snippets are chosen: the peak of each row of tokens stands for the row, and the rows with the highest
peaks are shown. A document that a latent likes therefore does not fill the list with itself, as it would if positions
were ranked.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.top_windows import top_windows
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.promoted_tokens import promoted_tokens
from interp_jax.report.demo_report import LatentDashboard, Snippet

__all__ = ["choose_latents", "latent_dashboards"]


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
    of_latents = len(latents), language_model.d_model
    if activations.shape != (*tokens.shape, len(latents)) or np.shape(directions) != of_latents:
        raise ValueError(
            f"Tokens {tokens.shape}, activations {activations.shape}, {len(latents)} latents and directions "
            f"{np.shape(directions)} do not fit together; expected activations [rows, context, latents], here "
            f"{(*tokens.shape, len(latents))}, and directions {of_latents}."
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

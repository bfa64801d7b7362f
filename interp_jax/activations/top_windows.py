"""Where in a text a latent is most active."""

import numpy as np
from jaxtyping import Float

__all__ = ["top_windows"]


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

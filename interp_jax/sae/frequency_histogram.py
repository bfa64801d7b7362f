"""How often latents are active: a histogram over orders of magnitude.

Frequencies of a healthy dictionary lie between 1e-5 and 1e-1; latents that are never active cost memory, and a heap of
latents below 1e-5 or 1e-4 is the ultra-low-density cluster of Bricken et al., "Towards monosemanticity", 2023, which
means little. The edges of the bins are the same for all dictionaries, so histograms can be laid over one another.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

__all__ = ["FrequencyHistogram", "frequency_histogram", "share_below"]

_BINS_PER_DECADE = 4


@dataclasses.dataclass(frozen=True)
class FrequencyHistogram:
    """Numbers of latents by the logarithm of their frequency; plain numbers, so `dataclasses.asdict` of it is JSON."""

    log10_edges: tuple[float, ...]
    """Edges of the bins, four a decade: they start with the decade of the rarest active latent and end with 0, where a
    latent is active in every row. A bin holds its lower edge; the last one holds both."""
    counts: tuple[int, ...]
    """Latents in each bin, one bin fewer than there are edges."""
    never: int
    """Latents that were never active, which are in no bin."""


def frequency_histogram(frequencies: Float[np.ndarray, "d_sae"]) -> FrequencyHistogram:
    """Counts latents by how often they are active.

    Args:
        frequencies: share of the rows in which each latent is active, as `Evaluation.density`.

    Raises:
        ValueError: if a frequency is not within 0..1.
    """
    if not np.all((frequencies >= 0) & (frequencies <= 1)):
        raise ValueError(
            f"frequencies lie between {np.min(frequencies)} and {np.max(frequencies)}; expected shares of the rows, 0 "
            "to 1. Divide counts by the number of rows."
        )
    active = np.log10(frequencies[frequencies > 0])
    decades = max(1, -math.floor(active.min())) if active.size else 1
    edges = np.linspace(-decades, 0, decades * _BINS_PER_DECADE + 1)
    return FrequencyHistogram(
        log10_edges=tuple(edges.tolist()),
        counts=tuple(np.histogram(active, edges)[0].tolist()),
        never=int(np.sum(frequencies == 0)),
    )


def share_below(frequencies: Float[np.ndarray, "d_sae"], limit: float) -> float:
    """The share of the latents that are active in less than a share of the rows, those that never are among them.

    Args:
        frequencies: share of the rows in which each latent is active.
        limit: the share of the rows. In n rows nothing is seen between never and 1 / n.
    """
    return float(np.mean(frequencies < limit))

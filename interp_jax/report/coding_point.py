"""One dictionary with one way of coding, as it was measured."""

import dataclasses

__all__ = ["CodingPoint"]


@dataclasses.dataclass(frozen=True)
class CodingPoint:
    """A dictionary with a way of coding, as it was measured."""

    dictionary: str
    way: str
    l0: float
    """Latents a token, as they came out."""
    fvu: float
    """Fraction of variance unexplained."""
    loss: float
    """The model's, in nats a token, with the activation replaced."""
    recovered: float
    """Share of the zero ablation's loss that is recovered."""

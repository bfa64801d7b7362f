"""What drawings on a white ground have in common: figures that become PNG files, with labels taken as they are."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from interp_jax.report.picture import Picture

__all__ = ["as_picture", "drawing", "shortened", "wrapped"]

_STYLE: dict[Any, Any] = {"text.parse_math": False, "font.size": 9}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """While figures are made and saved: a dollar in a token is a dollar, a character that no font has is a box."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        yield


def as_picture(figure: Figure) -> Picture:
    """A figure as PNG; within `drawing`.

    Args:
        figure: what was drawn.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return Picture(file.getvalue(), "png")


def shortened(label: str, most: int = 24) -> str:
    """A label that fits beside a picture.

    Args:
        label: the whole of it.
        most: characters that there is room for.
    """
    return label if len(label) <= most else label[: most - 1] + "…"


def wrapped(title: str, inches: float) -> str:
    """A title in as many lines as it takes. Matplotlib's own wrapping would read a $ in it as the start of a formula.

    Args:
        title: in letters of nine points.
        inches: how wide the figure is.
    """
    return "\n".join(textwrap.fill(line, int(14 * inches)) for line in title.splitlines())

"""Annotations: those of jaxtyping, of which gemma reads the dimensions. Nothing is checked at run time."""

from collections.abc import Callable
from typing import Any

import jax
import jaxtyping


class _OfArrays:
    def __init__(self, dtype: Any):
        self._dtype = dtype

    def __getitem__(self, dimensions: str) -> Any:
        return self._dtype[jax.Array, dimensions]


Array = _OfArrays(jaxtyping.Shaped)
Bool = _OfArrays(jaxtyping.Bool)
Float = _OfArrays(jaxtyping.Float)
Int = _OfArrays(jaxtyping.Int)
UInt8 = _OfArrays(jaxtyping.UInt8)
PRNGKey = PRNGKeyLike = Any
PyTree = jaxtyping.PyTree


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    return function

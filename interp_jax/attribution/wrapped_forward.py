"""Forward passes around another one, which change it on the way and leave its last steps alone.

`knocked_out` and `with_latents` give such models. What reads only the final steps, or the sites of the model itself,
goes to the pass beneath: a knockout's own takes prompts of one length alone.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

__all__ = ["WrappedForward", "innermost"]


@runtime_checkable
class WrappedForward(Protocol):
    """A forward pass around another one."""

    def beneath(self, params: Any) -> tuple[Callable[..., Any], Any]:
        """The pass inside, and its part of the parameters."""
        ...


def innermost(forward: Callable[..., Any], params: Any) -> tuple[Callable[..., Any], Any]:
    """The pass that is wrapped, however often, and its parameters.

    Args:
        forward: `forward(params, tokens)`.
        params: Its parameters.
    """
    while isinstance(forward, WrappedForward):
        forward, params = forward.beneath(params)
    return forward, params

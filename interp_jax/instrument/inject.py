"""Putting values into a forward pass without writing the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from interp_jax.instrument import running_pass

__all__ = ["inject"]


def inject(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of a function one that takes values for its sites.

    Args:
        fn: a forward pass, or any function that reaches `site`.

    Returns:
        A function `(values, *args, **kwargs) -> out`, where `values` maps `(layer, name)` to a value of the site's
        shape and dtype, or to a pair `(value, mask)`: where the boolean mask, which broadcasts against the value, is
        true, the value stands; elsewhere what the pass computed.

    Raises:
        SiteError: on the call, if a key is no site of the pass, or a value does not fit.
    """

    def injecting(values: Mapping[tuple[int | None, str], Any], /, *args: Any, **kwargs: Any) -> Any:
        if not values:
            return fn(*args, **kwargs)
        start = running_pass.iterate(fn, sites={name for _, name in values}, layers={layer for layer, _ in values})
        left = dict(values)
        for layer, name, value in (running := start(*args, **kwargs)):
            if (layer, name) in values:
                running.modified_value = _injected(value, values[layer, name])
                left.pop((layer, name), None)
            del value  # where the site stands in an inner function, it must not outlive that
        if left:
            missing = ", ".join(f"({layer}, {name!r})" for layer, name in left)
            raise running_pass.SiteError(f"no site is {missing}: the name and the layer exist, but not together")
        return running.retval

    return injecting


def _injected(value: Any, given: Any) -> Any:
    if not isinstance(given, tuple):
        return given
    new, mask = given
    if jnp.result_type(mask) != jnp.bool_:
        raise running_pass.SiteError(f"a mask must be boolean, but its dtype is {jnp.result_type(mask)}")
    return jax.tree.map(lambda old, leaf: jnp.where(mask, leaf, old).astype(old.dtype), value, new)

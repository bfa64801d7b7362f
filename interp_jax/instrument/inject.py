"""Putting values into a forward pass without writing the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.instrument import running_pass

__all__ = ["inject"]


def inject(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of a function one that takes values for its sites.

    Args:
        fn: a forward pass, or any function that reaches `site`.

    Returns:
        A function `(values, *args, **kwargs) -> out`, where `values` maps `(layer, name)` to a value of the site's
        shape and dtype, or to a pair `(value, mask)`: where the boolean mask, which broadcasts against the value, is
        true, the value stands; elsewhere what the pass computed. Where the site's own value is a tuple, a tuple of the
        same tree is its value.

    Raises:
        SiteError: on the call, if a key is no site of the pass, or a value or a mask does not fit.
    """

    def injecting(values: Mapping[tuple[int | None, str], Any], /, *args: Any, **kwargs: Any) -> Any:
        if not values:
            return fn(*args, **kwargs)
        for key in values:
            if not (isinstance(key, tuple) and len(key) == 2):
                raise running_pass.SiteError(
                    f"values are given by (layer, name), but {key!r} is no such pair: a site outside the layers has "
                    "the layer None"
                )
        start = running_pass.iterate(fn, sites={name for _, name in values}, layers={layer for layer, _ in values})
        left = dict(values)
        for layer, name, value in (running := start(*args, **kwargs)):
            if (layer, name) in values:
                where = running_pass.in_words(layer, name)
                new, mask = _split(value, values[layer, name], where)
                if mask is not None:
                    _check_mask(mask, value, where)
                running.modified_value = new
                if mask is not None:
                    # Read back, the new value has been checked, and its leaves are arrays.
                    running.modified_value = jax.tree.map(
                        lambda old, leaf, mask=mask: jnp.where(mask, leaf, old), value, running.modified_value
                    )
                left.pop((layer, name), None)
            del value  # where the site stands in an inner function, it must not outlive that
        if left:
            missing = ", ".join(f"({layer}, {name!r})" for layer, name in left)
            raise running_pass.SiteError(f"no site is {missing}: the name and the layer exist, but not together")
        return running.retval

    return injecting


def _split(value: Any, given: Any, where: str) -> tuple[Any, Any]:
    """What is given for a site, as the new value and the mask; None for no mask."""
    if type(given) is not tuple or jax.tree.structure(given) == jax.tree.structure(value):
        return given, None
    if len(given) != 2 or given[1] is None:
        raise running_pass.SiteError(
            f"{where}: a tuple that is given for it is its value, of the tree {jax.tree.structure(value)}, or a pair "
            f"(value, mask), but it is of the tree {jax.tree.structure(given)}"
        )
    return given


def _check_mask(mask: Any, value: Any, where: str) -> None:
    if not isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)) or jnp.result_type(mask) != jnp.bool_:
        dtype = getattr(mask, "dtype", None)
        kind = f"a {type(mask).__name__}" if dtype is None else f"of dtype {dtype}"
        raise running_pass.SiteError(
            f"{where}: a mask must be boolean, but it is {kind}. A pair is (value, mask), unless the site's own value "
            "is a tuple of the same tree"
        )
    for leaf in jax.tree.leaves(value):
        ours, shape = jnp.shape(mask), jnp.shape(leaf)
        if len(ours) > len(shape) or any(
            one not in (1, other) for one, other in zip(ours[::-1], shape[::-1], strict=False)
        ):
            raise running_pass.SiteError(
                f"{where}: a mask must broadcast against the value, of shape {shape}, but it has shape {ours}"
            )

"""Reading activations without writing the loop."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from interp_jax.instrument import running_pass

__all__ = ["SiteValues", "fetch"]


@jax.tree_util.register_pytree_with_keys_class
class SiteValues(dict[tuple[int | None, str], Any]):
    """Values by `(layer, name)`, in the order of the pass.

    A plain dict with such keys could not leave `jit`: JAX sorts a dict's keys, and None does not compare with an int.
    """

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        return [(jax.tree_util.DictKey(key), value) for key, value in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, keys: tuple[Any, ...], values: Any) -> "SiteValues":
        return cls(zip(keys, values, strict=True))


def fetch(
    fn: Callable[..., Any],
    sites: str | Collection[str] | None = None,
    layers: int | Collection[int | None] | None = None,
) -> Callable[..., tuple[Any, SiteValues]]:
    """Makes of a function one that also returns its activations.

    Args:
        fn: a forward pass, or any function that reaches `site`.
        sites: the names to fetch; None for all.
        layers: the layers to fetch; None for all.

    Returns:
        A function of `fn`'s arguments that gives `(out, {(layer, name): value})`. It runs eagerly or under any
        transformation that `save` crosses.

    Raises:
        SiteError: on the call, if a name or a layer does not occur.
        ReapError: on the call, if a site occurs twice (a model called twice in `fn`, say).
    """
    start = running_pass.iterate(fn, sites=sites, layers=layers)

    def fetching(*args: Any, **kwargs: Any) -> tuple[Any, SiteValues]:
        for layer, name, value in (running := start(*args, **kwargs)):
            running.save((layer, name), value)
            del value  # where the site stands in an inner function, it must not outlive that
        return running.retval, SiteValues(running.saved)

    return fetching

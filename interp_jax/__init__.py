"""interp_jax: mechanistic interpretability in JAX.

`import interp_jax as ij`, then `ij.iterate`, `ij.site`, `ij.fetch` and the other names of `__all__`. Each is loaded
when it is first asked for, so that importing the package is quick and `interp_jax.patching` can be used in a process
that never imports JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_jax.instrument import Activation as Activation
    from interp_jax.instrument import LoopValueError as LoopValueError
    from interp_jax.instrument import ReapError as ReapError
    from interp_jax.instrument import RunningPass as RunningPass
    from interp_jax.instrument import SiteError as SiteError
    from interp_jax.instrument import SiteTable as SiteTable
    from interp_jax.instrument import SiteValues as SiteValues
    from interp_jax.instrument import fetch as fetch
    from interp_jax.instrument import gradients as gradients
    from interp_jax.instrument import inject as inject
    from interp_jax.instrument import iterate as iterate
    from interp_jax.instrument import layer_scan as layer_scan
    from interp_jax.instrument import list_sites as list_sites
    from interp_jax.instrument import module_sites as module_sites
    from interp_jax.instrument import site as site
    from interp_jax.models.generation import generate as generate
    from interp_jax.models.known import load as load
    from interp_jax.models.running_generation import iterate_generation as iterate_generation

__version__ = "0.1.0"

_HOME = {
    "Activation": "interp_jax.instrument",
    "LoopValueError": "interp_jax.instrument",
    "ReapError": "interp_jax.instrument",
    "RunningPass": "interp_jax.instrument",
    "SiteError": "interp_jax.instrument",
    "SiteTable": "interp_jax.instrument",
    "SiteValues": "interp_jax.instrument",
    "fetch": "interp_jax.instrument",
    "generate": "interp_jax.models.generation",
    "gradients": "interp_jax.instrument",
    "inject": "interp_jax.instrument",
    "iterate": "interp_jax.instrument",
    "iterate_generation": "interp_jax.models.running_generation",
    "layer_scan": "interp_jax.instrument",
    "list_sites": "interp_jax.instrument",
    "load": "interp_jax.models.known",
    "module_sites": "interp_jax.instrument",
    "site": "interp_jax.instrument",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'interp_jax' has no attribute {name!r}; its public names are {', '.join(sorted(_HOME))}"
        )
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

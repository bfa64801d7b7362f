"""The model that is run and traced: 12 layers of an MLP on a residual stream, 6 sites a layer, a Python loop.

Setting: f32, d 256, MLP 1024, 512 positions.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

LAYERS, D, POSITIONS = 12, 256, 512
NAMES = ("resid_pre", "mlp_in", "mlp_pre", "mlp_act", "mlp_out", "resid_post")

Params = list[tuple[jax.Array, jax.Array]]
Site = tuple[int, str]

SITES: dict[int, frozenset[Site]] = {
    1: frozenset({(6, "mlp_out")}),
    6: frozenset((layer, "mlp_out") for layer in range(0, LAYERS, 2)),
    72: frozenset((layer, name) for layer in range(LAYERS) for name in NAMES),
}
"""The k sites that are read or changed, by k."""


class Mark(Protocol):
    """What stands at a site: `ij.site`, or what a user wrote there by hand."""

    def __call__(self, value: Any, name: str, *, layer: int | None) -> Any: ...


def unmarked(value: Any, name: str, *, layer: int | None) -> Any:
    """No site at all."""
    return value


def block(x: jax.Array, weights: tuple[jax.Array, jax.Array], layer: int | None, mark: Mark) -> jax.Array:
    """One layer."""
    w_in, w_out = weights
    x = mark(x, "resid_pre", layer=layer)
    normed = mark(x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6), "mlp_in", layer=layer)
    pre = mark(normed @ w_in, "mlp_pre", layer=layer)
    act = mark(jax.nn.gelu(pre), "mlp_act", layer=layer)
    out = mark(act @ w_out, "mlp_out", layer=layer)
    return mark(x + out, "resid_post", layer=layer)


def make_model(mark: Mark) -> Callable[[Params, jax.Array], jax.Array]:
    """The model with its sites marked in one way or another."""

    def model(params: Params, x: jax.Array) -> jax.Array:
        for layer, weights in enumerate(params):
            x = block(x, weights, layer, mark)
        return x

    return model


def arguments() -> tuple[Params, jax.Array]:
    """Weights and input."""
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS + 1)
    params = [
        (jax.random.normal(keys[2 * i], (D, 4 * D)) / D**0.5, jax.random.normal(keys[2 * i + 1], (4 * D, D)) / D)
        for i in range(LAYERS)
    ]
    return params, jax.random.normal(keys[-1], (POSITIONS, D))

"""Latents as nodes: a model whose forward pass shows an autoencoder's codes, and what it misses, as sites.

`with_latents` splices autoencoders in with their error kept:

    value = decode(codes) + error,      error = value - decode(encode(value)) as it was before anything was patched

so that the model computes what it did. At each place there are two more sites, `<site>_latents` [batch, seq, d_sae] and
`<site>_error` [batch, seq, d_model]. All that works by sites then works by latent: activation patching, AtP, the
bounds, in one backward pass for all latents and all errors (Marks et al. 2024, "Sparse Feature Circuits").

What an effect means: a patched latent changes the activation by its decoder row and leaves the error as it was; a
patched error leaves the latents. What is changed upstream changes both, as in the model itself: gradients go through
codes and error alike, and to what is upstream the splice is not there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.attribution.nodes import Nodes, sites_of
from interp_jax.attribution.wrapped_forward import innermost
from interp_jax.instrument import iterate, site
from interp_jax.models.language_model import LanguageModel
from interp_jax.sae.protocol import Autoencoder

__all__ = ["Place", "check_places", "latent_nodes", "with_latents"]

Place = tuple[int | None, str]
"""Where an autoencoder stands: (layer, site)."""


def with_latents(language_model: LanguageModel, saes: Mapping[Place, Autoencoder]) -> LanguageModel:
    """A model with the same outputs, whose pass shows latents and errors as sites.

    Args:
        language_model: The model.
        saes: Autoencoders by (layer, site); each reconstructs what it reads.

    Returns:
        The model, with sites `<site>_latents` and `<site>_error` in those layers.

    Raises:
        ValueError: A site or layer does not exist, or an autoencoder is of another width or a transcoder.
    """
    check_places(language_model, saes)
    return dataclasses.replace(
        language_model,
        forward=_WithLatents(language_model.forward, tuple(saes)),
        params=(language_model.params, list(saes.values())),
        unembed=_Unembed(language_model.unembed),
    )


def latent_nodes(saes: Mapping[Place, Autoencoder]) -> tuple[Nodes, ...]:
    """The nodes of `with_latents(..., saes)`: every latent and every error at every position.

    Args:
        saes: The same autoencoders.

    Returns:
        Families of nodes, two for each site.
    """
    layers: dict[str, list[Any]] = {}
    for layer, name in saes:
        layers.setdefault(name, []).append(layer)
    families = []
    for name, numbers in layers.items():
        which = None if numbers == [None] else tuple(numbers)
        families += [
            Nodes(f"{name}_latents", by=("position", "unit"), layers=which),
            Nodes(f"{name}_error", by="position", layers=which),
        ]
    return tuple(families)


def check_places(language_model: LanguageModel, saes: Mapping[Place, Autoencoder]) -> None:
    """Refuses autoencoders that do not fit the places that they are given for.

    Args:
        language_model: The model.
        saes: Autoencoders by (layer, site).

    Raises:
        ValueError: As in `with_latents`.
    """
    if not saes:
        raise ValueError("There is no autoencoder; give at least one by (layer, site), as {(6, 'resid_post'): sae}.")
    forward, params = innermost(language_model.forward, language_model.params)
    bare = dataclasses.replace(language_model, forward=forward, params=params)
    shapes = {(row.layer, row.name): row.shape for row in sites_of(bare, 2)}
    for place, sae in saes.items():
        if not (isinstance(place, tuple) and len(place) == 2):
            raise ValueError(f"Autoencoders are given by (layer, site), as {{(6, 'resid_post'): sae}}; got {place!r}.")
        layer, name = place
        if (layer, name) not in shapes:
            names = ", ".join(dict.fromkeys(found for at, found in shapes if at == layer)) or "nothing"
            raise ValueError(f"{language_model.name} has no site {name!r} in layer {layer}; there is {names}.")
        width = shapes[layer, name][-1]
        if len(shapes[layer, name]) != 3 or (sae.d_in, sae.d_out) != (width, width):
            raise ValueError(
                f"The autoencoder of ({layer}, {name!r}) reads width {sae.d_in} and gives {sae.d_out}; the site has "
                f"shape {shapes[layer, name]}. It must be one vector a position, which the autoencoder reads and gives."
            )


@dataclasses.dataclass(frozen=True)
class _WithLatents:
    """A forward pass with autoencoders spliced in. Equal for equal models, so that its programs are compiled once."""

    forward: Callable[..., Array]
    places: tuple[Place, ...]

    def beneath(self, params: tuple[Any, list[Autoencoder]]) -> tuple[Callable[..., Array], Any]:
        """See `WrappedForward`."""
        return self.forward, params[0]

    def __call__(self, params: tuple[Any, list[Autoencoder]], tokens: Array) -> Float[Array, "batch seq vocab"]:
        params, saes = params
        of_place = dict(zip(self.places, saes, strict=True))
        start = iterate(self.forward, sites={name for _, name in of_place}, layers={layer for layer, _ in of_place})
        for layer, name, value in (running := start(params, tokens)):
            sae = of_place.get((layer, name))
            if sae is not None:
                read = value.astype(jnp.float32)
                encoded = sae.encode(read)
                missed = read - sae.decode(encoded)
                codes = site(encoded, f"{name}_latents", layer=layer)
                error = site(missed, f"{name}_error", layer=layer)
                value = (sae.decode(codes) + error).astype(value.dtype)
                del read, encoded, missed, codes, error
            # This pass has taken the site; a pass around it sees it here.
            running.modified_value = site(value, name, layer=layer)
            del value
        return running.retval


@dataclasses.dataclass(frozen=True)
class _Unembed:
    unembed: Callable[..., Array]

    def __call__(self, params: tuple[Any, list[Autoencoder]], directions: Array) -> Array:
        return self.unembed(params[0], directions)

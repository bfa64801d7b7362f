"""What steering does to an activation: edits, which are pytrees, so that one program serves all their numbers.

An edit knows its site, its layer and where in a row it acts, and has a strength that may differ from row to row of the
batch. `steered_forward` makes of a forward pass one with edits in it; `steer` and `roll_out` put the same edits into
generation. Several edits at one site act in the given order.

What is too large is refused before anything runs. A norm inside the model squares what is added; where the square
overflows it divides by infinity, and every logit is 0: finite, and nonsense.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.splice import unheaded
from interp_jax.instrument import Activation, iterate
from interp_jax.models.decoding import Place, Places, check_places, filters
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.transformer import Transformer
from interp_jax.sae import Autoencoder
from interp_jax.steering.positions import Positions, check_positions, is_any_of, is_at, is_in
from interp_jax.steering.steering_vector import SteeringVector

__all__ = [
    "AddVector",
    "ClampLatents",
    "Edit",
    "add_vector",
    "apply_edits",
    "as_edits",
    "check_edits",
    "check_strengths",
    "clamp_latents",
    "places_of",
    "steered_forward",
]


@runtime_checkable
class Edit(Protocol):
    """Something done to the value of one site; a pytree."""

    @property
    def site(self) -> str:
        """The site's name."""
        ...

    @property
    def layer(self) -> int | None:
        """Its layer."""
        ...

    @property
    def positions(self) -> Positions:
        """Where in a row it is done."""
        ...

    @property
    def width(self) -> int:
        """How wide an activation it is for."""
        ...

    def scaled(self, strengths: Float[Array, "batch"]) -> "Edit":
        """The same so many times as strong in each row of the batch; 0 does nothing."""
        ...

    def edited(self, value: Float[Array, "batch seq width"], place: Place) -> Float[Array, "batch seq width"]:
        """The value after it."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "strengths"],
    meta_fields=["site", "layer", "positions", "model"],
)
@dataclasses.dataclass(frozen=True)
class AddVector:
    """A vector added to an activation."""

    rows: Float[Array, "n_rows width"]
    """One direction a position, or the only one."""
    strengths: Float[Array, "batch"]
    """How many times it is added in each row of the batch."""
    site: str
    layer: int | None
    positions: Positions
    model: str = ""
    """The name of the model that the vector is of; "" is for any."""

    @property
    def width(self) -> int:
        """How wide the site is."""
        return self.rows.shape[-1]

    def scaled(self, strengths: Float[Array, "batch"]) -> "AddVector":
        """Added so many times as often in each row."""
        return dataclasses.replace(self, strengths=self.strengths * strengths)

    def edited(self, value: Float[Array, "batch seq width"], place: Place) -> Float[Array, "batch seq width"]:
        """The value with the vector added."""
        if isinstance(self.positions, str):
            mask = is_in(self.positions, place)
            added = mask[..., None] * self.rows[0]
        else:
            mask = is_at(self.positions, place)
            rows = jnp.broadcast_to(self.rows, (len(self.positions), self.width))
            added = jnp.einsum("nbs,nw->bsw", mask.astype(jnp.float32), rows)
        return value + (self.strengths[:, None, None] * added).astype(value.dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sae", "latents", "targets", "strengths"],
    meta_fields=["keeps_error", "site", "layer", "positions"],
)
@dataclasses.dataclass(frozen=True)
class ClampLatents:
    """Latents set to a value; what the dictionary does not explain is kept, or left out."""

    sae: Autoencoder
    latents: Int[Array, "n"]
    targets: Float[Array, "n"]
    """The codes that they are set to, at strength 1."""
    strengths: Float[Array, "batch"]
    """What the targets are multiplied by in each row of the batch; at 0 nothing is done."""
    keeps_error: bool
    """Whether the activation keeps what the dictionary does not reconstruct. If not, it is the decoded code."""
    site: str
    layer: int | None
    positions: Positions

    @property
    def width(self) -> int:
        """How wide the site is."""
        return self.sae.d_in

    def scaled(self, strengths: Float[Array, "batch"]) -> "ClampLatents":
        """Clamped to so many times the targets in each row."""
        return dataclasses.replace(self, strengths=self.strengths * strengths)

    def edited(self, value: Float[Array, "batch seq width"], place: Place) -> Float[Array, "batch seq width"]:
        """The value with the latents clamped."""
        wide = value.astype(jnp.float32)
        codes = self.sae.encode(wide)
        targets = jnp.broadcast_to(self.strengths[:, None, None] * self.targets, (*value.shape[:2], len(self.latents)))
        clamped = codes.at[..., self.latents].set(targets)
        if self.keeps_error:
            new = wide + self.sae.decode(clamped) - self.sae.decode(codes)
        else:
            new = self.sae.decode(clamped) + self.sae.skipped(wide)
        acts = is_any_of(self.positions, place) & (self.strengths != 0)[:, None]
        return jnp.where(acts[..., None], new.astype(value.dtype), value)


def add_vector(vector: SteeringVector, coefficient: float = 1.0) -> AddVector:
    """The edit that adds a vector.

    Args:
        vector: the vector, which says where.
        coefficient: how many times it is added.

    Raises:
        ValueError: if the coefficient is not finite.
    """
    assert vector.positions is not None
    if isinstance(coefficient, float) and not np.isfinite(coefficient):
        raise ValueError(f"A vector cannot be added {coefficient} times; give a finite coefficient.")
    strengths = jnp.full(1, coefficient, jnp.float32)
    rows = jnp.asarray(vector.rows)
    return AddVector(rows, strengths, vector.site, vector.layer, vector.positions, vector.model)


def clamp_latents(
    sae: Autoencoder,
    targets: dict[int, float],
    *,
    layer: int | None,
    site: str = "resid_post",
    keeps_error: bool = True,
    positions: Positions = "all",
) -> ClampLatents:
    """The edit that sets latents to values, whatever the model would have them be.

    Args:
        sae: the autoencoder of that site.
        targets: the code that each latent is set to, in the dictionary's units; 0 switches one off.
        layer: the site's layer.
        site: the site's name.
        keeps_error: True changes the activation only by what the clamped codes change in its reconstruction; False puts
            the reconstruction in its place, so that the dictionary's error is felt too.
        positions: where they are set; see `positions`.

    Returns:
        The edit. Scaled by 0 it does nothing; by c it clamps to c times the targets.

    Raises:
        ValueError: if a latent does not exist, or the autoencoder is a transcoder, whose output stands elsewhere.
    """
    if sae.d_in != sae.d_out:
        raise ValueError(
            f"A transcoder reads {sae.d_in} and writes {sae.d_out} numbers elsewhere, so its latents cannot be clamped "
            "where they are read."
        )
    positions = positions if isinstance(positions, str) else tuple(positions)
    check_positions(positions)
    wrong = [latent for latent in targets if not 0 <= latent < sae.d_sae]
    if wrong or not targets:
        raise ValueError(f"The latents to clamp are {list(targets)}; expected at least one of 0 to {sae.d_sae - 1}.")
    values = np.asarray(list(targets.values()), np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"A latent cannot be clamped to {values}; give finite numbers.")
    latents = jnp.asarray(list(targets), jnp.int32)
    return ClampLatents(sae, latents, jnp.asarray(values), jnp.ones(1), keeps_error, site, layer, positions)


def apply_edits(edits: tuple[Edit, ...], activation: Activation, place: Place) -> Array | None:
    """The value of a site after all edits that are for it; None where there is none.

    Args:
        edits: the edits.
        activation: the site's value, `[batch, seq, ...]`.
        place: where its values stand in their rows.

    Raises:
        ValueError: if the site has another width than an edit is for.
    """
    value = activation.value
    mine = [edit for edit in edits if (edit.layer, edit.site) == (activation.layer, activation.name)]
    if not mine:
        return None
    flat = unheaded(value, place.position, activation.name)
    for edit in mine:
        if edit.width != flat.shape[-1]:
            raise ValueError(
                f"The direction has {edit.width} entries, but {activation.name} of layer {activation.layer} "
                f"has shape {value.shape}; expected [batch, seq, {edit.width}]. "
                "Was the direction made for another model or site?"
            )
        flat = edit.edited(flat, place)
    return flat.reshape(value.shape)


def places_of(edits: Sequence[Edit]) -> Places:
    """The sites that edits are for.

    Args:
        edits: the edits.
    """
    return tuple(dict.fromkeys((edit.layer, edit.site) for edit in edits))


def check_edits(edits: Any, model: LanguageModel | Transformer, n_prompt: Sequence[int]) -> tuple[Edit, ...]:
    """Makes edits of vectors, and refuses what is not for the model, or what no prompt has room for.

    Args:
        edits: an edit, a vector that is added as it is, or several of them.
        model: the model; a `Transformer` has no name.
        n_prompt: how many tokens each prompt has.

    Raises:
        ValueError: if there is none, one is another model's, there is no such layer, or one acts outside a prompt.
    """
    name, n_layers = _name_and_layers(model)
    given = list(edits) if isinstance(edits, list | tuple) else [edits]
    made = as_edits(given)
    for one, edit in zip(given, made, strict=True):
        if isinstance(edit, AddVector) and edit.model not in ("", name) and name:
            source = one.source if isinstance(one, SteeringVector) else ""  # an edit does not know it
            raise ValueError(
                f"The vector{f' from {source}' if source else ''} is of {edit.model}'s activations, and this is "
                f"{name}. Make one from this model; or, if it is meant, set its model to ''."
            )
        if edit.layer is not None and not 0 <= edit.layer < n_layers:
            layers = ", ".join(str(i) for i in range(n_layers))
            raise ValueError(f"{name or 'The model'} has no layer {edit.layer}; its layers are {layers}.")
        check_positions(edit.positions, n_prompt)
    return made


def check_strengths(
    edits: tuple[Edit, ...], strengths: Float[np.ndarray, "n"], model: LanguageModel | Transformer
) -> None:
    """Refuses what is so large that float32 does not hold its square.

    Args:
        edits: the edits; of kinds other than those of this module nothing is known.
        strengths: those that they are used at.
        model: the model.

    Raises:
        FloatingPointError: if one is.
    """
    largest = 0.0
    for edit in edits:
        own = np.abs(np.asarray(edit.strengths, float)).max() if isinstance(edit, AddVector | ClampLatents) else 0.0
        if isinstance(edit, AddVector):
            rows = np.asarray(edit.rows, float)
            largest = max(largest, own * float(np.sqrt(np.square(rows).sum(axis=1)).max()))
        elif isinstance(edit, ClampLatents):
            largest = max(largest, own * float(np.abs(np.asarray(edit.targets, float)).max()))
    with np.errstate(over="ignore"):
        is_too_large = np.square(largest * np.abs(np.asarray(strengths, float))) > np.finfo(np.float32).max
    if is_too_large.any():
        raise FloatingPointError(
            f"With coefficient {strengths[int(is_too_large.argmax())]:g} the edit is too large for "
            f"{_name_and_layers(model)[0] or 'the model'}'s number format: the square of its length overflows. "
            "Use a smaller coefficient."
        )


def _name_and_layers(model: LanguageModel | Transformer) -> tuple[str, int]:
    """A model's name, which a `Transformer` does not have, and its number of layers."""
    return ("", model.config.n_layers) if isinstance(model, Transformer) else (model.name, model.n_layers)


def as_edits(edits: Any) -> tuple[Edit, ...]:
    """Edits, of an edit, a vector that is added as it is, or several of them.

    Args:
        edits: what to steer with.

    Raises:
        ValueError: if there is none, or it is nothing to steer with.
    """
    given = tuple(edits) if isinstance(edits, list | tuple) else (edits,)
    if not given:
        raise ValueError("There is nothing to steer with; give a SteeringVector or an edit.")
    made = tuple(add_vector(edit) if isinstance(edit, SteeringVector) else edit for edit in given)
    wrong = [edit for edit in made if not isinstance(edit, Edit)]
    if wrong:
        raise ValueError(
            f"A {type(wrong[0]).__name__} is nothing to steer with; give a SteeringVector, or an edit such as "
            "add_vector and clamp_latents make."
        )
    return made


def steered_forward(
    forward: Callable[[Any, Array], Array],
) -> Callable[..., Float[Array, "batch seq vocab"]]:
    """Makes of a forward pass one with edits in it.

    Args:
        forward: `forward(params, tokens) -> logits`.

    Returns:
        `steered(params, tokens, edits, n_prompt=None) -> logits`. `edits` is a tuple of edits, a pytree, so that under
        `jax.jit` their numbers are arguments. `n_prompt`, a number or `[batch]`, tells how many tokens of each row are
        the prompt; the whole row when None. No row may be padded on the left.

    Raises:
        SiteError: on the call, if there is no such site.
        ValueError: on the call, if there is no edit, or one is for another width, or acts outside the prompt. Of an
            `n_prompt` that is itself traced no more is known than that it is no longer than the row.
    """

    def steered(
        params: Any, tokens: Int[Array, "batch seq"], edits: Any, n_prompt: Any = None
    ) -> Float[Array, "batch seq vocab"]:
        batch, length = tokens.shape
        edits = as_edits(edits)
        is_known = n_prompt is not None and not isinstance(n_prompt, jax.core.Tracer)
        known = np.minimum(np.atleast_1d(np.asarray(n_prompt)), length).tolist() if is_known else [length]
        for edit in edits:
            check_positions(edit.positions, known)
        lengths = jnp.broadcast_to(jnp.asarray(length if n_prompt is None else n_prompt, jnp.int32), (batch,))
        place = Place(jnp.broadcast_to(jnp.arange(length), tokens.shape), lengths)
        sites, layers = filters(places_of(edits))
        shown: dict[tuple[int | None, str], None] = {}
        for activation in (running := iterate(forward, sites=sites, layers=layers)(params, tokens)):
            shown[activation.layer, activation.name] = None
            value = apply_edits(edits, activation, place)
            if value is not None:
                running.modified_value = value
            del activation, value  # where the site is inside a checkpoint, nothing of it may outlive the step
        check_places(places_of(edits), shown)
        return running.retval

    return steered

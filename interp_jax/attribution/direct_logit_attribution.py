"""Direct logit attribution: which parts of a model write to a logit, with nothing in between but the last norm.

The final stream is a sum of what the parts wrote. With the final norm's scale held at its value, a logit is linear in
the stream, so it is a sum of one piece a part (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"). Sites say how finely: `attn_out` is a piece a layer, `attn_heads` in its place one a head; likewise
`mlp_out` and `mlp_act`.

The linear maps are found from any model, by derivatives at zero. A norm is its linear part times a scale; its
derivative at zero is that linear part times the scale at zero. So the map is the derivative at zero times one ratio,
which is read off what the norm gave. That holds for RMSNorm and LayerNorm, for the norms behind attention and MLP
(Gemma), and a cap on the logits is frozen in the same way, as the ratio of what came out to what went in.

What is exact: the pieces, the constant and `rest` add up to the model's own value. `rest` is what no piece accounts
for: rounding, unless the model writes to its stream by parts that have no site. Where a norm stands behind an output
that has a bias, the pieces of its heads or neurons and of that bias are approximations, and `rest` is how far they are
off; the part as a whole is exact.

Hazard: a part's direct piece says nothing of what it does through later layers. Parts that write what all logits
share have large pieces of single logits; look at a logit difference.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.attribution.read_out import read_out
from interp_jax.instrument import SiteError, SiteValues, iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import check_ids, token_rows
from interp_jax.sae.protocol import Autoencoder

__all__ = ["DirectAttribution", "Piece", "direct_latent_attribution", "direct_logit_attribution"]

_WRITERS = ("embed", "attn_out", "mlp_out")
_INSIDE = {"attn_heads": "attn_out", "mlp_act": "mlp_out"}
"""What is split further, and the site that its sum is."""
_BIAS = {"attn_heads": "attn_bias", "mlp_act": "mlp_bias"}
_STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

Forward = Callable[..., Array]
Answer = int | Sequence[int] | Int[Array | np.ndarray, "batch"]


class Piece(NamedTuple):
    """One part's piece of the attributed value."""

    value: float
    """In logits, or in units of the direction's product with the stream."""
    layer: int | None
    """The part's layer."""
    site: str
    """The part's site."""
    number: int | None
    """Which head, neuron or latent; None for a whole layer's site."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" {self.layer}"
        return f"{self.site}{layer}{'' if self.number is None else f'.{self.number}'}"


@dataclasses.dataclass(frozen=True)
class DirectAttribution:
    """A logit, a logit difference or a direction's reading of the final stream, in pieces that add up to it."""

    pieces: SiteValues
    """By (layer, site): `[batch]`, or `[batch, n]` where a site has n heads, neurons or latents."""
    constant: Float[Array, "batch"]
    """What is there without any stream: biases of the final norm and of the unembedding."""
    rest: Float[Array, "batch"]
    """What no piece accounts for."""
    total: Float[Array, "batch"]
    """The model's own value."""

    def by_layer(self, site: str, row: int = 0) -> np.ndarray:
        """One site's pieces, layer by layer.

        Args:
            site: The site.
            row: Which prompt.

        Returns:
            `[layers]` or `[layers, n]`.

        Raises:
            ValueError: No piece is of that site; lists those that are.
        """
        found = [np.asarray(value[row]) for (_, name), value in self.pieces.items() if name == site]
        if not found:
            raise ValueError(
                f"No piece is of site {site!r}; there are {', '.join(sorted({n for _, n in self.pieces}))}."
            )
        return np.stack(found)

    def ranked(self, k: int = 10, row: int = 0) -> list[Piece]:
        """The pieces of the largest size.

        Args:
            k: How many at most.
            row: Which prompt.

        Returns:
            The pieces, the largest first.
        """
        pieces = []
        for (layer, site), value in self.pieces.items():
            of_row = np.asarray(value[row])
            numbers = range(len(of_row)) if of_row.ndim else [None]
            pieces += [Piece(float(one), layer, site, i) for one, i in zip(of_row.reshape(-1), numbers, strict=True)]
        return sorted(pieces, key=lambda piece: -abs(piece.value))[:k]

    def table(self, k: int = 10, row: int = 0) -> str:
        """The pieces of the largest size, as text, with what all others come to and the total.

        Args:
            k: How many pieces.
            row: Which prompt.

        Returns:
            Lines of a number and what it is of.
        """
        ranked = self.ranked(k, row)
        total, constant, rest = (float(each[row]) for each in (self.total, self.constant, self.rest))
        others = total - constant - rest - sum(piece.value for piece in ranked)
        lines = [(piece.value, str(piece)) for piece in ranked]
        lines += [(others, "all other pieces"), (constant, "constant"), (rest, "rest"), (total, "total")]
        return "\n".join(f"{value:+10.4f}  {name}" for value, name in lines)


def direct_logit_attribution(
    language_model: LanguageModel,
    tokens: Int[Array, "batch seq"],
    answer: Answer | None = None,
    wrong: Answer | None = None,
    *,
    direction: Float[Array | np.ndarray, "d_model"] | None = None,
    sites: Collection[str] = _WRITERS,
    position: int = -1,
) -> DirectAttribution:
    """The pieces of a logit, of a logit difference, or of a direction's reading of the final stream.

    Args:
        language_model: A model with the sites that are named, and `resid_post`.
        tokens: The prompts.
        answer: The token whose logit is attributed; one for all prompts or one a prompt.
        wrong: A token whose logit is subtracted.
        direction: In the place of both: what is attributed is its product with the last `resid_post`.
        sites: `embed`; `attn_out` or `attn_heads`; `mlp_out` or `mlp_act`. What is left out is in `rest`. Layers'
            biases are pieces of their own (`attn_bias`, `mlp_bias`) where heads or neurons are.
        position: Where the value is read.

    Returns:
        The pieces.

    Raises:
        ValueError: Neither an answer nor a direction, or both; tokens that are no rows; a token, a position or a site
            that is not there.
        SiteError: The model lacks a site.
    """
    unknown = set(sites) - {*_WRITERS, *_INSIDE}
    doubled = [outer for inner, outer in _INSIDE.items() if {inner, outer} <= set(sites)]
    if unknown or doubled or not sites:
        what = (
            f"not {sorted(unknown)}" if unknown else f"{doubled[0]} or what it is made of, not both" if doubled else ""
        )
        raise ValueError(
            "sites= takes embed, attn_out or attn_heads, mlp_out or mlp_act: the parts that write to the stream"
            + (f"; {what}." if what else ".")
        )
    tokens = token_rows(tokens, language_model.vocab_size)
    readout = _checked_readout(language_model, tokens, answer, wrong, direction)
    found = _attribution(
        language_model.forward,
        language_model.n_layers,
        tuple(sorted(set(sites))),
        language_model.params,
        tokens,
        readout,
        _checked_position(tokens, position),
    )
    return _finished(*found)


def direct_latent_attribution(
    language_model: LanguageModel,
    tokens: Int[Array, "batch seq"],
    sae: Autoencoder,
    answer: Answer | None = None,
    wrong: Answer | None = None,
    *,
    site: str,
    layer: int | None,
    input_site: str | None = None,
    direction: Float[Array | np.ndarray, "d_model"] | None = None,
    position: int = -1,
) -> DirectAttribution:
    """The pieces of an autoencoder's latents: what each writes, at the site that it reconstructs, straight to a logit.

    Args:
        language_model: A model with the sites, and `resid_post`.
        tokens: The prompts.
        sae: The autoencoder.
        answer: As in `direct_logit_attribution`.
        wrong: The same.
        site: What the autoencoder reconstructs: one of the sites in the residual stream's space.
        layer: Its layer.
        input_site: Where a transcoder reads, in the same layer; `site` when None.
        direction: As in `direct_logit_attribution`.
        position: The same.

    Returns:
        Pieces `latents` [batch, d_sae], `decoder_bias`, `skip` (a transcoder's) and `error` (what the autoencoder does
        not reconstruct). `rest` is what other parts write.

    Raises:
        ValueError: As in `direct_logit_attribution`; the site is not in the stream, or of another width.
        SiteError: The model lacks a site.
    """
    if site not in _STREAM:
        raise ValueError(f"Latents write to the stream at one of {', '.join(_STREAM)}; {site!r} is none of them.")
    if sae.d_out != language_model.d_model:
        raise ValueError(
            f"The autoencoder gives vectors of width {sae.d_out}; {language_model.name}'s stream has "
            f"{language_model.d_model}. Name the site and the model that it was trained on."
        )
    tokens = token_rows(tokens, language_model.vocab_size)
    readout = _checked_readout(language_model, tokens, answer, wrong, direction)
    found = _latent_attribution(
        language_model.forward,
        language_model.n_layers,
        layer,
        site,
        input_site or site,
        language_model.params,
        tokens,
        sae,
        readout,
        _checked_position(tokens, position),
    )
    return _finished(*found)


class _Tokens(NamedTuple):
    """The readout of a logit, less another's."""

    answer: Int[Array, "batch"]
    wrong: Int[Array, "batch"] | None


class _Direction(NamedTuple):
    """The readout of a direction."""

    vector: Float[Array, "d_model"]


_Readout = _Tokens | _Direction


def _checked_readout(language_model: LanguageModel, tokens: Array, answer: Any, wrong: Any, direction: Any) -> _Readout:
    if (answer is None) == (direction is None) or (direction is not None and wrong is not None):
        raise ValueError("Give answer= (a token, with or without wrong=) or direction=, and not both.")
    if direction is not None:
        vector = jnp.asarray(direction, jnp.float32)
        if vector.shape != (language_model.d_model,):
            raise ValueError(
                f"direction has shape {vector.shape}; the stream of {language_model.name} has width "
                f"{language_model.d_model}."
            )
        return _Direction(vector)

    def ids(given: Any, name: str) -> Array:
        array = np.asarray(given)
        check_ids(array, language_model.vocab_size, name)
        if array.shape not in ((), (1,), tokens.shape[:1]):
            raise ValueError(f"{name} has shape {array.shape}; give one id, or one for each of {len(tokens)} prompts.")
        return jnp.asarray(np.broadcast_to(array, tokens.shape[:1]), jnp.int32)

    return _Tokens(ids(answer, "answer"), None if wrong is None else ids(wrong, "wrong"))


def _checked_position(tokens: Array, position: int) -> Array:
    seq = tokens.shape[1]
    if not -seq <= position < seq:
        raise ValueError(f"position={position}, but the prompts have {seq} tokens: positions are {-seq} to {seq - 1}.")
    return jnp.asarray(position % seq)


def _finished(pieces: dict[Any, Array], constant: Array, total: Array, gains_are_finite: Array) -> DirectAttribution:
    if not bool(gains_are_finite):
        raise ValueError(
            "The model has no finite derivative where its stream is zero (a norm without an epsilon?), so the linear "
            "part of its norms cannot be found; attribute a direction= instead."
        )
    accounted = sum(value.reshape(len(total), -1).sum(axis=1) for value in pieces.values())
    return DirectAttribution(SiteValues(pieces), constant, total - constant - accounted, total)


@functools.partial(jax.jit, static_argnames=("forward", "n_layers", "sites"))
@jax.default_matmul_precision("highest")  # or pieces would add up to three digits on an accelerator
def _attribution(
    forward: Forward,
    n_layers: int,
    sites: tuple[str, ...],
    params: Any,
    tokens: Array,
    readout: _Readout,
    position: Array,
) -> tuple[SiteValues, Array, Array, Array]:
    written = {_INSIDE.get(site, site) for site in sites}
    values: dict[Any, Array] = {}
    wanted = {*sites, *written, "resid_post"}
    for layer, name, value in (running := iterate(forward, sites=wanted)(params, tokens)):
        running.save((layer, name), _at(value, position))
        del value
    values = running.saved
    reading, constant, total = _reading(forward, n_layers, params, values[n_layers - 1, "resid_post"], readout)
    pieces = SiteValues()
    for (layer, name), value in values.items():
        if name in sites and name not in _INSIDE:
            pieces[layer, name] = jnp.einsum("bd,bd->b", value.astype(jnp.float32), reading)
    if inner := tuple(sorted(set(sites) & set(_INSIDE))):
        pieces.update(_inside(forward, inner, params, tokens, values, reading, position))
    pieces = SiteValues(sorted(pieces.items(), key=lambda item: -1 if item[0][0] is None else item[0][0]))
    return pieces, constant, total, jnp.isfinite(reading).all()


@functools.partial(jax.jit, static_argnames=("forward", "n_layers", "layer", "site", "input_site"))
@jax.default_matmul_precision("highest")
def _latent_attribution(
    forward: Forward,
    n_layers: int,
    layer: int | None,
    site: str,
    input_site: str,
    params: Any,
    tokens: Array,
    sae: Autoencoder,
    readout: _Readout,
    position: Array,
) -> tuple[SiteValues, Array, Array, Array]:
    found: dict[Any, Array] = {}
    for at, name, value in (running := iterate(forward, sites={site, input_site, "resid_post"})(params, tokens)):
        if (at, name) in {(layer, site), (layer, input_site), (n_layers - 1, "resid_post")}:
            running.save((at, name), _at(value, position))
        del value
    found = running.saved
    missing = [name for name in (site, input_site) if (layer, name) not in found]
    if missing:
        raise SiteError(f"no site {missing[0]!r} stands in layer {layer}; ij.list_sites tells which do.")
    reading, constant, total = _reading(forward, n_layers, params, found[n_layers - 1, "resid_post"], readout)
    value, read = (found[layer, name].astype(jnp.float32) for name in (site, input_site))
    codes = sae.encode(read)
    skip = sae.skipped(read) + jnp.zeros_like(value)
    bias = sae.decode(jnp.zeros_like(codes))
    _, transposed = jax.vjp(sae.decode, jnp.zeros_like(codes))
    pieces = SiteValues()
    pieces[layer, "latents"] = codes * transposed(reading.astype(bias.dtype))[0]
    vectors = {"decoder_bias": bias, "skip": skip, "error": value - sae.decode(codes) - skip}
    for name, vector in vectors.items():
        pieces[layer, name] = jnp.einsum("bd,bd->b", vector.astype(jnp.float32), reading)
    return pieces, constant, total, jnp.isfinite(reading).all()


def _at(value: Array, position: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(value, position, axis=1, keepdims=False)


def _reading(
    forward: Forward, n_layers: int, params: Any, stream: Float[Array, "batch d_model"], readout: _Readout
) -> tuple[Float[Array, "batch d_model"], Float[Array, "batch"], Float[Array, "batch"]]:
    """A vector and a constant, so that the vector times the stream plus the constant is the readout; and that."""
    wide = stream.astype(jnp.float32)
    if isinstance(readout, _Direction):
        vector = jnp.broadcast_to(readout.vector, wide.shape)
        return vector, jnp.zeros(len(wide)), wide @ readout.vector

    def logits_of(stream: Array) -> Array:
        return read_out(forward, n_layers, params, stream[:, None])[:, 0].astype(jnp.float32)

    logits = logits_of(stream)
    at_zero, linear = jax.linearize(logits_of, jnp.zeros_like(stream))
    gains = _gains(linear(stream), logits - at_zero)
    chosen = jax.nn.one_hot(readout.answer, logits.shape[-1])
    if readout.wrong is not None:
        chosen = chosen - jax.nn.one_hot(readout.wrong, logits.shape[-1])
    (reading,) = jax.linear_transpose(linear, stream)(chosen * gains)
    pick = functools.partial(jnp.einsum, "bv,bv->b")
    return reading.astype(jnp.float32), pick(chosen, at_zero), pick(chosen, logits)


def _gains(linear: Float[Array, "batch vocab"], out: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """For each logit, what its linear part is to be multiplied with to give it.

    One factor for all, the norm's scale, unless logits are capped: then each has its own. One that is so near zero that
    its own would be noise takes that of the smallest others, which the cap changes least.
    """
    size = jnp.abs(linear)
    common = _ratio(linear, out)
    is_capped = jnp.abs(out - common * linear).max(-1, keepdims=True) > 1e-4 * jnp.abs(out).max(-1, keepdims=True)
    is_large = size > 1e-2 * size.max(axis=-1, keepdims=True)
    own = jnp.where(is_large, out / jnp.where(is_large, linear, 1.0), 0.0)
    weight = jnp.where(is_large, jnp.square(size.max(axis=-1, keepdims=True) / jnp.where(is_large, size, 1.0)), 0.0)
    of_small = (weight * own).sum(-1, keepdims=True) / jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
    return jnp.where(is_capped, jnp.where(is_large, own, of_small), common)


def _ratio(linear: Float[Array, "batch n"], out: Float[Array, "batch n"]) -> Float[Array, "batch 1"]:
    """The factor by which `linear` comes nearest to `out`."""
    unit = linear / jnp.maximum(jnp.abs(linear).max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    square = (unit * unit).sum(axis=-1, keepdims=True)
    scale = jnp.maximum(jnp.abs(linear).max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (unit * out).sum(axis=-1, keepdims=True) / (jnp.where(square > 0, square, 1.0) * scale)


def _inside(
    forward: Forward,
    inner: tuple[str, ...],
    params: Any,
    tokens: Array,
    values: dict[Any, Array],
    reading: Float[Array, "batch d_model"],
    position: Array,
) -> SiteValues:
    """Pieces of heads or neurons, through the map from them to what their layer writes.

    All layers' maps come from one pass: with every inner value planted, what a layer writes depends on its own alone.
    """
    keys = [key for key in values if key[1] in inner]

    def written(planted: list[Array]) -> list[Array]:
        given = dict(zip(keys, planted, strict=True))
        sites = {*inner, *(_INSIDE[site] for site in inner)}
        for layer, name, value in (running := iterate(forward, sites=sites)(params, tokens)):
            if name in inner:
                zeros = jnp.zeros_like(value)
                running.modified_value = jax.lax.dynamic_update_index_in_dim(
                    zeros, given[layer, name], position, axis=1
                )
                del zeros
            else:
                running.save((layer, name), _at(value, position))
            del value
        return [running.saved[layer, _INSIDE[name]] for layer, name in keys]

    of_parts = [values[key] for key in keys]
    biases, linear = jax.linearize(written, [jnp.zeros_like(value) for value in of_parts])
    cotangents = []
    for (layer, name), bias, part in zip(keys, biases, linear(of_parts), strict=True):
        out = values[layer, _INSIDE[name]].astype(jnp.float32) - bias.astype(jnp.float32)
        cotangents.append((reading * _ratio(part.astype(jnp.float32), out)).astype(part.dtype))
    (gradients,) = jax.linear_transpose(linear, of_parts)(cotangents)
    pieces = SiteValues()
    for (layer, name), value, gradient, bias in zip(keys, of_parts, gradients, biases, strict=True):
        product = value.astype(jnp.float32) * gradient.astype(jnp.float32)
        pieces[layer, name] = product.sum(axis=-1) if name == "attn_heads" else product
        pieces[layer, _BIAS[name]] = jnp.einsum("bd,bd->b", bias.astype(jnp.float32), reading)
    return pieces

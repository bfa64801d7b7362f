"""What a dictionary costs a model: its loss clean, spliced, zero-ablated and mean-ablated, over the same tokens.

The model is compiled once. One program runs it with whatever stands in the activation's place, and also gives the
activation as it was; with nothing in its place it is the clean model. The clean pass therefore comes first in every
batch: it gives what the dictionary reads. A transcoder reads at `input_site`, below the site whose activation it
replaces, so what it reads is the same in the clean and in the spliced pass.

Attention sinks are left alone by the splice and by both ablations alike, for the reasons that `splice` states.

Hazard: the divergence needs the logits of two passes at a time. Where they do not fit, take a smaller `batch_size`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.splice import is_sink, substituted, unheaded
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_losses
from interp_jax.sae import Autoencoder, loss_recovered
from interp_jax.sae.scalars import scalars

__all__ = ["N_PASSES", "SpliceLosses", "splice_losses"]

N_PASSES = 4
"""Forward passes over the tokens: clean, spliced, zero-ablated, mean-ablated."""


@dataclasses.dataclass(frozen=True)
class SpliceLosses:
    """A model's next-token losses in nats a token, means over all predictions but the first of each row."""

    clean: float
    """The model as it is."""
    spliced: float
    """The activation replaced by its reconstruction; by a transcoder's prediction."""
    zero_ablated: float
    """The activation replaced by zero."""
    mean_ablated: float
    """The activation replaced by its mean."""
    kl: float
    """KL(clean || spliced) of the distributions over the next token, nats a token, over the same predictions."""
    replaced_share: float
    """Share of the positions after the first whose activation was replaced; the rest are sinks."""
    n_predictions: int
    """Predictions that the losses are means of."""

    @property
    def delta(self) -> float:
        """What the splice adds to the loss."""
        return self.spliced - self.clean

    @property
    def loss_recovered_zero(self) -> float:
        """1 where splicing costs nothing, 0 where as much as the zero ablation; NaN where that costs nothing."""
        return loss_recovered(self.clean, self.spliced, self.zero_ablated)

    @property
    def loss_recovered_mean(self) -> float:
        """1 where splicing costs nothing, 0 where as much as the mean ablation; NaN where that costs nothing."""
        return loss_recovered(self.clean, self.spliced, self.mean_ablated)

    def as_dict(self) -> dict[str, int | float | None]:
        """All of these numbers, for JSON; None for NaN."""
        derived = _Derived(self.delta, self.loss_recovered_zero, self.loss_recovered_mean)
        return scalars(self) | scalars(derived)


@dataclasses.dataclass(frozen=True)
class _Derived:
    delta: float
    loss_recovered_zero: float
    loss_recovered_mean: float


def splice_losses(
    language_model: LanguageModel,
    tokens: Int[np.ndarray, "rows context"],
    sae: Autoencoder,
    *,
    site: str = "resid_post",
    layer: int | None = None,
    input_site: str | None = None,
    mean: Float[Array | np.ndarray, "_d_out"] | None = None,
    keep_above: float = float("inf"),
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> SpliceLosses:
    """The next-token losses of a model on text, with and without a dictionary in it.

    Args:
        language_model: the model.
        tokens: the text; the last rows that fill no batch are left out.
        sae: the autoencoder, of any kind.
        site: the site whose activation is replaced. A value per head is flattened to one vector a position.
        layer: its layer, None outside the layers.
        input_site: where a transcoder reads, in the same layer; None for an autoencoder, which reads at `site`.
        mean: what stands in for the activation in the mean ablation: the mean over other text, the training text say.
            When None it is the mean over these very tokens, sinks left out.
        keep_above: the Euclidean norm above which an activation at `site` is left alone.
        batch_size: rows a batch.
        advance: told how many tokens were done, after each pass over a batch: `N_PASSES` times the tokens in all.

    Returns:
        The losses.

    Raises:
        SiteError: if there is no such site; it lists those that exist.
        ValueError: if there are fewer rows than `batch_size` or than three tokens in each, the SAE or the mean does not
            fit the activation, or every activation is above `keep_above`.
    """
    rows, context = tokens.shape
    if rows < batch_size:
        raise ValueError(f"{rows} rows do not fill a batch of {batch_size}: pass more text or a smaller batch_size.")
    if context < 3:
        raise ValueError(
            f"rows hold {context} tokens; expected at least 3, since a row's first prediction is not counted and its "
            "last token has none."
        )
    if mean is not None and len(mean) != sae.d_out:
        raise ValueError(f"the mean has {len(mean)} entries; expected {sae.d_out}, the width of the SAE's output.")
    program = _program(language_model.forward, sae, site, layer, input_site or site, keep_above)
    batches = [tokens[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]

    def run(batch: Int[np.ndarray, "batch context"], replacement: Array | np.ndarray, *, is_replaced: bool) -> _Passed:
        # Of one shape whatever it is, so that all passes share one program.
        replacement = jnp.broadcast_to(replacement, (*batch.shape, sae.d_out)).astype(jnp.float32)
        return program(language_model.params, jnp.asarray(batch), replacement, jnp.bool(is_replaced))

    zeros, output_sum, n_replaced = jnp.zeros(sae.d_out), np.zeros(sae.d_out), 0
    clean, spliced, zero_ablated, mean_ablated, divergence = np.zeros(5)
    for batch in batches:
        passed = run(batch, zeros, is_replaced=False)
        advance(batch.size)
        output_sum += np.asarray(passed.output_sum)
        n_replaced += int(passed.n_replaced)
        clean += float(passed.loss)

        with_sae = run(batch, _reconstruction(sae, passed.read), is_replaced=True)
        advance(batch.size)
        spliced += float(with_sae.loss)
        divergence += float(_divergence(passed.logits, with_sae.logits))
        del passed, with_sae  # the logits, before the next ones are made

        zero_ablated += float(run(batch, zeros, is_replaced=True).loss)
        advance(batch.size)
    if n_replaced == 0:
        raise ValueError(
            f"no activation of site {site!r} has a norm up to keep_above = {keep_above:g}, so none was replaced. Pass "
            "a larger one: several times the median norm."
        )
    if mean is None:
        mean = np.asarray(output_sum / n_replaced, np.float32)
    for batch in batches:
        mean_ablated += float(run(batch, mean, is_replaced=True).loss)
        advance(batch.size)
    n = len(batches)
    return SpliceLosses(
        clean=float(clean / n),
        spliced=float(spliced / n),
        zero_ablated=float(zero_ablated / n),
        mean_ablated=float(mean_ablated / n),
        kl=float(divergence / n),
        replaced_share=n_replaced / (n * batch_size * (context - 1)),
        n_predictions=n * batch_size * (context - 2),
    )


class _Passed(NamedTuple):
    """What one pass over a batch gives."""

    loss: Float[Array, ""]
    logits: Float[Array, "batch seq vocab"]
    read: Float[Array, "batch seq d_in"]
    """The activation that the dictionary reads, sinks included."""
    output_sum: Float[Array, "d_out"]
    """Sum of the activations that are not sinks, as they were before the replacement."""
    n_replaced: Int[Array, ""]


def _program(
    forward: Callable[[Any, Array], Array],
    sae: Autoencoder,
    site: str,
    layer: int | None,
    input_site: str,
    keep_above: float,
) -> Callable[[Any, Array, Array, Array], _Passed]:
    """The one compiled program; of the SAE it takes the widths alone."""
    widths = sae.d_in, sae.d_out

    def run(params: Any, tokens: Array, replacement: Array, is_replaced: Array) -> _Passed:
        sites = {input_site, site}
        for _, name, value in (running := iterate(forward, sites=sites, layers=(layer,))(params, tokens)):
            flat = unheaded(value, tokens, name)
            if name == input_site:
                _check_width(flat, widths[0], "reads", name)
                running.save("read", flat)
            if name == site:
                _check_width(flat, widths[1], "gives", name)
                is_kept = is_sink(flat, keep_above)
                ordinary = jnp.where(is_kept[..., None], 0, flat)
                running.save("output_sum", jnp.sum(ordinary, axis=(0, 1), dtype=jnp.float32))
                running.save("n_replaced", jnp.sum(~is_kept))
                running.modified_value = substituted(value, replacement, is_kept | ~is_replaced)
                del is_kept, ordinary
            del value, flat  # where the site is inside a checkpoint, nothing of it may outlive the step
        logits = running.retval
        if len(running.saved) < 3:  # a site that exists elsewhere only; one that exists nowhere is a SiteError
            raise ValueError(
                f"layer {layer} does not hold both site {site!r} and input_site {input_site!r}; list_sites tells which "
                "sites stand in which layer."
            )
        return _Passed(loss=next_token_losses(logits, tokens)[:, 1:].mean(), logits=logits, **running.saved)

    return jax.jit(run)


def _check_width(value: Array, width: int, verb: str, site: str) -> None:
    if value.shape[-1] != width:
        raise ValueError(
            f"the SAE {verb} width {width}; site {site!r} has {value.shape[-1]}. Name the site and layer that it was "
            "trained on, and for a transcoder input_site, where it reads."
        )


@jax.jit
def _reconstruction(sae: Autoencoder, read: Float[Array, "batch seq d_in"]) -> Float[Array, "batch seq d_out"]:
    return sae(read.astype(jnp.float32))


@jax.jit
def _divergence(clean: Float[Array, "batch seq vocab"], other: Float[Array, "batch seq vocab"]) -> Float[Array, ""]:
    """KL(clean || other) in nats, a mean over the predictions that the losses are means of."""
    clean, other = (logits[:, 1:-1].astype(jnp.float32) for logits in (clean, other))
    normalisers = jax.nn.logsumexp(other, axis=-1) - jax.nn.logsumexp(clean, axis=-1)
    return jnp.mean(jnp.sum(jax.nn.softmax(clean) * (clean - other), axis=-1) + normalisers)

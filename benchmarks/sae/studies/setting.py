"""What all studies share: the tiny model, its activations, and how a dictionary is judged.

The dictionaries are of the tiny model's residual stream in the middle, width 128. They are judged on articles that
neither they nor the model were trained on. The first position of a row, where the model has seen nothing, is left out
of training and judging alike.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.splice import splice
from interp_jax.activations.store import ActivationStore
from interp_jax.activations.store_activations import store_activations
from interp_jax.activations.stream import stream_activations
from interp_jax.activations.tokens import pack, split_documents
from interp_jax.activations.wikipedia import articles
from interp_jax.models.known import load
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_losses
from interp_jax.pursuit import gradient_pursuit
from interp_jax.sae import SparseAutoencoder, evaluate, loss_recovered

__all__ = ["Code", "Judge", "activations_and_judge", "encoded", "largest", "pursued"]

SITE, LAYER, CONTEXT = "resid_post", 2, 128
ROWS = 8
"""Rows of tokens a forward pass, where activations are made."""
LOSS_ROWS, LOSS_BATCH = 256, 32
"""Held-out rows that codes of every origin and the model's loss are judged on, 32,512 activations; and rows a pass."""

Code = Callable[[SparseAutoencoder, Float[Array, "rows context d_in"]], Float[Array, "rows context d_sae"]]


@jax.jit
def encoded(sae: SparseAutoencoder, x: Float[Array, "rows context d_in"]) -> Float[Array, "rows context d_sae"]:
    """The codes that the encoder gives."""
    return sae.encode(x)


@functools.partial(jax.jit, static_argnames="l0")
def largest(
    sae: SparseAutoencoder, x: Float[Array, "rows context d_in"], *, l0: int
) -> Float[Array, "rows context d_sae"]:
    """The l0 largest codes of the encoder, of those that are positive, whatever L0 the autoencoder has itself."""
    codes = jax.nn.relu(sae.pre_activations(x))
    return jnp.where(codes >= jax.lax.top_k(codes, l0)[0][..., -1:], codes, 0)


@functools.partial(jax.jit, static_argnames="l0")
def pursued(
    sae: SparseAutoencoder, x: Float[Array, "rows context d_in"], *, l0: int
) -> Float[Array, "rows context d_sae"]:
    """The codes that gradient pursuit finds in the dictionary; the encoder has no part in them."""
    return gradient_pursuit(x - sae.b_dec[...], sae.W_dec[...], l0).dense(sae.d_sae)


def activations_and_judge(cache: pathlib.Path) -> tuple[ActivationStore, "Judge"]:
    """The activations to train on, made once and kept, and the judge.

    Args:
        cache: the folder where they are kept.
    """
    model = load("tiny")
    # The same division as the model's own, so that nothing has seen the held-out articles.
    parts = split_documents([article.text for article in articles()])
    rows, held_out = (_mixed(pack(part, model.tokenizer, CONTEXT)) for part in parts)
    store = store_activations(model, rows, cache / "activations", site=SITE, layer=LAYER, batch_rows=ROWS)
    return store, Judge(model, held_out)


def _mixed(rows: Int[np.ndarray, "rows context"]) -> Int[np.ndarray, "some context"]:
    """The rows, the articles mixed; those that fill no batch are left out."""
    return rows[np.random.default_rng(0).permutation(len(rows))[: len(rows) // ROWS * ROWS]]


class Judge:
    """Held-out text: its activations, and the model's loss with something else in their place."""

    def __init__(self, model: LanguageModel, tokens: Int[np.ndarray, "rows context"]):
        """Runs the model.

        Args:
            model: the model.
            tokens: the text.
        """
        batches = tokens.reshape(-1, ROWS, CONTEXT)
        stream = stream_activations(model.forward, model.params, batches, site=SITE, layer=LAYER)
        x = np.concatenate([np.asarray(batch) for batch in stream]).reshape(len(tokens), CONTEXT, -1)
        self._batches = x[:, 1:].reshape(len(batches), -1, x.shape[-1])
        self._x = x[:LOSS_ROWS]
        self._tokens, self._params = tokens[:LOSS_ROWS], model.params

        def losses(params, tokens: Int[Array, "rows context"], output: Float[Array, "rows context d_in"]):
            spliced = splice(model.forward, lambda value, output: output, site=SITE, layer=LAYER)
            return next_token_losses(spliced(params, tokens, output), tokens)[:, 1:].mean()

        self._losses = jax.jit(losses)
        judged = self._x[:, 1:].astype(np.float64)
        mean = judged.mean(axis=(0, 1))
        self._squares = float(np.sum(np.square(judged - mean)))
        self.clean = self._loss(self._x)
        """The model's own loss, nats a token; and with the activation replaced by zero, or by its mean."""
        self.zero_ablated = self._loss(np.zeros_like(self._x))
        self.mean_ablated = self._loss(np.broadcast_to(mean, self._x.shape))

    def dead_share(self, sae: SparseAutoencoder) -> float:
        """The share of an autoencoder's latents that are active on none of all held-out activations."""
        return evaluate(sae, self._batches).dead_share

    def judge(self, sae: SparseAutoencoder, code: Code = encoded) -> dict[str, float]:
        """What a dictionary explains of activations, and what the model loses by the rest.

        Args:
            sae: the autoencoder; of its encoder only `code` makes use.
            code: gives the codes.

        Returns:
            `l0`; `fvu`; `delta`, by how much the model's loss rises, in nats a token; `loss_recovered`, of what the
            zero ablation costs, and `loss_recovered_mean`, of what the mean ablation costs.
        """
        outputs, n_active, error = [], 0, 0.0
        for x in self._x.reshape(-1, LOSS_BATCH, *self._x.shape[1:]):
            output, active, squares = _decoded(sae, x, code(sae, jnp.asarray(x)))
            outputs.append(output)
            n_active += int(active)
            error += float(squares)
        spliced = self._loss(np.concatenate(outputs))
        return {
            "l0": n_active / self._x[:, 1:, 0].size,
            "fvu": error / self._squares,
            "delta": spliced - self.clean,
            "loss_recovered": loss_recovered(self.clean, spliced, self.zero_ablated),
            "loss_recovered_mean": loss_recovered(self.clean, spliced, self.mean_ablated),
        }

    def _loss(self, output: np.ndarray) -> float:
        starts = range(0, len(self._tokens), LOSS_BATCH)
        parts = [slice(start, start + LOSS_BATCH) for start in starts]
        return float(
            np.mean([self._losses(self._params, self._tokens[part], jnp.asarray(output[part])) for part in parts])
        )


@jax.jit
def _decoded(
    sae: SparseAutoencoder, x: Float[Array, "rows context d_in"], codes: Float[Array, "rows context d_sae"]
) -> tuple[Float[Array, "rows context d_in"], Int[Array, ""], Float[Array, ""]]:
    """The output; how many codes are active and the squared error, both without first positions."""
    output = sae.decode(codes)
    return output, jnp.sum(codes[:, 1:] != 0), jnp.sum(jnp.square(x - output)[:, 1:])

"""A two-layer transformer with random weights and a byte tokenizer: whole in every respect that steering relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from interp_jax.instrument import site
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer

D_MODEL, N_LAYERS, CONTEXT = 16, 2, 48


def byte_tokenizer(**ids: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, **ids)


def forward(params, tokens):
    seq = tokens.shape[1]
    x = params["embed"][tokens] + params["position"][:seq]
    for layer, block in enumerate(params["blocks"]):
        q, k, v = (x @ block[name] for name in ("q", "k", "v"))
        scores = jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), q @ k.mT / jnp.sqrt(q.shape[-1]), -jnp.inf)
        x = x + jax.nn.softmax(scores) @ v
        hidden = site(jnp.tanh(x @ block["up"]), "mlp_act", layer=layer)
        x = site(x + hidden @ block["down"], "resid_post", layer=layer)
    return site(x @ params["embed"].T, "logits")


def make_params(key=0):
    keys = iter(jax.random.split(jax.random.key(key), 20))

    def normal(*shape, scale=0.5):
        return scale * jax.random.normal(next(keys), shape)

    blocks = [
        {"q": normal(16, 16), "k": normal(16, 16), "v": normal(16, 16), "up": normal(16, 24), "down": normal(24, 16)}
        for _ in range(N_LAYERS)
    ]
    return {"embed": normal(256, D_MODEL, scale=1.0), "position": normal(CONTEXT, D_MODEL), "blocks": blocks}


@pytest.fixture(scope="session")
def language_model() -> LanguageModel:
    return LanguageModel(
        name="two-layer model",
        forward=forward,
        params=make_params(),
        tokenizer=byte_tokenizer(),
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        vocab_size=256,
        context=CONTEXT,
        unembed=lambda params, directions: directions @ params["embed"].T,
    )


def reference_logits(params, ids, edit=lambda value, name, layer: value):
    """The same model in NumPy, on one row, with every site's value passed through `edit`."""
    params = jax.tree.map(np.asarray, params)
    seq = len(ids)
    x = params["embed"][ids] + params["position"][:seq]
    for layer, block in enumerate(params["blocks"]):
        q, k, v = (x @ block[name] for name in ("q", "k", "v"))
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1])) * np.tri(seq)
        x = x + weights / weights.sum(-1, keepdims=True) @ v
        hidden = edit(np.tanh(x @ block["up"]), "mlp_act", layer)
        x = edit(x + hidden @ block["down"], "resid_post", layer)
    return x @ params["embed"].T


@pytest.fixture(scope="session")
def greedy():
    """Continues ids one token at a time in NumPy: no padding, no batch, no JAX."""

    def continue_(language_model, ids, n, edit=lambda value, name, layer: value):
        ids, n_prompt = list(ids), len(ids)
        for _ in range(n):
            ids.append(int(np.argmax(reference_logits(language_model.params, ids, edit)[-1])))
        return ids[n_prompt:]

    return continue_

"""Models small enough to be written twice: in JAX with sites, and in NumPy as plain statements."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.instrument import site
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tiny import load_tiny

SEQ, WIDTH, VOCAB, LAYERS = 4, 5, 6, 3


def as_model(forward, params, *, n_layers, d_model, vocab_size=VOCAB):
    tokenizer = load_tiny().tokenizer  # none of its own: the pairs are made of ids
    return LanguageModel("by hand", forward, params, tokenizer, n_layers, d_model, vocab_size, 128, lambda _, x: x)


def pair_of(clean, corrupted, answer=None, wrong=None):
    labels = [tuple(f"t{token}" for token in row) for row in (clean, corrupted)]
    return PromptPair(np.asarray(clean), np.asarray(corrupted), answer, wrong, *labels)


def linear_params(seed=0):
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

    return {
        "embed": matrix(VOCAB, WIDTH),
        "mix": matrix(LAYERS, WIDTH, WIDTH),
        "mlp": matrix(LAYERS, WIDTH, WIDTH),
        "out": matrix(WIDTH, VOCAB),
    }


def linear_forward(params, tokens):
    """Every layer adds the mean over earlier positions times a matrix, then the stream times another."""
    x = site(jnp.asarray(params["embed"])[tokens], "embed")
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
    seen = seen / seen.sum(-1, keepdims=True)
    for layer in range(LAYERS):
        x = site(x, "resid_pre", layer=layer)
        x = x + site(jnp.einsum("qk,bkd->bqd", seen, x) @ params["mix"][layer], "attn_out", layer=layer)
        x = x + site(x @ params["mlp"][layer], "mlp_out", layer=layer)
        x = site(x, "resid_post", layer=layer)
    return site(x @ params["out"], "logits")


def linear_by_hand(params, tokens, replaced=()):
    """The same row by row; `replaced` holds (site, layer, index, value) to be put in. Gives logits and all sites."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    sites = {}

    def stop(name, layer, value):
        value = value.copy()
        for where, at, index, new in replaced:
            if (where, at) == (name, layer):
                value[index] = new
        sites[layer, name] = value
        return value

    x = stop("embed", None, params["embed"][np.asarray(tokens)])
    for layer in range(LAYERS):
        x = stop("resid_pre", layer, x)
        means = np.stack([x[: place + 1].mean(0) for place in range(len(x))])
        x = x + stop("attn_out", layer, means @ params["mix"][layer])
        x = x + stop("mlp_out", layer, x @ params["mlp"][layer])
        x = stop("resid_post", layer, x)
    return x @ params["out"], sites


def linear_model(seed=0):
    return as_model(linear_forward, linear_params(seed), n_layers=LAYERS, d_model=WIDTH)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def counting(model):
    """The model, and a list that grows each time that its function is traced."""
    traces = []

    def forward(params, tokens):
        traces.append(None)
        return model.forward(params, tokens)

    return dataclasses.replace(model, forward=forward), traces

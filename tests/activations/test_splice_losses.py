"""Splice losses against a model written out in NumPy, and against one splice at a time of a trained model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import interp_jax as ij
from interp_jax.activations.splice import mean_loss
from interp_jax.activations.splice_losses import N_PASSES, SpliceLosses, splice_losses
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tiny import load_tiny
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE

VOCAB, D_IN, D_OUT = 11, 6, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (5, 8), dtype=np.int32)
CONTEXT = TOKENS.shape[1]


def forward(params, tokens):
    """Two sites of different widths, the second one with an axis of heads."""
    x = ij.site(params["embed"][tokens], "mlp_in", layer=0)
    heads = jnp.tanh(x @ params["w"]).reshape(*tokens.shape, 2, D_OUT // 2)
    heads = ij.site(heads, "attn_heads", layer=0)
    logits = heads.reshape(*tokens.shape, D_OUT) @ params["out"]
    ij.site(jax.nn.softmax(logits @ jnp.swapaxes(logits, 1, 2))[:, None], "attn_probs", layer=0)
    return logits


def toy():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (VOCAB, D_IN), "w": (D_IN, D_OUT), "out": (D_OUT, VOCAB)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return LanguageModel(
        name="toy",
        forward=forward,
        params=params,
        tokenizer=Tokenizer.__new__(Tokenizer),  # text is not touched here
        n_layers=1,
        d_model=D_IN,
        vocab_size=VOCAB,
        context=CONTEXT,
        unembed=lambda params, directions: directions,
    )


def by_hand(params, tokens, sae, *, reads_input, keep_above=np.inf, mean=None):
    """The losses of the four models and the divergence, in float64."""
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    x = params["embed"][tokens]
    activation = np.tanh(x @ params["w"])
    is_kept = np.linalg.norm(activation, axis=-1) > keep_above
    is_kept[:, 0] = True
    if mean is None:
        mean = activation[~is_kept].mean(0)
    reconstruction = np.asarray(sae(jnp.asarray(x if reads_input else activation, jnp.float32)))
    replacements = {
        "clean": activation,
        "spliced": reconstruction,
        "zero_ablated": 0 * activation,
        "mean_ablated": mean,
    }
    losses, logs = {}, {}
    for name, replacement in replacements.items():
        logits = np.where(is_kept[..., None], activation, replacement) @ params["out"]
        logs[name] = scipy.special.log_softmax(logits, axis=-1)
        picked = np.take_along_axis(logs[name][:, :-1], tokens[:, 1:, None], axis=-1)[:, 1:, 0]
        losses[name] = -picked.mean()
    clean, spliced = (np.exp(logs[name][:, 1:-1]) for name in ("clean", "spliced"))
    return losses | {"kl": scipy.stats.entropy(clean, spliced, axis=-1).mean(), "replaced": 1 - is_kept[:, 1:].mean()}


KINDS = {
    TopKSAE: {"k": 3},
    BatchTopKSAE: {"k": 3},
    MatryoshkaSAE: {"k": 3, "widths": (5, 20)},
    ReLUSAE: {},
    GatedSAE: {},
    JumpReLUSAE: {"threshold": 0.5},
}


@pytest.mark.caches
@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_of_any_kind_against_numpy(kind):
    model, seen = toy(), []
    sae = kind.random(D_OUT, 20, key=jax.random.key(1), **KINDS[kind])
    found = splice_losses(model, TOKENS, sae, site="attn_heads", layer=0, batch_size=2, advance=seen.append)
    expected = by_hand(model.params, TOKENS[:4], sae, reads_input=False)
    for name in ("clean", "spliced", "zero_ablated", "mean_ablated", "kl"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-4), name
    assert found.replaced_share == 1
    assert found.n_predictions == 4 * (CONTEXT - 2)
    assert seen == [2 * CONTEXT] * (2 * N_PASSES)


@pytest.mark.parametrize("has_skip", [False, True])
def test_a_transcoder_reads_below_what_it_replaces(has_skip):
    model = toy()
    sae = ReLUSAE.random(D_IN, 20, key=jax.random.key(1), d_out=D_OUT, has_skip=has_skip)
    if has_skip:
        sae = sae.replace(W_skip=jax.random.normal(jax.random.key(2), (D_OUT, D_IN)))
    mean = np.linspace(-0.5, 0.5, D_OUT, dtype=np.float32)
    found = splice_losses(model, TOKENS, sae, site="attn_heads", input_site="mlp_in", layer=0, mean=mean, batch_size=5)
    expected = by_hand(model.params, TOKENS, sae, reads_input=True, mean=mean)
    for name in ("clean", "spliced", "zero_ablated", "mean_ablated", "kl"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-4), name


def test_sinks_are_left_alone_by_splice_and_ablations():
    model, limit = toy(), 2.4
    sae = TopKSAE.random(D_OUT, 20, 3, key=jax.random.key(1))
    found = splice_losses(model, TOKENS, sae, site="attn_heads", layer=0, batch_size=5, keep_above=limit)
    expected = by_hand(model.params, TOKENS, sae, reads_input=False, keep_above=limit)
    assert 0.1 < expected["replaced"] < 0.9
    assert found.replaced_share == pytest.approx(expected["replaced"])
    for name in ("clean", "spliced", "zero_ablated", "mean_ablated", "kl"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-4), name


# The replacement comes from outside the checkpoint, whose cache keeps a reference to it: to the leak checker, a leak.
@pytest.mark.caches
def test_a_site_inside_a_checkpoint():
    model, sae = toy(), TopKSAE.random(D_OUT, 20, 3, key=jax.random.key(1))
    checkpointed = dataclasses.replace(model, forward=jax.checkpoint(forward))
    at = {"site": "attn_heads", "layer": 0, "batch_size": 5}
    found, plain = splice_losses(checkpointed, TOKENS, sae, **at), splice_losses(model, TOKENS, sae, **at)
    assert found.as_dict() == pytest.approx(plain.as_dict(), rel=1e-5)


def perfect(d):
    """Gives back what it gets: the positive and the negative part of each coordinate are a latent each."""
    both = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
    return ReLUSAE(W_enc=both.T, b_enc=jnp.zeros(2 * d), W_dec=both, b_dec=jnp.zeros(d))


def test_a_perfect_dictionary_costs_nothing():
    found = splice_losses(toy(), TOKENS, perfect(D_OUT), site="attn_heads", layer=0, batch_size=5)
    assert found.delta == pytest.approx(0, abs=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.loss_recovered_zero == pytest.approx(1, abs=1e-5)
    assert found.loss_recovered_mean == pytest.approx(1, abs=1e-5)


@pytest.mark.caches
def test_of_a_model_with_scanned_layers_they_are_those_of_one_splice_at_a_time():
    model, layer, limit = load_tiny(), 1, 60.0
    rows = np.random.default_rng(0).integers(0, model.vocab_size, size=(6, 16), dtype=np.int32)
    sae = TopKSAE.random(model.d_model, 256, 16, key=jax.random.key(0))
    mean = np.linspace(-1, 1, model.d_model, dtype=np.float32)
    shared = {"site": "resid_post", "layer": layer, "keep_above": limit, "batch_size": 2}
    found = splice_losses(model, rows, sae, mean=mean, **shared)
    replaced = {
        "clean": (None,),
        "spliced": (lambda value, sae: sae(value), sae),
        "zero_ablated": (jnp.zeros_like,),
        "mean_ablated": (lambda value, mean: jnp.broadcast_to(mean, value.shape), jnp.asarray(mean)),
    }
    for name, replacement in replaced.items():
        assert getattr(found, name) == pytest.approx(mean_loss(model, rows, *replacement, **shared), rel=1e-5), name


@pytest.mark.caches
def test_the_model_is_traced_once():
    traced = []

    def counting(params, tokens):
        traced.append(tokens.shape)
        return forward(params, tokens)

    model = dataclasses.replace(toy(), forward=counting)
    sae = TopKSAE.random(D_OUT, 20, 3, key=jax.random.key(1))
    splice_losses(model, TOKENS[:4], sae, site="attn_heads", layer=0, batch_size=2)
    assert traced == [(2, CONTEXT)]


def test_a_summary_is_json():
    losses = SpliceLosses(
        clean=3.0, spliced=3.5, zero_ablated=8.0, mean_ablated=3.0, kl=0.4, replaced_share=1.0, n_predictions=30
    )
    assert json.loads(json.dumps(losses.as_dict(), allow_nan=False)) == {
        "clean": 3.0,
        "spliced": 3.5,
        "zero_ablated": 8.0,
        "mean_ablated": 3.0,
        "kl": 0.4,
        "replaced_share": 1.0,
        "n_predictions": 30,
        "delta": 0.5,
        "loss_recovered_zero": 0.9,
        "loss_recovered_mean": None,
    }


def test_mistakes():
    model, sae = toy(), TopKSAE.random(D_OUT, 20, 3, key=jax.random.key(0))
    at = {"site": "attn_heads", "layer": 0, "batch_size": 5}
    with pytest.raises(ValueError, match="5 rows do not fill a batch of 8"):
        splice_losses(model, TOKENS, sae, site="attn_heads", layer=0)
    with pytest.raises(ValueError, match="rows hold 2 tokens; expected at least 3"):
        splice_losses(model, TOKENS[:, :2], sae, **at)
    with pytest.raises(ValueError, match="the SAE reads width 8; site 'mlp_in' has 6"):
        splice_losses(model, TOKENS, sae, site="mlp_in", layer=0, batch_size=5)
    with pytest.raises(ValueError, match="the mean has 6 entries; expected 8"):
        splice_losses(model, TOKENS, sae, mean=np.zeros(6, np.float32), **at)
    with pytest.raises(ValueError, match=r"keep_above = 0\.01, so none was replaced"):
        splice_losses(model, TOKENS, sae, keep_above=0.01, **at)
    with pytest.raises(ValueError, match=r"site 'attn_probs' has shape \(5, 1, 8, 8\) .* one vector a position"):
        splice_losses(model, TOKENS, sae, site="attn_probs", layer=0, batch_size=5)
    with pytest.raises(ij.SiteError, match="no site stands in layer 3"):
        splice_losses(model, TOKENS, sae, site="attn_heads", layer=3, batch_size=5)
    with pytest.raises(ij.SiteError, match="no site is named 'resid_mid'"):
        splice_losses(model, TOKENS, sae, site="attn_heads", input_site="resid_mid", layer=0, batch_size=5)


def test_two_sites_of_different_layers_are_refused():
    def elsewhere(params, tokens):
        ij.site(params["embed"][tokens], "embed")
        return forward(params, tokens)

    model = dataclasses.replace(toy(), forward=elsewhere)
    sae = ReLUSAE.random(D_IN, 20, key=jax.random.key(0), d_out=D_OUT)
    with pytest.raises(ValueError, match="layer 0 does not hold both site 'attn_heads' and input_site 'embed'"):
        splice_losses(model, TOKENS, sae, site="attn_heads", input_site="embed", layer=0, batch_size=5)

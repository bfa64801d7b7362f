"""SmolLM2 and Gemma 3 270M against PyTorch's `transformers`, which read the same files with a reader of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_real_models

import interp_jax as ij
from interp_jax import installed_data
from interp_jax.activations.wikipedia import reference_rows
from interp_jax.models.loss import next_token_loss

pytestmark = [pytest.mark.slow, pytest.mark.demo, pytest.mark.caches]


@pytest.fixture(scope="module", params=pytorch_real_models.NAMES)
def name(request):
    if request.param == "gemma3" and installed_data.status("gemma3")[0].path is None:
        pytest.skip("`interp-jax data get gemma3` gets it; in CI `make test-patches-gemma` does")
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return ij.load(name)


@pytest.fixture(scope="module")
def reference(name):
    with np.load(pytorch_real_models.PATH) as arrays:
        found = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
    return [
        {key.removeprefix(f"{number}/"): value for key, value in found.items() if key.startswith(f"{number}/")}
        for number in range(len(pytorch_real_models.TEXTS))
    ]


def test_logits_are_pytorch_s(model, reference):
    forward = jax.jit(model.forward)
    tokens = pytorch_real_models.stored_tokens(model.vocab_size)
    for expected in reference:
        logits = forward(model.params, jnp.asarray(expected["ids"][None]))[0]
        np.testing.assert_allclose(logits[:, tokens], expected["logits"], rtol=0, atol=2e-4)
        np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=1), expected["logsumexp"], rtol=0, atol=2e-4)


# Layers, width, vocabulary; and the loss on `reference_rows`, each begun by the bos token where the model expects one:
# SmolLM2's is that of transformers on PyTorch with the same file, Gemma's that of the library `gemma`.
SIZES = {"smollm2": (30, 576, 49152), "gemma3": (18, 640, 262144)}
LOSSES = {"smollm2": 3.136101, "gemma3": 3.17692}


def test_losses_are_the_references(model, name):
    assert (model.n_layers, model.d_model, model.vocab_size) == SIZES[name]
    rows = reference_rows(model.tokenizer)
    if model.tokenizer.bos_id is not None:
        rows = np.insert(rows[:, :127], 0, model.tokenizer.bos_id, axis=1)
    loss = jax.jit(lambda params, part: next_token_loss(model.forward(params, part), part))
    found = np.mean([loss(model.params, part) for part in np.split(jnp.asarray(rows), 8)])
    assert float(found) == pytest.approx(LOSSES[name], abs=2e-4)


def test_the_likeliest_continuations_are_pytorch_s(model, reference):
    # Where PyTorch's choice led by less than the two logits may differ, nothing could be asked.
    assert min(each["lead"].min() for each in reference) > 2 * 2e-4
    prompts = [each["ids"].tolist() for each in reference]
    generated = ij.generate(model, prompts, max_new_tokens=pytorch_real_models.NEW_TOKENS, stop_tokens=())
    assert generated.rows() == [each["continuation"].tolist() for each in reference]

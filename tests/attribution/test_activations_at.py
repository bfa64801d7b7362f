"""Activations of prompts of different lengths, against each prompt run alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import all_sites, small_model, small_tokens

import interp_jax as ij
from interp_jax.attribution.activations_at import activations_at

pytestmark = [pytest.mark.caches, pytest.mark.usefixtures("quick_compilation")]


def test_each_prompt_gives_what_it_gives_alone():
    model, tokens = small_model(), np.asarray(small_tokens(batch=5))
    prompts = [list(tokens[0]), list(tokens[1][:4]), list(tokens[2][:6]), list(tokens[3]), list(tokens[4][:4])]
    found = activations_at(model, prompts, positions=[-1, 2, -3], batch_size=2)
    assert found.shape == (2, 3, 5, 12)
    for row in (0, 1, 4):
        alone = all_sites(model, jnp.asarray([prompts[row]]))
        for layer in range(2):
            expected = alone[layer, "resid_post"][0][[-1, 2, -3]]
            np.testing.assert_allclose(found[layer, :, row], expected, atol=1e-5)


def test_heads_are_flattened_and_layers_chosen():
    model, tokens = small_model(), small_tokens()
    found = activations_at(model, tokens, site="attn_heads", layers=1, positions=3)
    expected = all_sites(model, tokens)[1, "attn_heads"][:, 3].reshape(2, -1)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_told():
    model = small_model()
    for message, prompts, options in [
        ("There are no prompts", [], {}),
        ("Prompt 1 has no tokens", [[1], []], {}),
        ("Prompt 1 has 1 tokens, so it has no position -2", [[1, 2], [3]], {"positions": -2}),
        ("Prompt 0 has 2 tokens, so it has no position 2", [[1, 2], [3, 4, 5]], {"positions": [0, 2]}),
        ("more than pad_to=1", [[1, 2]], {"pad_to": 1}),
        ("Prompts of 10 tokens; llama has 9", [[1] * 10], {}),
        (r"prompts\[0, 1\] is 23; the model's tokens are 0 to 22", [[1, 23]], {}),
        ("Prompts are rows of token ids", [1, 2], {}),
        ("Prompts are rows of token ids", ["The city"], {}),
        ("one vector a position", [[1, 2]], {"site": "attn_probs"}),
    ]:
        with pytest.raises(ValueError, match=message):
            activations_at(model, prompts, **options)
    with pytest.raises(ij.SiteError, match="layer 4"):
        activations_at(model, [[1, 2]], layers=4)

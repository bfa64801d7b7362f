"""Edits in `ij.generate` do what they do in `steer`, and are refused for what they are not for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.models.cached_decoding import decode_with_cache
from interp_jax.sae import ReLUSAE
from interp_jax.steering import SteeringVector, add_vector, as_intervention, clamp_latents, steer, steered_forward

PROMPTS = ["The town where", "In the year of the great war the"]
DIRECTION = np.asarray(jax.random.normal(jax.random.key(5), (16,)))
VECTOR = SteeringVector(DIRECTION, layer=0)


@pytest.fixture(scope="module")
def tiny():
    return ij.load("tiny")


@pytest.fixture(scope="module")
def of_tiny(tiny):
    return SteeringVector(np.asarray(jax.random.normal(jax.random.key(5), (tiny.d_model,))), layer=2)


def generated(model, interventions, **options):
    return ij.generate(model, PROMPTS, max_new_tokens=8, interventions=interventions, **options)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", (0, -1)])
def test_rows_of_different_lengths_are_what_each_is_alone(language_model, positions):
    vector = VECTOR.at(positions) if isinstance(positions, str) else SteeringVector(DIRECTION, 0, positions=positions)
    found = generated(language_model, as_intervention(30 * vector)).texts()
    expected = [
        steer(language_model, prompt, vector, coefficients=[30.0], max_new_tokens=8)[0].text for prompt in PROMPTS
    ]
    assert found == expected
    assert found != generated(language_model, None).texts()


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", (0, -1)])
def test_so_they_are_where_prompts_are_padded_and_keys_are_kept(tiny, of_tiny, positions):
    # As ids: of a text, steer makes other ids than generate where the tokenizer has no begin token.
    prompts = [tiny.encode_prompt(prompt) for prompt in PROMPTS]
    vector = 4 * dataclasses.replace(of_tiny, positions=positions)
    options = {"max_new_tokens": 8, "stop_tokens": ()}
    found = ij.generate(tiny, prompts, interventions=as_intervention(vector), **options).texts()
    assert found == [steer(tiny, prompt, vector, coefficients=[1.0], max_new_tokens=8)[0].text for prompt in prompts]
    assert found != ij.generate(tiny, prompts, **options).texts()


def test_several_act_together_and_may_be_clamped_latents(language_model):
    clamp = clamp_latents(ReLUSAE.random(16, 32, key=jax.random.key(1)), {3: 5.0}, layer=0)
    found = generated(language_model, as_intervention([clamp, 2 * VECTOR])).texts()
    expected = [
        steer(language_model, prompt, [clamp, 2 * VECTOR], coefficients=[1.0], max_new_tokens=8)[0].text
        for prompt in PROMPTS
    ]
    assert found == expected


def test_equals_the_same_edit_as_a_function_with_sampling_and_fetching(tiny, of_tiny):
    options = {"temperature": 1.0, "top_k": 20, "key": jax.random.key(3)}
    options |= {"fetch_sites": "resid_post", "fetch_layers": 2}

    def by_hand(activation):
        if (activation.layer, activation.name) == (2, "resid_post"):
            return activation.value + 2 * of_tiny.direction
        return None

    found, expected = (generated(tiny, one, **options) for one in (as_intervention(2 * of_tiny), by_hand))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    # Equal but for the order in which XLA sums: the two are different programs.
    np.testing.assert_allclose(
        found.activations[2, "resid_post"], expected.activations[2, "resid_post"], rtol=1e-5, atol=1e-5
    )


def test_another_vector_runs_the_same_program(tiny, of_tiny):
    generated(tiny, as_intervention(of_tiny))
    before = decode_with_cache._cache_size()
    generated(tiny, as_intervention(-2 * of_tiny))
    assert decode_with_cache._cache_size() == before > 0


def test_a_transformer_needs_no_name(tiny, of_tiny):
    ids = [tiny.encode_prompt(prompt) for prompt in PROMPTS]
    edit = as_intervention(dataclasses.replace(of_tiny, model=tiny.name))
    options = {"max_new_tokens": 8, "interventions": edit, "stop_tokens": ()}
    found, expected = (ij.generate(one, ids, **options) for one in (tiny.params, tiny))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(ValueError, match="The model has no layer 9"):
        ij.generate(
            tiny.params, ids, **options | {"interventions": as_intervention(dataclasses.replace(of_tiny, layer=9))}
        )


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (SteeringVector(DIRECTION, 9), "has no layer 9; its layers are 0, 1"),
        (SteeringVector(DIRECTION, 1, site="resid"), "resid"),
        (SteeringVector(DIRECTION[:5], 1), "The direction has 5 entries"),
        (SteeringVector(DIRECTION, 1, positions=(40,)), "Position 40 is outside the prompt"),
        (SteeringVector(DIRECTION, 1, model="another"), "is of another's activations"),
        ([], "There is nothing to steer with"),
        ("love", "A str is nothing to steer with"),
    ],
)
def test_what_does_not_fit_is_refused(language_model, edits, message):
    with pytest.raises(ValueError, match=message):
        generated(language_model, as_intervention(edits))


@pytest.mark.parametrize(
    ("site", "layer", "message"),
    [("resid", 1, "'?resid"), ("resid_post", None, "no site"), ("embed", 1, "embed")],
)
def test_a_place_that_is_not_there_is_refused_beside_others_that_are(tiny, of_tiny, site, layer, message):
    absent = dataclasses.replace(of_tiny, site=site, layer=layer)
    everything = [absent, of_tiny, dataclasses.replace(of_tiny, site="embed", layer=None)]
    with pytest.raises(ij.SiteError, match=message):
        generated(tiny, as_intervention(absent))
    with pytest.raises(ij.SiteError, match=message):
        generated(tiny, as_intervention(everything), fetch_sites="resid_post")
    with pytest.raises(ij.SiteError, match=message):
        steer(tiny, PROMPTS[0], everything, coefficients=[1.0], max_new_tokens=2)
    with pytest.raises(ij.SiteError, match=message):
        steered_forward(tiny.forward)(tiny.params, jnp.zeros((1, 4), jnp.int32), everything)


def test_where_is_the_edits_own_matter(tiny, of_tiny):
    with pytest.raises(ValueError, match="leave where out"):
        generated(tiny, as_intervention(of_tiny), where="generated")


def test_a_strength_a_row_is_refused():
    with pytest.raises(ValueError, match="2 strengths"):
        as_intervention(add_vector(VECTOR).scaled(jnp.ones(2)))


def test_an_empty_prompt_is_told_before_a_position_in_it(tiny, of_tiny):
    edits = as_intervention(dataclasses.replace(of_tiny, positions=(2,)))
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        ij.generate(tiny, [[]], max_new_tokens=2, interventions=edits)


def test_what_overflows_is_refused(language_model):
    with pytest.raises(FloatingPointError, match="Use a smaller coefficient"):
        generated(language_model, as_intervention(add_vector(VECTOR, 1e25)))

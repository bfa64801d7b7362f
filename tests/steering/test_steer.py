import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.steering import Continuation, SteeringVector, steer

PROMPT = "The town where"
DIRECTION = np.asarray(jax.random.normal(jax.random.key(5), (16,)))


def by_hand(language_model, greedy, coefficient, positions, n):
    """The same edit in NumPy, over each unpadded prefix."""
    prompt = language_model.tokenizer.encode(PROMPT)
    where = {"all": slice(None), "prompt": slice(None, len(prompt)), "generated": slice(len(prompt), None)}[positions]

    def edit(value, name, layer):
        if (layer, name) == (1, "resid_post"):
            value[where] += coefficient * DIRECTION
        return value

    return language_model.tokenizer.decode(greedy(language_model, prompt, n, edit))


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_equals_the_edit_written_by_hand(language_model, greedy, positions):
    coefficients = (-3.0, 0.0, 3.0)
    steered = steer(
        language_model, PROMPT, DIRECTION, layer=1, coefficients=coefficients, positions=positions, max_new_tokens=8
    )
    expected = [Continuation(c, by_hand(language_model, greedy, c, positions, 8)) for c in coefficients]
    assert steered == expected
    assert len({continuation.text for continuation in steered}) > 1


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "key": jax.random.key(2)}])
def test_coefficient_zero_is_the_unsteered_text(language_model, sampling):
    steered = steer(language_model, PROMPT, DIRECTION, layer=0, coefficients=(0.0, 5.0), max_new_tokens=8, **sampling)
    assert [steered[0].text] == ij.generate(language_model, [PROMPT], max_new_tokens=8, **sampling).texts()


def test_what_is_generated_alone_leaves_the_first_token(language_model):
    plain, steered = steer(
        language_model, PROMPT, DIRECTION, layer=1, coefficients=(0.0, 50.0), positions="generated", max_new_tokens=8
    )
    ids = [language_model.tokenizer.encode(c.text)[0] for c in (plain, steered)]
    assert ids[0] == ids[1]


def test_a_site_of_another_width(language_model):
    direction = jax.random.normal(jax.random.key(6), (24,))
    plain, steered = steer(
        language_model, PROMPT, direction, layer=0, site="mlp_act", coefficients=(0.0, 20.0), max_new_tokens=8
    )
    assert plain.text != steered.text


@pytest.mark.caches
def test_a_second_sweep_does_not_trace_again(language_model):
    calls = 0

    def counted(params, tokens):
        nonlocal calls
        calls += 1
        return language_model.forward(params, tokens)

    counting = dataclasses.replace(language_model, forward=counted)
    steer(counting, PROMPT, DIRECTION, layer=1, coefficients=(1.0, 2.0), max_new_tokens=8)
    traced = calls
    steer(counting, "My favourite", -DIRECTION, layer=1, coefficients=(3.0, 4.0), max_new_tokens=8)
    assert calls == traced


def test_a_steering_vector_knows_its_place(language_model, tmp_path):
    vector = SteeringVector(DIRECTION, layer=1, source="random")
    vector.save(tmp_path / "vector.safetensors")
    loaded = SteeringVector.load(tmp_path / "vector.safetensors")
    expected = steer(language_model, PROMPT, DIRECTION, layer=1, coefficients=(3.0,), max_new_tokens=6)
    assert steer(language_model, PROMPT, loaded, coefficients=(3.0,), max_new_tokens=6) == expected
    with pytest.raises(ValueError, match="for layer 1, got layer=0"):
        steer(language_model, PROMPT, loaded, layer=0, coefficients=(3.0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "no token to continue from"),
        ({"prompt": "x" * 60}, "context of 48"),
        ({"direction": np.ones(17)}, r"17 entries, but resid_post of layer 1 has shape \(1, 32, 16\)"),
        ({"direction": np.full(16, np.nan)}, "finite"),
        ({"layer": 2}, "no layer 2; its layers are 0, 1"),
        ({"layer": -1}, "no layer -1"),
        ({"layer": None}, "Which layer"),
        ({"site": "resid_pst"}, "did you mean 'resid_post'"),
        ({"coefficients": (float("nan"),)}, "coefficient nan"),
        ({"coefficients": (1e39,)}, r"coefficient 1e\+39"),
        ({"coefficients": ()}, "no coefficient"),
    ],
)
def test_bad_input(language_model, arguments, message):
    given = {"prompt": PROMPT, "direction": DIRECTION, "layer": 1, "coefficients": (1.0,), "max_new_tokens": 8}
    with pytest.raises(ValueError, match=message):
        steer(language_model, **given | arguments)


def test_positions_that_do_not_exist(language_model):
    # A TypeError where the annotations are checked, as they are in these tests.
    with pytest.raises((TypeError, ValueError), match="positions"):
        steer(language_model, PROMPT, DIRECTION, layer=1, coefficients=(1.0,), positions="last")  # pyright: ignore


def test_a_coefficient_that_overflows_in_the_model(language_model):
    with pytest.raises(FloatingPointError, match="smaller coefficient"):
        steer(language_model, PROMPT, DIRECTION, layer=0, coefficients=(3e38,), max_new_tokens=4)


def test_a_direction_may_be_a_jax_array(language_model):
    given = {"layer": 1, "coefficients": (2.0,), "max_new_tokens": 4}
    assert steer(language_model, PROMPT, jnp.asarray(DIRECTION), **given) == steer(
        language_model, PROMPT, DIRECTION, **given
    )

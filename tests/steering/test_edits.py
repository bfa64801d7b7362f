"""Edits in a forward pass and in generation, against the same edit written by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_layer_model import reference_logits

import interp_jax as ij
from interp_jax.models.tiny import load_tiny
from interp_jax.pursuit import PursuitEncoder
from interp_jax.sae import ReLUSAE
from interp_jax.steering import SteeringVector, add_vector, clamp_latents, steer, steered_forward

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

PROMPT = "The town where"
ROWS = np.asarray(jax.random.normal(jax.random.key(5), (3, 16)))


@pytest.fixture(scope="module")
def sae():
    return ReLUSAE.random(16, 40, key=jax.random.key(1))


def clamped_by_hand(sae, value, targets, keeps_error):
    W_enc, W_dec, b_enc, b_dec = (np.asarray(getattr(sae, name)[...]) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    codes = np.maximum((value - b_dec) @ W_enc + b_enc, 0)
    new = codes.copy()
    for latent, target in targets.items():
        new[:, latent] = target
    return value + (new - codes) @ W_dec if keeps_error else new @ W_dec + b_dec


def edit_by_hand(kind, sae, strength, n_prompt):
    def edit(value, name, layer):
        if kind == "rows" and (layer, name) == (0, "resid_post"):
            for at, row in zip((1, n_prompt - 2, n_prompt - 1), ROWS, strict=True):
                value[at] += strength * row
        if kind == "one row at two tokens" and (layer, name) == (1, "resid_post"):
            value[[0, n_prompt - 1]] += strength * -4 * ROWS[0]
        if kind == "clamp at two tokens" and (layer, name) == (1, "resid_post") and strength:
            at = [1, n_prompt - 1]
            value[at] = clamped_by_hand(sae, value[at], {3: 40.0 * strength, 7: 0.0}, keeps_error=True)
        elif kind.startswith("clamp") and (layer, name) == (1, "resid_post") and strength:
            value = clamped_by_hand(sae, value, {3: 2.0 * strength, 7: 0.0}, kind.endswith("keeping the error"))
        if kind == "both" and layer == 1:
            if name == "mlp_act":
                value[:] += strength * np.linspace(-1, 1, 24)
            if name == "resid_post":
                value[n_prompt:] += strength * ROWS[1]
        return value

    return edit


def edit_of(kind, sae):
    return {
        "rows": lambda: SteeringVector(ROWS, 0, positions=(1, -2, -1)),
        "one row at two tokens": lambda: SteeringVector(-4 * ROWS[0], 1, positions=(0, -1)),
        "clamp keeping the error": lambda: clamp_latents(sae, {3: 2.0, 7: 0.0}, layer=1),
        "clamp splicing": lambda: clamp_latents(sae, {3: 2.0, 7: 0.0}, layer=1, keeps_error=False),
        "clamp at two tokens": lambda: clamp_latents(sae, {3: 40.0, 7: 0.0}, layer=1, positions=(1, -1)),
        "both": lambda: [
            SteeringVector(np.linspace(-1, 1, 24), 1, "mlp_act"),
            SteeringVector(ROWS[1], 1, positions="generated"),
        ],
    }[kind]()


KINDS = [
    "rows", "one row at two tokens", "clamp keeping the error", "clamp splicing", "clamp at two tokens", "both",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_with_the_edit_written_by_hand(language_model, greedy, sae, kind):
    ids = language_model.tokenizer.encode(PROMPT)
    found = steer(language_model, PROMPT, edit_of(kind, sae), coefficients=(0.0, 1.5), max_new_tokens=6)
    expected = [greedy(language_model, ids, 6, edit_by_hand(kind, sae, c, len(ids))) for c in (0.0, 1.5)]
    assert [one.text for one in found] == [language_model.tokenizer.decode(row) for row in expected]
    assert found[0].text != found[1].text


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_is_that_with_the_edit_written_by_hand(language_model, sae, kind):
    ids = np.asarray(language_model.tokenizer.encode("The town where it stood"))
    edits = edit_of(kind, sae)
    edits = tuple(
        (add_vector(one) if isinstance(one, SteeringVector) else one).scaled(jnp.full(1, 1.5))
        for one in (edits if isinstance(edits, list) else [edits])
    )
    logits = jax.jit(steered_forward(language_model.forward))(language_model.params, ids[None], edits, 14)
    expected = reference_logits(language_model.params, ids, edit_by_hand(kind, sae, 1.5, 14))
    np.testing.assert_allclose(logits[0], expected, atol=2e-5 * np.abs(expected).max())


def test_over_a_cache_it_is_what_the_whole_text_gives():
    tiny = load_tiny()
    prompt = "The city is one of the largest in"
    direction = 3.0 * np.asarray(jax.random.normal(jax.random.key(0), (2, 128)))
    vector = SteeringVector(direction, 1, positions=(2, -1))
    (_, steered) = steer(tiny, prompt, vector, coefficients=(0.0, 1.0), max_new_tokens=5)
    ids = [tiny.tokenizer.end_of_text_id, *tiny.tokenizer.encode(prompt)]
    n_prompt, edits = len(ids), (add_vector(vector),)
    forward = jax.jit(steered_forward(tiny.forward))
    for _ in range(5):
        row = np.zeros((1, n_prompt + 5), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(forward(tiny.params, jnp.asarray(row), edits, n_prompt)[0, len(ids) - 1].argmax()))
    assert steered.text == tiny.tokenizer.decode(ids[n_prompt:])


def test_a_target_norm(language_model):
    vector = SteeringVector(ROWS[0], 1)
    by_norm = steer(language_model, PROMPT, vector, norms=(0.0, 9.0), max_new_tokens=6)
    by_coefficient = steer(language_model, PROMPT, vector, coefficients=(0.0, 9.0 / vector.norm), max_new_tokens=6)
    assert [one.text for one in by_norm] == [one.text for one in by_coefficient]


def test_a_strength_multiplies_an_edit_s_own(language_model):
    vector = SteeringVector(ROWS[0], 1)
    twice = steer(language_model, PROMPT, add_vector(vector, 2.0), coefficients=(1.5,), max_new_tokens=6)
    once = steer(language_model, PROMPT, vector, coefficients=(3.0,), max_new_tokens=6)
    assert twice[0].text == once[0].text


def test_other_numbers_are_no_other_program(sae):
    tiny = load_tiny()
    traced = []

    def forward(params, tokens):
        traced.append(tokens.shape)
        return tiny.forward(params, tokens)

    run = jax.jit(steered_forward(forward))
    tokens = jnp.ones((2, 8), jnp.int32)
    for strength in (1.0, 2.0):
        edit = add_vector(SteeringVector(strength * np.ones(128), 2), strength)
        run(tiny.params, tokens, (edit,)).block_until_ready()
    assert len(traced) == 1


def test_bad_input(language_model, sae):
    with pytest.raises(ValueError, match=r"Position 20 is outside the prompt, which has 14 tokens"):
        steer(language_model, PROMPT, SteeringVector(ROWS[:1], 0, positions=(20,)), coefficients=(1.0,))
    with pytest.raises(ValueError, match="twice"):
        steer(language_model, PROMPT, SteeringVector(ROWS[:2], 0, positions=(13, -1)), coefficients=(1.0,))
    with pytest.raises(ValueError, match=r"The latents to clamp are \[40\]; expected at least one of 0 to 39"):
        clamp_latents(sae, {40: 1.0}, layer=1)
    with pytest.raises(ValueError, match="finite"):
        clamp_latents(sae, {4: float("nan")}, layer=1)
    with pytest.raises(ValueError, match=r"16 entries, but mlp_act of layer 1 has shape \(1, 32, 24\)"):
        steer(
            language_model, PROMPT, SteeringVector(ROWS[0], 1, "mlp_act"), coefficients=(1.0,), max_new_tokens=4
        )  # fmt: skip
    with pytest.raises(ValueError, match="instead of coefficients"):
        steer(language_model, PROMPT, SteeringVector(ROWS[0], 1), coefficients=(1.0,), norms=(1.0,))
    other = SteeringVector(ROWS[0], 1, source="a text", model="another model")
    with pytest.raises(ValueError, match=r"from a text is of another model's activations, and this is two-layer model"):
        steer(language_model, PROMPT, other, coefficients=(1.0,))
    with pytest.raises(ValueError, match="another model's activations"):
        steer(language_model, PROMPT, add_vector(other), coefficients=(1.0,))
    with pytest.raises(ValueError, match="an edit says itself where it acts"):
        steer(language_model, PROMPT, clamp_latents(sae, {4: 1.0}, layer=1), coefficients=(1.0,), positions="prompt")
    with pytest.raises(ValueError, match="is for layer 1, got layer=0"):
        steer(language_model, PROMPT, clamp_latents(sae, {4: 1.0}, layer=1), coefficients=(1.0,), layer=0)
    with pytest.raises(ValueError, match="is for site resid_post, got site=mlp_out"):
        steer(language_model, PROMPT, SteeringVector(ROWS[0], 1), coefficients=(1.0,), site="mlp_out")
    with pytest.raises(FloatingPointError, match="the square of its length overflows"):
        steer(language_model, PROMPT, clamp_latents(sae, {4: 1e12}, layer=1), coefficients=(1e9,))
    with pytest.raises(ValueError, match="cannot be added nan times"):
        add_vector(SteeringVector(ROWS[0], 1), float("nan"))
    with pytest.raises(ValueError, match="nothing to steer with"):
        steer(language_model, PROMPT, [], coefficients=(1.0,))


def test_a_forward_pass_refuses_what_it_cannot_do(language_model):
    tokens = jnp.ones((2, 12), jnp.int32)
    steered = steered_forward(language_model.forward)
    at_ten = add_vector(SteeringVector(ROWS[0], 1, positions=(10,)))
    for n_prompt in (8, np.asarray([12, 8])):
        with pytest.raises(ValueError, match="Position 10 is outside the prompt, which has 8 tokens"):
            steered(language_model.params, tokens, (at_ten,), n_prompt)
    with pytest.raises(ValueError, match="Position 12 is outside the prompt, which has 12 tokens"):
        jax.jit(steered)(language_model.params, tokens, (add_vector(SteeringVector(ROWS[0], 1, positions=(12,))),), 8)
    with pytest.raises(ValueError, match="nothing to steer with"):
        steered(language_model.params, tokens, ())
    with pytest.raises(ValueError, match="A ndarray is nothing to steer with"):
        steered(language_model.params, tokens, (ROWS[0],))


def test_a_forward_pass_takes_a_vector_or_one_edit_as_it_is(language_model):
    tokens = jnp.asarray([language_model.tokenizer.encode(PROMPT)])
    steered, vector = steered_forward(language_model.forward), SteeringVector(ROWS[0], 1)
    whole = steered(language_model.params, tokens, (add_vector(vector),))
    np.testing.assert_array_equal(steered(language_model.params, tokens, vector), whole)
    np.testing.assert_array_equal(steered(language_model.params, tokens, add_vector(vector)), whole)


def test_an_edit_s_gradient_is_that_of_finite_differences(language_model):
    ids = jnp.asarray([language_model.tokenizer.encode(PROMPT)])
    steered = steered_forward(language_model.forward)

    @jax.jit
    def loss(direction):
        edit = add_vector(SteeringVector(np.zeros(16), 0))
        edit = type(edit)(direction[None], edit.strengths, edit.site, edit.layer, edit.positions)
        return jax.nn.log_softmax(steered(language_model.params, ids, (edit,))[0, -1])[3]

    # A step of 1e-2 in float32: its curvature and its rounding are each about a hundredth.
    start = jnp.asarray(ROWS[0]) * 0.1
    along = jnp.asarray(ROWS[1]) / np.linalg.norm(ROWS[1])
    difference = (loss(start + 1e-2 * along) - loss(start - 1e-2 * along)) / 2e-2
    assert float(jax.grad(loss)(start) @ along) == pytest.approx(float(difference), rel=2e-2)


def test_a_pursuit_stands_in_an_autoencoder_s_place(language_model, sae):
    edit = clamp_latents(PursuitEncoder(sae, 4), {3: 6.0}, layer=1)
    plain, steered = steer(language_model, PROMPT, edit, coefficients=(0.0, 1.0), max_new_tokens=6)
    assert plain.text == ij.generate(language_model, PROMPT, max_new_tokens=6).texts()[0]
    assert steered.text != plain.text

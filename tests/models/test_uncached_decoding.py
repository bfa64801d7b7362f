"""Generation with a model that is not ours, against a plain NumPy loop over unpadded rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_layer_model import greedy as greedy
from two_layer_model import language_model as language_model

import interp_jax as ij
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer

PROMPTS = ["a", "The river was", "water at the mill"]


def texts(*args, **options):
    return ij.generate(*args, **options).texts()


def with_tokenizer(language_model: LanguageModel, **ids: int) -> LanguageModel:
    backend = language_model.tokenizer._backend
    return dataclasses.replace(language_model, tokenizer=Tokenizer(backend, **ids))


def test_rows_of_different_lengths_equal_a_plain_loop_without_padding(language_model, greedy):
    encode, decode_ids = language_model.tokenizer.encode, language_model.tokenizer.decode
    expected = [decode_ids(greedy(language_model, encode(prompt), 12)) for prompt in PROMPTS]
    assert texts(language_model, PROMPTS, max_new_tokens=12) == expected


def test_a_prompt_may_fill_the_context(language_model, greedy):
    prompt = "x" * (language_model.context - 5)
    ids = language_model.tokenizer.encode(prompt)
    expected = language_model.tokenizer.decode(greedy(language_model, ids, 5))
    assert texts(language_model, [prompt], max_new_tokens=5) == [expected]


def test_bos_stands_before_the_prompt(language_model, greedy):
    ids = [7, *language_model.tokenizer.encode("stone")]
    expected = language_model.tokenizer.decode(greedy(language_model, ids, 6))
    assert texts(with_tokenizer(language_model, bos_id=7), ["stone"], max_new_tokens=6) == [expected]


def test_a_row_ends_at_its_stop_token_and_others_go_on(language_model, greedy):
    encode = language_model.tokenizer.encode
    plain = [greedy(language_model, encode(prompt), 12) for prompt in PROMPTS]
    stop = plain[0][4]
    stopping = with_tokenizer(language_model, eos_id=stop)
    assert stopping.stop_tokens == (stop,)

    def until_stop(ids):
        return ids[: ids.index(stop) + 1] if stop in ids else ids

    generated = ij.generate(stopping, PROMPTS, max_new_tokens=12)
    assert generated.rows() == [until_stop(row) for row in plain]
    assert len(generated.rows()[0]) <= 5
    assert generated.texts()[0] == language_model.tokenizer.decode(plain[0][: plain[0].index(stop)])


def test_sampling_follows_the_softmax(language_model):
    n = 4000
    ids = language_model.tokenizer.encode("oak piles")
    drawn = ij.generate(language_model, [ids] * n, max_new_tokens=1, temperature=2.0, key=jax.random.key(1)).rows()
    logits = language_model.forward(language_model.params, jnp.asarray([ids]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 2.0))
    counted = np.bincount([row[0] for row in drawn], minlength=256) / n
    # Total variation: its expectation under the right law is about sum sqrt(p (1 - p) / (2 pi n)).
    bound = np.sqrt(expected * (1 - expected) / (2 * np.pi * n)).sum()
    assert 0.5 * np.abs(counted - expected).sum() < 2 * bound


def test_sampling_is_the_same_for_the_same_key_and_alone_or_in_a_batch(language_model):
    key = jax.random.key(3)
    together = texts(language_model, PROMPTS, max_new_tokens=8, temperature=1.0, key=key)
    assert together == texts(language_model, PROMPTS, max_new_tokens=8, temperature=1.0, key=key)
    assert together[0] == texts(language_model, PROMPTS[:1], max_new_tokens=8, temperature=1.0, key=key)[0]
    assert together != texts(language_model, PROMPTS, max_new_tokens=8, temperature=1.0, key=jax.random.key(4))


def test_a_low_temperature_is_greedy(language_model):
    cold = texts(language_model, PROMPTS, max_new_tokens=8, temperature=1e-4, key=jax.random.key(0))
    assert cold == texts(language_model, PROMPTS, max_new_tokens=8)


def test_an_intervention_equals_a_forward_pass_with_the_edit_in_it(language_model, greedy):
    def quiet(activation):
        if activation.name == "mlp_act" and activation.layer == 1:
            return activation.value.at[..., :12].set(0.0)
        return None

    params = language_model.params
    blocks = [params["blocks"][0], {**params["blocks"][1]}]
    blocks[1]["down"] = blocks[1]["down"].at[:12].set(0.0)
    edited = dataclasses.replace(language_model, params={**params, "blocks": blocks})
    decode_ids, encode = language_model.tokenizer.decode, language_model.tokenizer.encode
    expected = [decode_ids(greedy(edited, encode(prompt), 10)) for prompt in PROMPTS]
    steered = texts(language_model, PROMPTS, max_new_tokens=10, interventions=quiet)
    assert steered == expected
    assert steered != texts(language_model, PROMPTS, max_new_tokens=10)


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_an_intervention_at_some_positions(language_model, greedy, where):
    shift = np.linspace(-2, 2, 16)

    def shifted(activation):
        if activation.name == "resid_post" and activation.layer == 0:
            return activation.value + shift
        return None

    expected = []
    for prompt in PROMPTS:
        ids = language_model.tokenizer.encode(prompt)
        at = slice(None, len(ids)) if where == "prompt" else slice(len(ids), None)

        def edit(value, name, layer, at=at):
            if (layer, name) == (0, "resid_post"):
                value[at] += shift
            return value

        expected.append(language_model.tokenizer.decode(greedy(language_model, ids, 8, edit)))
    assert texts(language_model, PROMPTS, max_new_tokens=8, interventions=shifted, where=where) == expected


@pytest.mark.caches
def test_prompts_of_like_lengths_share_a_program(language_model):
    calls = 0

    def counted(params, tokens):
        nonlocal calls
        calls += 1
        return language_model.forward(params, tokens)

    counting = dataclasses.replace(language_model, forward=counted)
    texts(counting, ["one"], max_new_tokens=8)
    traced = calls
    texts(counting, ["three"], max_new_tokens=8)
    assert calls == traced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [""]}, "no token to continue from"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["x" * 45]}, "45 tokens; with 8 new ones that exceeds the context of 48"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "at least 0"),
        ({"temperature": float("nan")}, "nan; it must be"),
        ({"temperature": 1.0}, "needs key=jax.random.key"),
    ],
)
def test_bad_input(language_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        texts(language_model, **{"prompts": ["stone"], "max_new_tokens": 8} | arguments)


def test_ids_outside_the_vocabulary(language_model):
    with pytest.raises(ValueError, match="Prompt 0 holds 256; the model's tokens are 0 to 255"):
        ij.generate(language_model, [[1, 256]], max_new_tokens=1)


def test_what_needs_a_cache_is_told(language_model):
    with pytest.raises(ValueError, match="fetch_sites does not work"):
        ij.generate(language_model, PROMPTS, max_new_tokens=2, fetch_sites="resid_post")
    with pytest.raises(ValueError, match="no cache here"):
        ij.iterate_generation(language_model, PROMPTS, max_new_tokens=2)


def test_logits_that_are_not_finite(language_model):
    def spoil(activation):
        return activation.value * jnp.nan if activation.name == "logits" else None

    with pytest.raises(FloatingPointError, match="not finite in row 0 of 1: the edit is too large"):
        texts(language_model, ["stone"], max_new_tokens=2, interventions=spoil)


def test_a_wrong_shape_names_the_site(language_model):
    def cut(activation):
        return activation.value[:, :1] if activation.name == "resid_post" else None

    with pytest.raises(ValueError, match="resid_post"):
        texts(language_model, ["stone"], max_new_tokens=2, interventions=cut)

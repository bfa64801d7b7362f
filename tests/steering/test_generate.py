import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.steering import generate
from interp_jax.steering.decoding import decode

PROMPTS = ["a", "The river was", "water at the mill"]


def with_tokenizer(language_model: LanguageModel, **ids: int) -> LanguageModel:
    backend = language_model.tokenizer._backend
    return dataclasses.replace(language_model, tokenizer=Tokenizer(backend, **ids))


def test_rows_of_different_lengths_equal_a_plain_loop_without_padding(language_model, greedy):
    encode, decode_ids = language_model.tokenizer.encode, language_model.tokenizer.decode
    expected = [decode_ids(greedy(language_model, encode(prompt), 12)) for prompt in PROMPTS]
    assert generate(language_model, PROMPTS, max_new_tokens=12) == expected


def test_a_prompt_may_fill_the_context(language_model, greedy):
    prompt = "x" * (language_model.context - 5)
    ids = language_model.tokenizer.encode(prompt)
    expected = language_model.tokenizer.decode(greedy(language_model, ids, 5))
    assert generate(language_model, [prompt], max_new_tokens=5) == [expected]


def test_bos_stands_before_the_prompt(language_model, greedy):
    ids = [7, *language_model.tokenizer.encode("stone")]
    expected = language_model.tokenizer.decode(greedy(language_model, ids, 6))
    assert generate(with_tokenizer(language_model, bos_id=7), ["stone"], max_new_tokens=6) == [expected]


def test_a_row_ends_at_its_stop_token_and_others_go_on(language_model, greedy):
    encode = language_model.tokenizer.encode
    plain = [greedy(language_model, encode(prompt), 12) for prompt in PROMPTS]
    stop = plain[0][4]
    stopping = with_tokenizer(language_model, eos_id=stop)
    assert stopping.stop_tokens == (stop,)

    def until_stop(ids):
        return ids[: ids.index(stop)] if stop in ids else ids

    ids = decode(stopping, [encode(p) for p in PROMPTS], max_new_tokens=12, temperature=0.0, keys=None)
    assert ids == [until_stop(row) for row in plain]
    assert len(ids[0]) <= 4


def test_sampling_follows_the_softmax(language_model):
    n = 4000
    ids = language_model.tokenizer.encode("oak piles")
    keys = jax.random.split(jax.random.key(1), n)
    drawn = decode(language_model, [ids] * n, max_new_tokens=1, temperature=2.0, keys=keys)
    logits = language_model.forward(language_model.params, jnp.asarray([ids]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 2.0))
    counted = np.bincount([row[0] for row in drawn], minlength=256) / n
    # Total variation: its expectation under the right law is about sum sqrt(p (1 - p) / (2 pi n)).
    bound = np.sqrt(expected * (1 - expected) / (2 * np.pi * n)).sum()
    assert 0.5 * np.abs(counted - expected).sum() < 2 * bound


def test_sampling_is_the_same_for_the_same_key_and_alone_or_in_a_batch(language_model):
    key = jax.random.key(3)
    together = generate(language_model, PROMPTS, max_new_tokens=8, temperature=1.0, key=key)
    assert together == generate(language_model, PROMPTS, max_new_tokens=8, temperature=1.0, key=key)
    assert together[0] == generate(language_model, PROMPTS[:1], max_new_tokens=8, temperature=1.0, key=key)[0]
    assert together != generate(language_model, PROMPTS, max_new_tokens=8, temperature=1.0, key=jax.random.key(4))


def test_a_low_temperature_is_greedy(language_model):
    cold = generate(language_model, PROMPTS, max_new_tokens=8, temperature=1e-4, key=jax.random.key(0))
    assert cold == generate(language_model, PROMPTS, max_new_tokens=8)


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
    steered = generate(language_model, PROMPTS, max_new_tokens=10, intervention=quiet)
    assert steered == expected
    assert steered != generate(language_model, PROMPTS, max_new_tokens=10)


def test_an_intervention_is_read_anew_each_time(language_model):
    scale = 0.0

    def shrink(activation):
        return activation.value * scale if activation.name == "resid_post" else None

    shrunk = generate(language_model, PROMPTS, max_new_tokens=6, intervention=shrink)
    scale = 1.0
    assert generate(language_model, PROMPTS, max_new_tokens=6, intervention=shrink) != shrunk


@pytest.mark.caches
def test_prompts_of_like_lengths_share_a_program(language_model):
    calls = 0

    def counted(params, tokens):
        nonlocal calls
        calls += 1
        return language_model.forward(params, tokens)

    counting = dataclasses.replace(language_model, forward=counted)
    generate(counting, ["one"], max_new_tokens=8)
    traced = calls
    generate(counting, ["three"], max_new_tokens=6)
    generate(counting, ["seven"], max_new_tokens=6, temperature=0.7, key=jax.random.key(0))
    assert calls == traced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [""]}, "no token to continue from"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["x" * 45]}, "45 tokens and 8 new ones need 53 positions, and two-layer model has 48"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": 1.0}, r"pass key=jax.random.key\(0\)"),
    ],
)
def test_bad_input(language_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(language_model, **{"prompts": ["stone"], "max_new_tokens": 8} | arguments)


def test_one_string_is_not_a_list_of_prompts(language_model):
    with pytest.raises(TypeError, match="put it into a list"):
        generate(language_model, "stone")


def test_ids_outside_the_vocabulary(language_model):
    with pytest.raises(ValueError, match="Token id 256 is outside"):
        decode(language_model, [[1, 256]], max_new_tokens=1, temperature=0.0, keys=None)


def test_logits_that_are_not_finite(language_model):
    def spoil(activation):
        return activation.value * jnp.nan if activation.name == "logits" else None

    with pytest.raises(FloatingPointError, match="not finite in row 0 of 1"):
        generate(language_model, ["stone"], max_new_tokens=2, intervention=spoil)


def test_a_wrong_shape_names_the_site(language_model):
    def cut(activation):
        return activation.value[:, :1] if activation.name == "resid_post" else None

    with pytest.raises(ValueError, match="resid_post"):
        generate(language_model, ["stone"], max_new_tokens=2, intervention=cut)

"""Pairs of prompts: what is encoded, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.attribution.prompt_pair import prompt_pair


def test_a_pair_is_the_models_tokens_with_readable_labels(tiny, pair):
    assert pair.clean.tolist() == tiny.encode_prompt("The city is the capital of the")
    assert pair.corrupted.tolist() == tiny.encode_prompt("The war is the cause of the")
    assert tiny.tokenizer.decode([pair.answer]) == " United"
    assert pair.labels[:2] == ("The", "·city")
    assert pair.position_labels[1:3] == ("·city → ·war", "·is")
    assert pair.swapped.clean.tolist() == pair.corrupted.tolist()
    assert pair.swapped.answer == pair.answer


def test_an_answer_may_be_an_id(tiny):
    for given in (7, np.int64(7), jnp.array(7)):
        answer = prompt_pair(tiny, "The city", "The war", answer=given).answer
        assert (answer, type(answer)) == (7, int)
    with pytest.raises(ValueError, match="answer is 2048; the model's tokens are 0 to 2047"):
        prompt_pair(tiny, "The city", "The war", answer=2048)


def test_prompts_of_different_lengths_are_shown_side_by_side(tiny):
    with pytest.raises(ValueError, match="clean prompt has 5 tokens and the corrupted one 4") as caught:
        prompt_pair(tiny, "The city is the capital", "The war is the")
    lines = str(caught.value).splitlines()
    assert lines[3].split() == ["1", "·city", "·war"]
    assert lines[6].split() == ["4", "·capital", "-"]
    assert "align=" in lines[-1]


def test_align_puts_a_token_before_the_shorter_prompt(tiny):
    pair = prompt_pair(tiny, "The city is the capital", "The war is", align="\n")
    (filler,) = tiny.tokenizer.encode("\n")
    assert pair.corrupted.tolist() == [filler, filler, *tiny.encode_prompt("The war is")]
    assert pair.corrupted_labels[0] == "↵"
    with pytest.raises(ValueError, match="align='xyzzy' is 5 tokens"):
        prompt_pair(tiny, "The city is the", "The war is", align="xyzzy")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"answer": " Unitedness"}, "answer=' Unitedness' is .* tokens: '·United'"),
        ({"answer": "United"}, "But ' United' is one token"),
        ({"answer": ""}, "no token at all"),
        ({"answer": " war", "wrong": " war"}, "are the same"),
        ({"wrong": " war"}, "no answer to compare"),
        ({"answer": jnp.array([3, 5])}, r"answer=.*\[3, 5\].* is not one token: give its text or its id"),
    ],
)
def test_answers_that_are_no_single_token_are_refused(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        prompt_pair(tiny, "The city", "The war", **given)


def test_the_same_prompt_twice_and_too_long_ones_are_refused(tiny):
    with pytest.raises(ValueError, match="Both prompts are the same"):
        prompt_pair(tiny, "The city", "The city")
    long = " the" * 200
    with pytest.raises(ValueError, match="made for at most 128"):
        prompt_pair(tiny, "The" + long, "A" + long)
    assert np.issubdtype(prompt_pair(tiny, "The city", "The war").clean.dtype, np.integer)

"""Generation against passes over the whole text, one token at a time, without cache or padding."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_hugging_face import CASES, write_directory

import interp_jax as ij
from interp_jax.models.continue_rows import checked_rows, checked_settings
from interp_jax.models.decoding import Sampling, picked
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.tiny import load_tiny
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import apply

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

PROMPTS = [[3, 14, 15, 9, 2, 6], [5, 35], [8, 9, 7, 9]]
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3_text"]
NEW = 6


def load(tmp_path_factory, case):
    return load_hugging_face(write_directory(tmp_path_factory.mktemp(case), case))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tmp_path_factory, "llama")


def whole_text(forward, model, prompt, new=NEW):
    """The likeliest continuation, by a pass over all of the text for each token. Rows are filled up on the right."""
    row = np.zeros((1, len(prompt) + new), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), row.shape[1]):
        row[0, at] = int(forward(model, row)[0, at - 1].argmax())
    return row[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_the_likeliest_tokens_are_those_without_a_cache(case, tmp_path_factory):
    model = load(tmp_path_factory, case)
    generated = ij.generate(model, PROMPTS, max_new_tokens=NEW)
    forward = jax.jit(apply)
    assert generated.rows() == [whole_text(forward, model, prompt) for prompt in PROMPTS]


def test_of_equally_likely_tokens_the_first_is_taken():
    logits = jnp.zeros((3, 300)).at[1, [131, 299]].set(1.0).at[2, 200].set(jnp.nan)
    sampling = Sampling(is_greedy=True, top_k=None, has_top_p=False, stop_tokens=())
    assert picked(logits, None, 0, 1.0, 1.0, sampling).tolist() == logits.argmax(axis=1).tolist() == [0, 131, 200]


def shifted(positions_of_prompt=None):
    """A pass over the whole text with the stream shifted after layer 1: everywhere, or in or after the prompt."""

    def forward(model, tokens):
        for _, _, value in (running := ij.iterate(apply, sites="resid_post", layers=1)(model, tokens)):
            at = jnp.arange(value.shape[1])[:, None]
            is_edited = True
            if positions_of_prompt is not None:
                length, inside = positions_of_prompt
                is_edited = (at < length) if inside else (at >= length)
            running.modified_value = jnp.where(is_edited, value + SHIFT, value)
        return running.retval

    return jax.jit(forward)


SHIFT = 1.5 * np.sin(np.arange(24, dtype=np.float32))


def shift(activation):
    if (activation.layer, activation.name) == (1, "resid_post"):
        return activation.value + SHIFT
    return None


@pytest.mark.parametrize("where", [pytest.param("prompt", marks=pytest.mark.slow), "generated", "both"])
def test_an_intervention_is_that_of_a_pass_over_the_whole_text(llama, where):
    generated = ij.generate(llama, PROMPTS, max_new_tokens=NEW, interventions=shift, where=where).rows()
    expected = []
    for prompt in PROMPTS:
        of_prompt = None if where == "both" else (len(prompt), where == "prompt")
        expected.append(whole_text(shifted(of_prompt), llama, prompt))
    assert generated == expected
    assert generated != ij.generate(llama, PROMPTS, max_new_tokens=NEW).rows()


@pytest.mark.slow
def test_activations_are_those_of_a_pass_over_the_whole_text(llama):
    sites = ("resid_post", "q", "attn_probs", "logits")
    generated = ij.generate(llama, PROMPTS, max_new_tokens=NEW, fetch_sites=sites, fetch_layers=(0, 2, None))
    assert generated.activations[2, "resid_post"].shape == (3, NEW, 24)
    assert (1, "resid_post") not in generated.activations
    longest = max(map(len, PROMPTS))
    for row, (prompt, new) in enumerate(zip(PROMPTS, generated.rows(), strict=True)):
        _, values = ij.fetch(apply)(llama, jnp.asarray([prompt + new]))
        seen = slice(len(prompt) - 1, len(prompt) + NEW - 1)
        for site in ((0, "resid_post"), (2, "resid_post"), (2, "q"), (None, "logits")):
            np.testing.assert_allclose(generated.activations[site][row], values[site][0, seen], atol=3e-5)
        # Over the keys: padding first, which nothing sees.
        probs = generated.activations[2, "attn_probs"][row]
        n_pads = longest - len(prompt)
        assert not probs[:, :, :n_pads].any()
        expected = values[2, "attn_probs"][0].swapaxes(0, 1)[seen]
        np.testing.assert_allclose(probs[:, :, n_pads:], expected, atol=1e-5)


@pytest.mark.slow
def test_the_loop_is_the_same_as_the_function(llama):
    seen = []
    loop = ij.iterate_generation(llama, PROMPTS, max_new_tokens=3, sites="resid_post", layers=(1, 2))
    for position, layer, name, value in (running := loop):
        seen.append((position, layer, name, value.shape))
        assert isinstance(value, jax.Array)
        assert not isinstance(value, jax.core.Tracer)
        if layer == 1:
            running.modified_value = value + SHIFT
        running.save(f"{position}/{layer}", value[:, -1])
    assert seen == [
        (position, layer, "resid_post", (3, length, 24))
        for position, length in ((0, 6), (6, 1), (7, 1))
        for layer in (1, 2)
    ]
    generated = ij.generate(
        llama, PROMPTS, max_new_tokens=3, interventions=shift, fetch_sites="resid_post", fetch_layers=2
    )
    assert running.retval.rows() == generated.rows()
    saved = np.stack([running.saved[f"{position}/2"] for position in (0, 6, 7)], axis=1)
    np.testing.assert_allclose(saved, generated.activations[2, "resid_post"], atol=3e-5)


def test_a_loop_that_is_left_ends_the_generation(llama):
    for position, _, _, _ in (running := ij.iterate_generation(llama, PROMPTS, max_new_tokens=50 - 24, sites="logits")):
        if position:
            break
    with pytest.raises(RuntimeError, match="the loop was left before the end"):
        _ = running.retval
    assert float(jnp.ones(3).sum()) == 3.0


@pytest.mark.slow
def test_a_row_ends_at_its_stop_token(llama):
    free = ij.generate(llama, PROMPTS, max_new_tokens=NEW).rows()
    stop = free[0][2]
    cut = ij.generate(llama, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop])
    for row, whole in zip(cut.rows(), free, strict=True):
        length = whole.index(stop) + 1 if stop in whole else NEW
        assert row == whole[:length]
    assert (cut.tokens[0, cut.n_generated[0] :] == -1).all()
    for _ in (running := ij.iterate_generation(llama, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop], sites="embed")):
        pass
    np.testing.assert_array_equal(running.retval.tokens, cut.tokens)


@pytest.mark.slow
def test_samples_follow_the_model_s_probabilities(llama):
    n = 4000
    logits = np.asarray(apply(llama, jnp.asarray([PROMPTS[0]]))[0, -1], np.float64) / 1.7
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    drawn = ij.generate(llama, [PROMPTS[0]] * n, max_new_tokens=1, temperature=1.7, key=jax.random.key(1)).tokens[:, 0]
    counts = np.bincount(drawn, minlength=60)
    often = probabilities * n > 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probabilities[often], probabilities[~often].sum()) * n
    assert stats.chisquare(observed, expected).pvalue > 1e-3

    order = np.argsort(-probabilities)
    only = ij.generate(
        llama, [PROMPTS[0]] * 500, max_new_tokens=1, temperature=1.7, top_k=3, key=jax.random.key(2)
    ).tokens[:, 0]
    assert set(np.unique(only)) == set(order[:3])
    reached = int(np.searchsorted(np.cumsum(probabilities[order]), 0.5)) + 1
    nucleus = ij.generate(
        llama, [PROMPTS[0]] * 1000, max_new_tokens=1, temperature=1.7, top_p=0.5, key=jax.random.key(3)
    ).tokens[:, 0]
    assert set(np.unique(nucleus)) == set(order[:reached])


@pytest.mark.slow
def test_a_key_draws_the_same_rows_whatever_stands_beside_them(llama):
    options = {"max_new_tokens": NEW, "temperature": 1.0, "key": jax.random.key(5)}
    together = ij.generate(llama, PROMPTS, **options).rows()
    assert together[:1] == ij.generate(llama, PROMPTS[:1], **options).rows()
    assert together == ij.generate(llama, PROMPTS, **options).rows()
    for _ in (running := ij.iterate_generation(llama, PROMPTS, sites="embed", **options)):
        pass
    assert running.retval.rows() == together


def test_a_language_model_by_name():
    tiny = load_tiny()
    prompt = tiny.tokenizer.encode("The city is one of the largest")
    (row,) = ij.generate(tiny, [prompt], max_new_tokens=12).rows()
    assert row == whole_text(jax.jit(apply), tiny.params, prompt, 12)


def test_prompts_as_text():
    tiny = load_tiny()
    texts = ["The city is one of the largest", "In 1914"]
    by_text = ij.generate(tiny, texts, max_new_tokens=12, stop_tokens=())
    by_ids = ij.generate(tiny, [tiny.tokenizer.encode(text) for text in texts], max_new_tokens=12, stop_tokens=())
    assert by_text.rows() == by_ids.rows()
    assert by_text.texts() == [tiny.tokenizer.decode(row) for row in by_ids.rows()]
    assert ij.generate(tiny, texts[0], max_new_tokens=12, stop_tokens=()).texts() == by_text.texts()[:1]


@pytest.mark.slow
def test_texts_begin_with_bos_where_the_model_expects_it_and_end_at_its_stop_tokens():
    tiny = load_tiny()
    prompt = "The city is one of the largest"
    free = ij.generate(tiny, [[7, *tiny.tokenizer.encode(prompt)]], max_new_tokens=8, stop_tokens=()).rows()[0]
    begun = Tokenizer(tiny.tokenizer._backend, bos_id=7, eos_id=free[5])
    model = dataclasses.replace(tiny, tokenizer=begun, more_stop_tokens=(free[3],))
    generated = ij.generate(model, prompt, max_new_tokens=8)
    first = min(free.index(free[5]), free.index(free[3]))
    assert generated.rows() == [free[: first + 1]]
    assert generated.texts() == [tiny.tokenizer.decode(free[:first])]
    for _ in (running := ij.iterate_generation(model, prompt, max_new_tokens=8, sites="embed")):
        pass
    assert running.retval.texts() == generated.texts()


def push(direction, strength, activation):
    if (activation.layer, activation.name) == (1, "resid_post"):
        return activation.value + strength * direction
    return None


def test_a_partial_varies_without_another_trace(llama):
    traced = []

    def counted(direction, strength, activation):
        traced.append(activation.name)
        return push(direction, strength, activation)

    def generated(strength):
        partial = jax.tree_util.Partial(counted, jnp.asarray(SHIFT), strength)
        return ij.generate(llama, PROMPTS, max_new_tokens=NEW, interventions=partial).rows()

    whole = ij.generate(llama, PROMPTS, max_new_tokens=NEW, interventions=shift).rows()
    assert generated(1.0) == whole
    once = len(traced)
    assert generated(0.0) == ij.generate(llama, PROMPTS, max_new_tokens=NEW).rows() != whole
    assert len(traced) == once


def test_texts_need_a_tokenizer(llama):
    with pytest.raises(ValueError, match="A Transformer has no tokenizer for texts; give generate the LanguageModel"):
        ij.generate(llama, "The city", max_new_tokens=2)
    with pytest.raises(ValueError, match="A Transformer has no tokenizer; give generate the LanguageModel"):
        ij.generate(llama, PROMPTS, max_new_tokens=2).texts()
    with pytest.raises(ValueError, match="The prompt '' has no token to continue from"):
        ij.generate(load_tiny(), ["The city", ""], max_new_tokens=2)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "There are no prompts"),
        ([[1], []], {}, "Prompt 1 is empty: begin it with"),
        ([[1, 60]], {}, "Prompt 0 holds 60; the model's tokens are 0 to 59"),
        ([[1, -1]], {}, "Prompt 0 holds -1"),
        ([[1] * 27], {}, "27 tokens; with 6 new ones that exceeds the context of 32"),
        ([[1]], {"temperature": 1.0}, "needs key=jax.random.key"),
        ([[1]], {"temperature": -1.0}, "at least 0"),
        ([[1]], {"top_k": 61}, "from 1 to the vocabulary's 60"),
        ([[1]], {"top_p": 0.0}, "above 0 and at most 1"),
        ([[1]], {"stop_tokens": [99]}, r"holds \[99\]; the model's tokens are 0 to 59"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"where": "nowhere"}, "must be 'prompt', 'generated' or 'both'"),
    ],
)
def test_what_cannot_be_is_said_first(llama, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        ij.generate(llama, prompts, **({"max_new_tokens": NEW} | options))


def test_what_is_of_no_fitting_type_is_said_where_types_are_not_checked(llama):
    rows, settings = inspect.unwrap(checked_rows), inspect.unwrap(checked_settings)
    with pytest.raises(ValueError, match=r"Prompt 0 has shape \(\); prompts are texts, or a list of ids for each row"):
        rows(llama, [1, 2], 2)
    with pytest.raises(ValueError, match=r"Prompt 0 has shape \(2, 2\)"):
        rows(llama, [[[1, 2], [3, 4]]], 2)
    with pytest.raises(ValueError, match="Prompt 1 holds float64 values; token ids are whole numbers"):
        rows(llama, [[1], [1.5]], 2)
    with pytest.raises(ValueError, match=r"holds \[1.5\]; the model's tokens are 0 to 59"):
        settings(0.0, None, None, None, [1.5], 60)
    with pytest.raises(ValueError, match="interventions is a dict; it must be one function"):
        inspect.unwrap(ij.generate)(llama, PROMPTS, max_new_tokens=2, interventions={(0, "mlp_out"): 0.0})


def test_a_site_that_does_not_exist(llama):
    for intervention in (None, shift):
        with pytest.raises(ij.SiteError, match="mlp_uot"):
            ij.generate(llama, PROMPTS, max_new_tokens=2, interventions=intervention, fetch_sites="mlp_uot")


def test_a_layer_that_does_not_exist(llama):
    for intervention in (None, shift):
        for site, layers in (("resid_post", (0, 9)), ("embed", 0)):
            with pytest.raises(ij.SiteError, match=r"no site|none of"):
                ij.generate(
                    llama, PROMPTS, max_new_tokens=2, interventions=intervention, fetch_sites=site, fetch_layers=layers
                )


def test_the_loop_tells_of_logits_that_are_not_finite(llama):
    seen = []
    with pytest.raises(FloatingPointError, match="The logits are not finite in row 1 of 3"):
        for position, _, _, value in (
            running := ij.iterate_generation(llama, PROMPTS, max_new_tokens=9, sites="embed")
        ):
            seen.append(position)
            if position:
                running.modified_value = value.at[1].mul(jnp.inf)
    assert seen == [0, 6]  # at the first pass that has some


def test_a_wrong_shape_from_an_intervention_names_the_site(llama):
    with pytest.raises(ij.SiteError, match=r"mlp_out"):
        ij.generate(
            llama, PROMPTS, max_new_tokens=2, interventions=lambda at: at.value[:, :0] if at.name == "mlp_out" else None
        )


def test_every_case_is_a_family_that_the_tests_know():
    assert set(FAMILIES) <= set(CASES)

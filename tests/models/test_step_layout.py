"""Copies of a model that the steps of a generation read, against the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import whole_text
from test_hugging_face import write_directory

import interp_jax as ij
from interp_jax.models import continue_rows, step_layout
from interp_jax.models.cached_decoding import decode_with_cache
from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.step_layout import laid_out, laid_out_for_steps
from interp_jax.models.transformer import Transformer, apply, unrolled
from interp_jax.models.transformer_config import TransformerConfig

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3_text"]
PROMPTS = [[3, 14, 15, 9, 2, 6], [5, 35], [8, 9, 7, 9]]
NEW = 20
WAYS = {
    "turned": {"is_turned": True, "is_unrolled": False},
    "unrolled": {"is_turned": False, "is_unrolled": True},
    "turned and unrolled": {"is_turned": True, "is_unrolled": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return load_hugging_face(write_directory(tmp_path_factory.mktemp(request.param), request.param))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [lambda model: model, unrolled], ids=["stacked", "unrolled"])
def test_however_the_weights_lie_the_logits_are_the_models(model, way, layers):
    tokens = jnp.asarray([[3, 14, 15], [5, 35, 2]])
    expected, found = (jax.jit(apply)(each, tokens) for each in (model, laid_out(layers(model), **WAYS[way])))
    # Sums in another order through all layers: a hundred times the dtype's epsilon.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def damped(activation):
    return 0.5 * activation.value if (activation.layer, activation.name) == (1, "mlp_out") else None


@pytest.mark.parametrize("way", WAYS)
def test_what_is_generated_edited_and_fetched_is_the_same(model, way, monkeypatch):
    def generated():
        return ij.generate(
            model, PROMPTS, max_new_tokens=NEW, interventions=damped, fetch_sites=("mlp_out", "logits"),
            fetch_layers=(1, None), stop_tokens=(),
        )  # fmt: skip

    expected = generated()
    asked = []
    monkeypatch.setattr(
        continue_rows, "laid_out_for_steps", lambda model, *args: asked.append(args) or laid_out(model, **WAYS[way])
    )
    found, again = generated(), generated()
    plain = ij.generate(model, PROMPTS, max_new_tokens=NEW, stop_tokens=()).rows()
    assert plain == [whole_text(jax.jit(apply), model, prompt, NEW) for prompt in PROMPTS]
    assert asked == [(len(PROMPTS), NEW)] * 3
    assert found.rows() == expected.rows() == again.rows()
    assert list(found.activations) == list(expected.activations) == [(1, "mlp_out"), (None, "logits")]
    for at, value in expected.activations.items():
        np.testing.assert_allclose(found.activations[at], value, atol=1e-5 * np.abs(value).max())


def test_a_copy_is_no_other_program(model, monkeypatch):
    monkeypatch.setattr(
        continue_rows, "laid_out_for_steps", lambda model, *_: laid_out(model, **WAYS["turned and unrolled"])
    )
    ij.generate(model, PROMPTS, max_new_tokens=3)
    n_programs = decode_with_cache._cache_size()
    ij.generate(model, PROMPTS, max_new_tokens=3)
    assert decode_with_cache._cache_size() == n_programs


SMALL = TransformerConfig(
    vocab_size=50, d_model=16, n_layers=4, n_heads=2, n_kv_heads=2, d_head=8, d_mlp=32, context=9000
)


def what_is_done(model, batch, max_new_tokens):
    found = laid_out_for_steps(model, batch, max_new_tokens)
    if found is None:
        return "nothing"
    is_turned = hasattr((found.blocks if found.is_stacked else found.blocks[0]).attn, "W_qkv")
    is_unrolled = model.is_stacked and not found.is_stacked
    return " and ".join(what for what, is_done in (("turned", is_turned), ("unrolled", is_unrolled)) if is_done)


def test_weights_are_copied_where_that_pays(monkeypatch):
    model = Transformer(SMALL, jax.random.key(0))
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
    assert [what_is_done(model, batch, 31) for batch in (1, 2, 32)] == ["nothing"] * 3
    assert [what_is_done(model, batch, 32) for batch in (1, 2, 32, 33)] == ["nothing", "turned", "turned", "nothing"]
    worth = {"one row": 120, "several rows": 40, "several rows in bfloat16": 20}
    monkeypatch.setattr(
        step_layout, "_BYTES_WORTH_A_LAYER", {key: n * n_bytes / SMALL.n_layers for key, n in worth.items()}
    )
    assert [what_is_done(model, 2, steps) for steps in (39, 40)] == ["turned", "turned and unrolled"]
    assert [what_is_done(model, 1, steps) for steps in (119, 120)] == ["nothing", "unrolled"]
    assert what_is_done(unrolled(model), 2, 40) == "turned"
    assert what_is_done(unrolled(model), 1, 120) == "nothing"
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert [what_is_done(narrow, 2, steps) for steps in (39, 40)] == ["turned", "turned and unrolled"]
    monkeypatch.setattr(step_layout, "_MOST_BYTES", n_bytes)
    assert what_is_done(model, 2, 40) == "nothing"


def test_under_jit_nothing_is_copied():
    model = Transformer(SMALL, jax.random.key(0))
    assert jax.jit(lambda model: jnp.asarray(laid_out_for_steps(model, 16, 9000) is None))(model)

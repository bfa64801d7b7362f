"""The patched Flax Llama: a small random one against NumPy in float64, and SmolLM2 by its loss on real text."""

import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.activations.wikipedia import reference_rows
from interp_jax.models.flax_llama import load_llama_gguf, load_smollm2
from interp_jax.models.loss import next_token_loss

pytestmark = pytest.mark.demo

VOCAB, D_MODEL, D_MLP, N_LAYERS, N_HEADS, N_KV_HEADS, THETA, EPSILON = 96, 32, 64, 2, 4, 2, 100_000.0, 1e-5
D_HEAD = D_MODEL // N_HEADS


def _weights() -> dict[str, np.ndarray]:
    """Random weights in the order of the Llama paper's reference code: heads one after another, halves rotated."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, D_MODEL), "output_norm": (D_MODEL,)}
    for layer in range(N_LAYERS):
        block = {
            "attn_norm": (D_MODEL,),
            "attn_q": (D_MODEL, D_MODEL),
            "attn_k": (N_KV_HEADS * D_HEAD, D_MODEL),
            "attn_v": (N_KV_HEADS * D_HEAD, D_MODEL),
            "attn_output": (D_MODEL, D_MODEL),
            "ffn_norm": (D_MODEL,),
            "ffn_gate": (D_MLP, D_MODEL),
            "ffn_up": (D_MLP, D_MODEL),
            "ffn_down": (D_MODEL, D_MLP),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {
        f"{name}.weight": (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's order, row by row: row 2i + h of a head is row i + h * d_head / 2 of the original."""
    rows = []
    for head in range(n_heads):
        for i in range(D_HEAD // 2):
            rows += [weight[head * D_HEAD + i], weight[head * D_HEAD + i + D_HEAD // 2]]
    return np.stack(rows)


def _write(path: pathlib.Path, weights: dict[str, np.ndarray], *, architecture="llama", **changed) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, architecture)
    integers = {
        "block_count": N_LAYERS,
        "context_length": 64,
        "embedding_length": D_MODEL,
        "feed_forward_length": D_MLP,
        "attention.head_count": N_HEADS,
        "attention.head_count_kv": N_KV_HEADS,
    } | changed
    for key, value in integers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", THETA)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", EPSILON)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", [chr(33 + i) for i in range(VOCAB - 2)] + ["Ġ", "!!"])
    writer.add_array("tokenizer.ggml.token_type", [1] * VOCAB)
    writer.add_array("tokenizer.ggml.merges", ["! !"])
    for name, values in weights.items():
        heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(name.split(".")[-2])
        writer.add_tensor(name, _permuted(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _reference(weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """A Llama position by position in float64: RMS norms, rotary embedding, grouped queries, SwiGLU, tied head."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale

    def rotated(x, position):
        half = D_HEAD // 2
        angle = position / THETA ** (np.arange(half) / half)
        first, second = x[:half], x[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    logits = np.empty((*tokens.shape, VOCAB))
    for row, ids in enumerate(tokens):
        x = w["token_embd.weight"][ids]
        for layer in range(N_LAYERS):
            prefix = f"blk.{layer}."
            b = {name.split(".")[2]: values for name, values in w.items() if name.startswith(prefix)}
            y = norm(x, b["attn_norm"])
            out = np.zeros_like(x)
            for head in range(N_HEADS):
                group = head // (N_HEADS // N_KV_HEADS)
                mine, shared = slice(head * D_HEAD, (head + 1) * D_HEAD), slice(group * D_HEAD, (group + 1) * D_HEAD)
                q = [rotated(b["attn_q"][mine] @ v, t) for t, v in enumerate(y)]
                k = [rotated(b["attn_k"][shared] @ v, t) for t, v in enumerate(y)]
                for t in range(len(ids)):
                    scores = np.array([q[t] @ k[s] for s in range(t + 1)]) / np.sqrt(D_HEAD)
                    pattern = np.exp(scores - scores.max())
                    pattern /= pattern.sum()
                    out[t, mine] = pattern @ (y[: t + 1] @ b["attn_v"][shared].T)
            x = x + out @ b["attn_output"].T
            y = norm(x, b["ffn_norm"])
            gate = y @ b["ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ b["ffn_up"].T)) @ b["ffn_down"].T
        logits[row] = norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T
    return logits


@pytest.fixture(scope="module")
def weights():
    return _weights()


@pytest.fixture(scope="module")
def small(weights, tmp_path_factory):
    return load_llama_gguf(_write(tmp_path_factory.mktemp("llama") / "small.gguf", weights), name="small", context=32)


TOKENS = np.random.default_rng(1).integers(0, VOCAB, size=(2, 9))


def test_logits_agree_with_numpy(small, weights):
    logits = jax.jit(small.forward)(small.params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, _reference(weights, TOKENS), atol=2e-4)


def test_facts(small):
    facts = (small.n_layers, small.d_model, small.vocab_size, small.context)
    assert facts == (N_LAYERS, D_MODEL, VOCAB, 32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(small.params))


def test_the_future_is_not_seen(small):
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = np.split(jax.jit(small.forward)(small.params, jnp.concatenate([TOKENS, changed])), 2)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1).min() > 1e-2


def test_the_loop_sees_every_layer_and_its_edits_count(small):
    layers = []

    @jax.jit
    def without_the_last_stream(params, tokens):
        for layer, _, value in (running := ij.iterate(small.forward, sites=("resid_post",))(params, tokens)):
            layers.append(layer)
            if layer == N_LAYERS - 1:
                running.save("last", value)
                running.modified_value = jnp.zeros_like(value)
        return running.retval, running.saved["last"]

    logits, last = without_the_last_stream(small.params, jnp.asarray(TOKENS))
    assert layers == list(range(N_LAYERS))
    np.testing.assert_allclose(logits, 0.0, atol=1e-6)
    assert last.shape == (*TOKENS.shape, D_MODEL)


def test_unembedding_the_last_stream_is_the_head_but_for_the_norm(small, weights):
    @jax.jit
    def run(params, tokens):
        passing = ij.iterate(small.forward, sites=("resid_post",), layers=(N_LAYERS - 1,))
        for _, _, value in (running := passing(params, tokens)):
            running.save("last", value)
        return running.saved["last"][0]

    last = run(small.params, jnp.asarray(TOKENS))
    rms = np.sqrt((np.asarray(last, np.float64) ** 2).mean(-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(small.unembed(small.params, last) / rms, _reference(weights, TOKENS)[0], atol=2e-4)


def test_the_embedding_has_one_gradient_for_both_its_uses(small):
    def loss(params):
        return next_token_loss(small.forward(params, jnp.asarray(TOKENS)), jnp.asarray(TOKENS))

    gradient = jax.jit(jax.grad(loss))(small.params)["model"]["embed_tokens"]["embedding"]
    # An id that is neither read nor a target still is one of the softmax's outputs.
    unused = np.setdiff1d(np.arange(VOCAB), TOKENS)
    assert np.abs(gradient[unused]).sum(-1).min() > 0


def test_rows_longer_than_the_context_are_refused(small):
    with pytest.raises(ValueError, match="33 tokens exceed the context of 32"):
        small.forward(small.params, jnp.zeros((1, 33), jnp.int32))


def test_files_that_do_not_fit_are_refused(weights, tmp_path):
    without = {name: values for name, values in weights.items() if name != "blk.1.ffn_up.weight"}
    extra = without | {"blk.1.attn_q.bias": np.zeros(D_MODEL, np.float32)}
    with pytest.raises(ValueError, match=r"Missing: blk\.1\.ffn_up\.weight\. Unknown: blk\.1\.attn_q\.bias\."):
        load_llama_gguf(_write(tmp_path / "a.gguf", extra), name="x", context=32)
    with pytest.raises(ValueError, match=r"architecture 'mamba', expected 'llama'"):
        load_llama_gguf(_write(tmp_path / "b.gguf", weights, architecture="mamba"), name="x", context=32)
    with pytest.raises(ValueError, match=r"ffn_gate\.weight has shape \(64, 32\), its metadata ask for \(48, 32\)"):
        load_llama_gguf(_write(tmp_path / "c.gguf", weights, feed_forward_length=48), name="x", context=32)
    with pytest.raises(ValueError, match="context=65, but x was made for 1 to 64 tokens"):
        load_llama_gguf(_write(tmp_path / "d.gguf", weights), name="x", context=65)


FOUR_PARAGRAPHS = [
    "The train left the station a few minutes late, and by the time it reached the coast the sun was already going "
    "down. Anna put her book away and looked out of the window at the sea. She had not been back here for ten years, "
    "and yet nothing seemed to have changed: the same small houses, the same boats, the same light on the water.",
    "Photosynthesis is the process by which green plants use the energy of sunlight to make sugar from carbon dioxide "
    "and water. It takes place in the chloroplasts of the leaf, where a pigment called chlorophyll absorbs the light. "
    "Oxygen is released as a by-product, and almost all animals depend on it.",
    "The city council voted on Tuesday to approve a new budget for public schools. Under the plan, the district will "
    "hire forty teachers and repair the roofs of six buildings before the end of the year. Parents who attended the "
    "meeting said they were relieved, though some asked why the decision had taken so long.",
    "To make a simple tomato sauce, heat two tablespoons of olive oil in a large pan and cook a chopped onion until it "
    "is soft. Add two cloves of garlic and stir for a minute. Pour in a can of tomatoes, season with salt and pepper, "
    "and let the sauce simmer for about twenty minutes before serving it over pasta.",
]


@pytest.fixture(scope="module")
def smollm2():
    return load_smollm2(context=128)


# By transformers 4.57.6 on PyTorch 2.13.0, the same GGUF file, float32.
PYTORCH_LOSSES = [2.632717, 2.350071, 3.221055, 2.192921]
PYTORCH_LOSS_ON_REFERENCE_ROWS = 3.136101


@pytest.mark.slow
def test_smollm2_loses_on_english_what_it_loses_in_pytorch(smollm2):
    ids = [smollm2.tokenizer.encode(paragraph) for paragraph in FOUR_PARAGRAPHS]
    padded = np.zeros((4, max(map(len, ids))), np.int32)  # Causal: what is after a text does not change its loss.
    for row, paragraph in zip(padded, ids, strict=True):
        row[: len(paragraph)] = paragraph
    logits = jax.jit(smollm2.forward)(smollm2.params, jnp.asarray(padded))
    losses = [next_token_loss(logits[i : i + 1, : len(ids[i])], jnp.asarray([ids[i]])) for i in range(4)]
    np.testing.assert_allclose(losses, PYTORCH_LOSSES, atol=2e-4)


@pytest.mark.slow
def test_smollm2_loses_on_the_excerpt_what_it_loses_in_pytorch(smollm2):
    rows = jnp.asarray(reference_rows(smollm2.tokenizer))
    loss = jax.jit(lambda params, tokens: next_token_loss(smollm2.forward(params, tokens), tokens))
    losses = [loss(smollm2.params, half) for half in (rows[:8], rows[8:])]
    assert np.mean(losses) == pytest.approx(PYTORCH_LOSS_ON_REFERENCE_ROWS, abs=2e-4)


@pytest.mark.slow
@pytest.mark.caches
def test_a_clean_call_gives_the_same_bits_before_and_after_two_passes(smollm2):
    tokens = jnp.asarray([smollm2.tokenizer.encode(FOUR_PARAGRAPHS[0])])
    clean = jax.jit(smollm2.forward)

    @jax.jit
    def forward(params, tokens):
        for layer, name, value in (running := ij.iterate(smollm2.forward)(params, tokens)):
            if name == "mlp_out" and layer == 6:
                running.modified_value = value.at[:, :, 17].set(0.0)
            if name == "resid_post":
                running.save(f"norm/{layer}", jnp.linalg.norm(value, axis=-1))
        return running.retval, running.saved

    before = np.asarray(clean(smollm2.params, tokens))
    (first, saved), (second, saved_again) = forward(smollm2.params, tokens), forward(smollm2.params, tokens)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, saved, saved_again)
    assert len(saved) == 30
    assert not np.array_equal(first, before)
    np.testing.assert_array_equal(clean(smollm2.params, tokens), before)
    np.testing.assert_array_equal(jax.jit(lambda *args: smollm2.forward(*args))(smollm2.params, tokens), before)

"""The committed tiny model: whole, quick to load, as good as its record says; and the script that made it, small."""

import dataclasses
import json
import math
import shutil
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import interp_jax.instrument as instrument
from interp_jax import train_tiny
from interp_jax.models import ngram, transformer
from interp_jax.models.loss import next_token_loss, next_token_losses
from interp_jax.models.tiny import load_tiny
from interp_jax.train_tiny import Texts, TrainTinyConfig

FILES = Path(str(resources.files("interp_jax.models"))) / "tiny_wikipedia"

# Written for this test, so in no model's training text.
PROSE = (
    "The river rises in the mountains of the north and flows through the capital before it reaches the sea. In the "
    "19th century the government built a bridge over it, which was the first of its kind in the country. Most of the "
    "people who lived in the city at that time worked in one of the large factories along the river."
)


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@pytest.fixture(scope="module")
def record():
    return json.loads((FILES / "training.json").read_text())


def test_the_weights_are_at_most_4_mb():
    assert (FILES / "model.safetensors").stat().st_size <= 4_000_000


def test_it_states_what_it_is(tiny):
    assert tiny.vocab_size == tiny.tokenizer.vocab_size == 2048
    logits = jax.jit(tiny.forward)(tiny.params, jnp.zeros((1, 3), jnp.int32))
    assert logits.shape == (1, 3, tiny.vocab_size)
    table = instrument.list_sites(tiny.forward)(tiny.params, jnp.zeros((1, 3), jnp.int32))
    resid = [site for site in table if site.name == "resid_post"]
    assert [site.layer for site in resid] == list(range(tiny.n_layers))
    assert {site.shape for site in resid} == {(1, 3, tiny.d_model)}


def test_it_reads_english_it_has_not_seen_far_better_than_shuffled(tiny):
    tokens = np.array([tiny.tokenizer.encode(PROSE)])
    shuffled = np.random.default_rng(0).permutation(tokens, axis=1)
    loss = jax.jit(lambda params, tokens: next_token_loss(tiny.forward(params, tokens), tokens))
    assert loss(tiny.params, tokens) < 4.5
    assert loss(tiny.params, shuffled) > 7.0


def test_it_goes_on_as_english_does(tiny):
    tokens = jnp.array([tiny.tokenizer.encode("The city is one of the largest in the United")])
    best = int(jax.jit(tiny.forward)(tiny.params, tokens)[0, -1].argmax())
    assert tiny.tokenizer.decode([best]) == " States"


def test_any_text_goes_through_the_tokenizer_and_back(tiny):
    for text in (PROSE, "  two  spaces\n\ttab", "naïve — 東京 🙂", ""):
        ids = tiny.tokenizer.encode(text)
        assert tiny.tokenizer.decode(ids) == text
        assert all(0 <= id_ < tiny.vocab_size for id_ in ids)


def test_the_end_of_text_is_known_and_no_begin_of_text_is_claimed(tiny):
    assert tiny.tokenizer.decode([tiny.tokenizer.end_of_text_id]) == train_tiny.END_OF_TEXT
    assert tiny.tokenizer.bos_id is None


def test_unembed_gives_the_logits_of_the_last_residual_up_to_its_norm(tiny):
    tokens = jnp.array([tiny.tokenizer.encode(PROSE)[:8]])
    logits, values = jax.jit(instrument.fetch(tiny.forward, ["resid_post"], [tiny.n_layers - 1]))(tiny.params, tokens)
    last = values[tiny.n_layers - 1, "resid_post"][0]
    rms = jnp.sqrt(jnp.square(last).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(tiny.unembed(tiny.params, last) / rms, logits[0], rtol=1e-3, atol=1e-3)


def test_the_record_holds_what_was_promised(record):
    losses = record["held_out_loss_nats_a_token"]
    assert losses["transformer"] <= losses["bigram"] - 0.5
    assert losses["bigram"] < losses["unigram"] < math.log(2048)
    assert not set(record["held_out_articles"]) & set(record["stopping_articles"])
    assert "<svg" in (FILES / "training_curve.svg").read_text()


@pytest.mark.slow
def test_the_recorded_losses_are_reached_on_the_articles_held_out(tiny, record):
    from interp_jax.activations.tokens import pack
    from interp_jax.activations.wikipedia import articles

    texts = articles()
    parts: dict[str, list[str]] = {"train": [], "stopping": [], "held_out": []}
    for article in texts:
        is_in = [part for part in ("stopping", "held_out") if article.title in record[f"{part}_articles"]]
        parts[is_in[0] if is_in else "train"].append(article.text)
    rows = {part: pack(documents, tiny.tokenizer, tiny.context) for part, documents in parts.items()}

    recorded = record["held_out_loss_nats_a_token"]
    held_out = rows["held_out"]
    losses = jax.jit(lambda params, tokens: next_token_losses(tiny.forward(params, tokens), tokens))
    transformer = np.mean([losses(tiny.params, held_out[i : i + 32]).mean() for i in range(0, len(held_out) - 31, 32)])
    # Whole batches only, and the cleaning of the text may have changed a little since: hence the tolerance.
    assert transformer == pytest.approx(recorded["transformer"], abs=0.03)
    bigram = ngram.fit_bigram(rows["train"], tiny.vocab_size, tuning=rows["stopping"])
    assert bigram.loss(held_out) == pytest.approx(recorded["bigram"], abs=0.03)
    assert transformer < bigram.loss(held_out) - 0.5


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FILES, tmp_path / "tiny"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.json"])
def test_a_file_cut_short_is_refused(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=name):
        load_tiny(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_tiny(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    other = train_tiny.train_tokenizer([PROSE], 300)
    (copy / "tokenizer.json").write_text(other.to_str())
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file that training\.json"):
        load_tiny(copy)


def test_weights_with_one_flipped_bit_are_refused(copy):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that training\.json"):
        load_tiny(copy)


def test_other_line_endings_are_the_same_tokenizer(copy):
    data = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(data.replace(b"\n", b"\r\n"))
    assert load_tiny(copy).tokenizer.vocab_size == 2048


# The script.

SMALL = TrainTinyConfig(
    vocab_size=8, d_model=16, n_layers=1, n_heads=2, d_mlp=16, context=8, batch=4, steps=120, warmup=5,
    learning_rate=0.03, evaluate_every=20, patience=2,
)  # fmt: skip


def test_windows_show_every_row_once_an_epoch_and_never_a_seam():
    stream = np.arange(1000)
    batches = train_tiny.windows(stream, context=10, batch=7, rng=np.random.default_rng(0))
    for _ in range(3):
        epoch = np.concatenate([next(batches) for _ in range(14)])
        assert (np.diff(epoch, axis=1) == 1).all()
        assert len(np.unique(epoch)) == epoch.size == 980
    with pytest.raises(ValueError, match="do not fill one batch"):
        next(train_tiny.windows(stream, context=10, batch=100, rng=np.random.default_rng(0)))


def test_the_tokenizer_covers_every_byte_and_refuses_what_it_cannot_fill():
    tokenizer = train_tiny.train_tokenizer([PROSE], 300)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(train_tiny.END_OF_TEXT) == 0
    text = bytes(range(1, 128)).decode() + "é東🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(PROSE).ids) < 0.8 * len(PROSE)
    with pytest.raises(ValueError, match="at least 257"):
        train_tiny.train_tokenizer([PROSE], 256)
    with pytest.raises(ValueError, match="lower it"):
        train_tiny.train_tokenizer(["ab"], 400)


@pytest.mark.slow
def test_dropout_zeroes_its_share_and_keeps_the_mean(tiny):
    tokens = jnp.array([tiny.tokenizer.encode(PROSE)[:16]])
    loss = jax.jit(train_tiny.loss_with_dropout, static_argnums=3)
    tiny = dataclasses.replace(tiny, params=transformer.unrolled(tiny.params))  # as it is trained
    clean = next_token_loss(jax.jit(tiny.forward)(tiny.params, tokens), tokens)
    np.testing.assert_allclose(loss(tiny.params, tokens, jax.random.key(0), 0.0), clean, rtol=1e-5)
    light = [float(loss(tiny.params, tokens, jax.random.key(i), 0.05)) for i in range(8)]
    heavy = [float(loss(tiny.params, tokens, jax.random.key(i), 0.8)) for i in range(8)]
    assert len(set(light)) == 8
    assert abs(np.mean(light) - clean) < 0.5
    assert np.mean(heavy) > clean + 1.0


def cycle(n_rows: int, length: int = 8) -> np.ndarray:
    """Rows that count up modulo 7: after the first token everything is certain."""
    return (np.arange(n_rows)[:, None] * 3 + np.arange(length)) % 7


@pytest.mark.slow
@pytest.mark.caches  # hundreds of steps: the leak checker would trace each anew
def test_training_learns_a_cycle_and_is_the_same_twice():
    texts = Texts(train=np.arange(800) % 7, stopping=cycle(4), held_out=cycle(5))
    model, history = train_tiny.train(SMALL, texts, Console(quiet=True))
    assert history[-1]["held_out"] < 0.05
    again, history_again = train_tiny.train(SMALL, texts, Console(quiet=True))
    assert history_again == history
    jax.tree.map(np.testing.assert_array_equal, model, again)


@pytest.mark.slow
@pytest.mark.caches
def test_training_stops_early_and_returns_the_best_parameters():
    # Training text counts up, the stopping rows count down: the better it learns the one, the worse it is at the other.
    texts = Texts(train=np.arange(800) % 7, stopping=cycle(4)[:, ::-1].copy(), held_out=cycle(5))
    model, history = train_tiny.train(SMALL, texts, Console(quiet=True))
    stopping = [entry["stopping"] for entry in history]
    assert len(history) == int(np.argmin(stopping)) + 1 + SMALL.patience < 6
    loss = next_token_loss(jax.jit(lambda m, t: m(t))(model, jnp.asarray(texts.stopping)), jnp.asarray(texts.stopping))
    assert float(loss) == pytest.approx(min(stopping), abs=1e-3)


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_told():
    texts = Texts(train=np.arange(800) % 7, stopping=cycle(4), held_out=cycle(5))
    wild = dataclasses.replace(SMALL, learning_rate=1e30, warmup=1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_tiny.train(wild, texts, Console(quiet=True))


def test_the_curve_is_a_self_contained_picture_and_the_same_every_time(tmp_path):
    history = [{"step": s, "train": 6.0 - s / 100, "held_out": 6.1 - s / 100} for s in (10, 20)]
    losses = {"transformer": 5.9, "bigram": 6.2, "unigram": 7.0}
    train_tiny.draw_curve(history, losses, tmp_path / "a.svg")
    train_tiny.draw_curve(history, losses, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text
    assert "<image" not in text


@pytest.mark.slow
def test_the_script_writes_a_model_that_loads_and_a_record_of_it(tmp_path):
    small = TrainTinyConfig(
        output=tmp_path, vocab_size=300, d_model=16, n_layers=1, n_heads=2, d_mlp=16, context=32, batch=8, steps=20,
        warmup=5, evaluate_every=10,
    )  # fmt: skip
    record = train_tiny.main(small)
    tiny = load_tiny(tmp_path)
    assert (tiny.vocab_size, tiny.n_layers, tiny.context) == (300, 1, 32)
    assert json.loads((tmp_path / "training.json").read_text()) == record
    names = ["config.json", "model.safetensors", "tokenizer.json", "training.json", "training_curve.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    losses = record["held_out_loss_nats_a_token"]
    assert losses["transformer"] == pytest.approx(record["history"][-1]["held_out"], abs=0.01)
    assert losses["bigram"] < losses["unigram"] < math.log(300)

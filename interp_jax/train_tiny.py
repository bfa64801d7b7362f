"""Trains the tiny language model on the Wikipedia excerpt: `python -m interp_jax.train_tiny`.

The articles are divided three ways, by document: training text; a few articles that say when to stop (and choose the
bigram baseline's discount); held-out articles that decide nothing and on which every reported loss is measured. The
transformer and the baselines are counted on the very same predictions of the same rows.

Rows have no begin-of-text token: a row is a window of the stream of documents, so the first positions of a row predict
from almost nothing, for the transformer as for the bigram.

Nothing is written until training is over. Then each file is written whole, and last `training.json` with the others'
checksums, so that a directory in which two runs are mixed is not read back as a model.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tokenizers
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from interp_jax.activations.tokens import pack, split_documents
from interp_jax.activations.wikipedia import articles
from interp_jax.instrument import iterate
from interp_jax.models import ngram, saved_model, tiny, transformer
from interp_jax.models.loss import next_token_loss
from interp_jax.models.tokenizer import Tokenizer
from interp_jax.models.transformer import Transformer, TransformerConfig
from interp_jax.whole_file import write_whole

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class TrainTinyConfig:
    """Trains the tiny language model and writes it, its tokenizer, its losses and its curve into a directory."""

    output: Path = Path(__file__).parent / "models" / "tiny_wikipedia"
    """Directory to write to."""
    vocab_size: int = 2048
    """Tokens of the byte-level BPE, the end-of-text token included."""
    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Number of attention heads."""
    d_mlp: int = 352
    """Number of gated neurons a layer."""
    context: int = 128
    """Tokens a row."""
    batch: int = 16
    """Rows a step."""
    steps: int = 2800
    """Steps of the whole schedule."""
    warmup: int = 100
    """Steps in which the learning rate rises from 0."""
    learning_rate: float = 4e-3
    """Its highest value; it falls to a fiftieth of it along a cosine."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    dropout: float = 0.0
    """Share of the entries of embed, attn_out and mlp_out that are dropped in training."""
    evaluate_every: int = 200
    """Steps from one evaluation to the next."""
    patience: int = 4
    """Evaluations without a better loss on the stopping articles after which training ends early."""
    seed: int = 0
    """Of parameters, row order and dropout."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of tokens from three disjoint sets of articles."""

    train: Int[np.ndarray, " n_train"]
    """The training articles as one stream, the end-of-text token after each."""
    stopping: Int[np.ndarray, "n_stopping context"]
    """Rows that say when to stop."""
    held_out: Int[np.ndarray, "n_held_out context"]
    """Rows that every reported loss is measured on."""


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE learnt from documents; token 0 is the end of text, every byte is a token, so any text encodes.

    Args:
        documents: Texts to learn merges from.
        vocab_size: Tokens in all, at least 257.

    Returns:
        The tokenizer; adds no special token of itself.

    Raises:
        ValueError: The vocabulary is under 257, or the text is too short to fill it.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and the end of text need at least 257.")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"The text gives {tokenizer.get_vocab_size()} tokens and vocab_size is {vocab_size}; lower it."
        )
    return tokenizer


def windows(
    stream: Int[np.ndarray, " n"], context: int, batch: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, "batch context"]]:
    """Batches of rows without end. Each epoch cuts the stream at another offset and deals the rows in another order.

    Args:
        stream: Token ids.
        context: Tokens a row.
        batch: Rows a batch.
        rng: Draws offsets and orders.

    Yields:
        One batch; a rest that fills no batch is left out of its epoch.
    """
    if len(stream) < context * (batch + 1):
        raise ValueError(f"{len(stream)} tokens of text do not fill one batch of {batch} rows of {context}.")
    while True:
        offset = int(rng.integers(context))
        n_rows = (len(stream) - offset) // context
        rows = stream[offset : offset + n_rows * context].reshape(n_rows, context)[rng.permutation(n_rows)]
        for start in range(0, n_rows - batch + 1, batch):
            yield rows[start : start + batch]


def loss_with_dropout(
    model: Transformer, tokens: Int[Array, "batch seq"], key: PRNGKeyArray, dropout: float
) -> Float[Array, ""]:
    """Next-token loss with dropout, which is an intervention at three sites like any other.

    Args:
        model: The parameters.
        tokens: Rows of token ids.
        key: Draws what is dropped.
        dropout: Share of entries set to zero; the others are scaled up to keep the mean.

    Returns:
        Mean nats a token.
    """
    if dropout == 0.0:
        return next_token_loss(model(tokens), tokens)
    for i, (_, _, value) in enumerate(
        running := iterate(transformer.apply, sites=("embed", "attn_out", "mlp_out"))(model, tokens)
    ):
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1.0 - dropout, value.shape)
        running.modified_value = jnp.where(keep, value / (1.0 - dropout), 0.0)
    return next_token_loss(running.retval, tokens)


def make_optimizer(config: TrainTinyConfig) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, gradients clipped to norm 1, weight decay on matrices only."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, config.learning_rate / 50
    )

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=is_matrix),
    )


def evaluate(forward_loss: Callable, model: Transformer, rows: Int[np.ndarray, "n context"], batch: int = 32) -> float:
    """Mean nats a token over rows, every one of them counted once.

    Args:
        forward_loss: (model, rows) to the mean loss over them.
        model: The parameters.
        rows: Token ids.
        batch: Rows at once.
    """
    total = 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        total += float(forward_loss(model, jnp.asarray(part))) * len(part)
    return total / len(rows)


def train(config: TrainTinyConfig, texts: Texts, console: Console) -> tuple[Transformer, list[dict[str, int | float]]]:
    """Trains and returns the parameters that were best on the stopping rows.

    Args:
        config: Sizes and settings.
        texts: What to train on, to stop by and to measure on.
        console: Shows progress.

    Returns:
        The best model and one record an evaluation: step, epoch, train (mean since the last one), stopping, held_out.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    model = Transformer(
        TransformerConfig(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_heads,
            d_head=config.d_model // config.n_heads,
            d_mlp=config.d_mlp,
            context=config.context,
        ),
        jax.random.key(config.seed),
        layers="unrolled",  # every layer's dropout is another: stacked, that is one branch a layer
    )
    optimizer = make_optimizer(config)

    @jax.jit
    def forward_loss(model, tokens):
        return next_token_loss(model(tokens), tokens)

    # Not donated: the best parameters so far are kept as they are while training goes on.
    @jax.jit
    def step_fn(model, state, tokens, key):
        loss, gradient = jax.value_and_grad(loss_with_dropout)(model, tokens, key, config.dropout)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(cast(Any, model), updates), state, loss

    state = optimizer.init(cast(Any, model))
    batches = windows(texts.train, config.context, config.batch, np.random.default_rng(config.seed))
    tokens_a_step = config.batch * config.context
    history, losses, best, best_loss, best_step = [], [], model, math.inf, 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("training", total=config.steps, rate="")
        started, trained = time.perf_counter(), 0
        for step in range(1, config.steps + 1):
            key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
            model, state, loss = step_fn(model, state, jnp.asarray(next(batches)), key)
            losses.append(float(loss))
            trained += tokens_a_step
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"The loss is {losses[-1]} at step {step}; lower the learning rate.")
            rate = f"{trained / (time.perf_counter() - started):,.0f} tok/s"
            progress.update(bar, advance=1, rate=rate, description=f"loss {losses[-1]:.3f}")
            if step % config.evaluate_every and step != config.steps:
                continue
            history.append(
                {
                    "step": step,
                    "epoch": round(step * tokens_a_step / len(texts.train), 3),
                    "train": round(float(np.mean(losses)), 4),
                    "stopping": round(evaluate(forward_loss, model, texts.stopping), 4),
                    "held_out": round(evaluate(forward_loss, model, texts.held_out), 4),
                }
            )
            progress.print("  ".join(f"{name} {value}" for name, value in history[-1].items()), rate)
            losses = []
            if history[-1]["stopping"] < best_loss:
                best, best_loss, best_step = model, history[-1]["stopping"], len(history)
            elif len(history) - best_step >= config.patience:
                progress.print(f"No better loss on the stopping articles in {config.patience} evaluations: stopped.")
                break
    return best, history


def draw_curve(history: Sequence[dict[str, int | float]], held_out: dict[str, float], path: Path) -> None:
    """Draws the losses over steps, with the baselines as level lines, into an SVG file.

    Args:
        history: What `train` returned.
        held_out: Losses on the held-out rows by model: transformer, bigram, unigram.
        path: Where to write.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in history]
    for name, label in (("train", "training articles (mean since last)"), ("held_out", "held-out articles")):
        axes.plot(steps, [record[name] for record in history], marker="o", markersize=3, label=label)
    for name, style in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(held_out[name], color="grey", linestyle=style, label=f"{name}, held-out ({held_out[name]:.2f})")
    axes.set(
        xlabel="step", ylabel="loss, nats a token", title=f"tiny-wikipedia: {held_out['transformer']:.2f} held-out"
    )
    figure.legend(loc="outside lower center", ncols=2)
    with matplotlib.rc_context({"svg.hashsalt": "tiny-wikipedia"}):  # the same ids in the file every time
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(config: TrainTinyConfig) -> dict[str, Any]:
    """Trains, measures and writes everything.

    Args:
        config: Sizes, settings and where to write.

    Returns:
        What stands in `training.json`.
    """

    console = Console()
    train_and_stopping, held_out = split_documents(articles())
    training, stopping = split_documents(train_and_stopping, 0.06)

    backend = train_tokenizer([article.text for article in training], config.vocab_size)
    tokenizer = Tokenizer(backend, eos_id=backend.token_to_id(END_OF_TEXT))

    def rows(part) -> Int[np.ndarray, "n context"]:
        return pack([article.text for article in part], tokenizer, config.context)

    # What pack cuts into rows is the stream of documents, so its rows laid end to end are that stream again.
    texts = Texts(train=rows(training).ravel(), stopping=rows(stopping), held_out=rows(held_out))
    console.print(
        f"{texts.train.size:,} tokens to train on, {texts.stopping.size:,} to stop by, {texts.held_out.size:,} held out"
    )

    train_rows = texts.train.reshape(-1, config.context)
    bigram = ngram.fit_bigram(train_rows, config.vocab_size, tuning=texts.stopping)
    losses = {
        "bigram": bigram.loss(texts.held_out),
        "unigram": ngram.fit_unigram(train_rows, config.vocab_size).loss(texts.held_out),
    }
    console.print(f"held-out loss: unigram {losses['unigram']:.4f}, bigram {losses['bigram']:.4f} nats a token")

    started = time.perf_counter()
    model, history = train(config, texts, console)
    seconds = time.perf_counter() - started

    saved_model.save(model, config.output, dtype=jnp.float16)
    write_whole(config.output / "tokenizer.json", backend.to_str(pretty=True).encode())
    # What is reported is what a user loads: the stored weights, not those in memory.
    stored = saved_model.load(config.output)
    losses["transformer"] = evaluate(jax.jit(lambda m, t: next_token_loss(m(t), t)), stored, texts.held_out)
    characters = sum(len(article.text) for article in held_out)
    record = {
        "held_out_loss_nats_a_token": {name: round(value, 4) for name, value in sorted(losses.items())},
        "margin_over_bigram": round(losses["bigram"] - losses["transformer"], 4),
        "bigram_discount": bigram.discount,
        "held_out_characters_a_token": round(characters / texts.held_out.size, 3),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "stored_as": "float16",
        "tokens": {field.name: int(getattr(texts, field.name).size) for field in dataclasses.fields(Texts)},
        "sha256": tiny.checksums(config.output),
        "training_text_sha256": hashlib.sha256("\n\n".join(a.text for a in training).encode()).hexdigest(),
        "stopping_articles": [article.title for article in stopping],
        "held_out_articles": [article.title for article in held_out],
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k != "output"},
        "seconds": round(seconds),
        "history": history,
    }
    with contextlib.ExitStack() as cleanup:
        curve = config.output / ".training_curve.svg"
        cleanup.callback(curve.unlink, missing_ok=True)
        draw_curve(history, losses, curve)
        write_whole(config.output / "training_curve.svg", curve.read_bytes())
    write_whole(config.output / "training.json", (json.dumps(record, indent=2) + "\n").encode())
    console.print(
        f"held-out loss {losses['transformer']:.4f} nats a token, "
        f"{record['margin_over_bigram']:.4f} below the bigram's; written to {config.output}"
    )
    return record


if __name__ == "__main__":
    main(tyro.cli(TrainTinyConfig))

"""`interp-jax demo`: the whole idea at work on a real model, in one command.

The stages, in the order in which the page shows them: check the model, list its sites, run the loop, stream activations
to disk, train a dictionary, judge it on held-out text beside gradient pursuit, steer with one of its latents, write the
page.

What an interrupted run leaves is whole: activation shards and training checkpoints are written atomically, and the
folder `work/` is named by the settings, so that `--resume` never mixes two runs. The cheap stages are simply run again.

The model stands or falls with its loss: where weights, tokenizer, positions or text are wrong the loss on the excerpt
is off, and nothing that follows would mean anything. So the demo stops there and says so.
"""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import interp_jax as ij
from interp_jax.activations.splice import mean_loss
from interp_jax.activations.store import ActivationStore
from interp_jax.activations.store_activations import store_activations
from interp_jax.activations.stream import stream_activations
from interp_jax.activations.tokens import pack, split_documents
from interp_jax.activations.wikipedia import articles, reference_rows
from interp_jax.models.flax_llama import load_smollm2
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_loss
from interp_jax.progress import advancing
from interp_jax.pursuit import PursuitEncoder
from interp_jax.report import (
    DemoReport,
    DictionaryScore,
    LatentDashboard,
    LoopExample,
    Setting,
    SiteRow,
    SteeredText,
    SteeringSample,
    TrainingCurve,
    choose_latents,
    latent_dashboards,
    write_page,
    write_results,
)
from interp_jax.sae import Evaluation, SparseAutoencoder, TrainConfig, evaluate, loss_recovered, save_saelens, train
from interp_jax.steering import steer

__all__ = ["FULL", "QUICK", "DemoError", "Settings", "run"]


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the demo is. What is not here is the same in both sizes."""

    name: str
    """`full` or `quick`; names the work folder."""
    n_rows: int
    """Rows of training text whose activations are streamed, 128 tokens each."""
    d_sae: int
    """Latents of the dictionary."""
    n_steps: int
    """Training steps."""
    batch_size: int
    """Activations a training step."""
    dead_after: int
    """Activations without it after which a latent counts as dead."""
    rows_judged: int
    """Held-out rows that losses and reconstruction are measured on."""
    rows_shown: int
    """Rows of training text that the latents' snippets are looked for in."""
    new_tokens: int
    """Tokens generated a sample."""


FULL = Settings(
    name="full",
    n_rows=1600,
    d_sae=4608,
    n_steps=600,
    batch_size=4096,
    dead_after=100_000,
    rows_judged=64,
    rows_shown=800,
    new_tokens=40,
)
QUICK = Settings(
    name="quick",
    n_rows=96,
    d_sae=1152,
    n_steps=150,
    batch_size=1024,
    dead_after=20_000,
    rows_judged=16,
    rows_shown=96,
    new_tokens=16,
)

SITE = "resid_post"
CONTEXT = 128
BATCH_ROWS = 8
L0 = 32
"""Latents a token may use, for the encoder and for pursuit."""
REFERENCE_LOSS = 3.11
"""Nats a token that SmolLM2-135M-Instruct loses on this text."""
TOLERANCE = 0.05
LATENTS_SHOWN = 20
SINK = 10
"""An activation of more than so many times the median norm is an attention sink."""
STEERING_SHARES = (0.2, 0.35)
TEMPERATURE = 0.7
PROMPT = "The most important thing to know about this is"


def loop_example(model: LanguageModel, tokens: Int[Array, "batch seq"]) -> None:
    @jax.jit
    def forward(params, tokens):
        for layer, name, value in (running := ij.iterate(model.forward)(params, tokens)):
            if name == "mlp_out" and layer == 6:
                running.modified_value = value.at[:, :, 17].set(0.0)
            if name == "resid_post":
                running.save(f"norm/{layer}", jnp.linalg.norm(value, axis=-1))
        return running.retval, running.saved

    logits, saved = forward(model.params, tokens)
    for layer in range(0, model.n_layers, 6):
        print(f"norm/{layer}", np.asarray(saved[f"norm/{layer}"])[0, 1:7].round(1))
    print("next token", model.tokenizer.readable([int(logits[0, -1].argmax())]))


def run(settings: Settings, out: pathlib.Path, *, resume: bool) -> pathlib.Path:
    """Runs the demo.

    Args:
        settings: `FULL` or `QUICK`.
        out: the folder to write to.
        resume: go on from what an interrupted run with the same settings left.

    Returns:
        The path of the page.

    Raises:
        DemoError: if the model's loss is not what it must be.
        MissingDataError: if weights or text are not installed; names the command that gets them.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    work = out / f"work-{settings.name}"
    if not resume and work.exists():
        shutil.rmtree(work)
    try:
        report = _experiment(settings, work, started)
    except KeyboardInterrupt:
        again = " --quick" if settings == QUICK else ""
        _say(
            f"Interrupted. What is done is kept in {work}. To go on from there: "
            f"interp-jax demo{again} --out {out} --resume"
        )
        raise
    page = write_page(out / "index.html", report)
    write_results(out / "results.json", report)
    _say(f"Open {page.resolve().as_uri()}")
    return page


def _experiment(settings: Settings, work: pathlib.Path, started: float) -> DemoReport:
    documents = articles()
    _say("Loading SmolLM2-135M-Instruct through the patched Flax Llama of transformers.")
    model = load_smollm2(context=CONTEXT)
    layer = model.n_layers // 2
    loss = _checked_loss(model)

    sites = ij.list_sites(model.forward)(model.params, jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32))
    _say(f"{len(sites)} sites; those of layer {layer}:")
    print("\n".join(line for line in str(sites).splitlines() if line.split()[0] in ("layer", str(layer))))
    example = _run_loop_example(model)
    _say(f"The loop:\n{example.output.rstrip()}")

    train_documents, held_out_documents = split_documents(documents)
    train_rows = _some_rows(train_documents, model, settings.n_rows)
    held_out_rows = _some_rows(held_out_documents, model, settings.rows_judged)

    store = store_activations(model, train_rows, work / "activations", site=SITE, layer=layer, batch_rows=BATCH_ROWS)
    norms = store.norms()
    usual_norm = float(np.median(norms))
    sink_norm = SINK * usual_norm
    ordinary = np.flatnonzero(norms <= sink_norm)
    n_sinks = store.n_rows - len(ordinary)
    _say(
        f"{n_sinks} of {store.n_rows:,} activations are attention sinks, of a norm above {SINK} "
        f"times the median {usual_norm:.0f}: they are left out of training and left alone in splices."
    )
    sae, curve = _trained(settings, store, ordinary, work / "training")
    save_saelens(sae, work / "sae", model_name=model.name, hook_name=f"{SITE}.{layer}")

    mean = np.mean(store.rows(ordinary[::16]), axis=0)
    scores, densities = _judged(model, sae, mean, held_out_rows, layer, sink_norm)
    dashboards = _dashboards(settings, model, sae, store, train_rows, densities, sink_norm)
    steering = _steered(settings, model, sae, dashboards, layer, usual_norm)
    return DemoReport(
        title="interp_jax on SmolLM2-135M",
        summary=(
            "The Flax Llama of transformers was instrumented as it was imported; SmolLM2's weights in it lose "
            f"{loss:.2f} nats a token.",
            f"A TopK sparse autoencoder of {sae.d_sae:,} latents was trained on {SITE} of layer {layer} over "
            f"{train_rows.size:,} tokens of Wikipedia, each pass stopped at that layer.",
            "Its dictionary was judged on held-out articles, spliced into the model by the for loop, with its own "
            "encoder and with gradient pursuit in the encoder's place.",
            f"Attention sinks (the first position of a row, and {n_sinks} of {store.n_rows:,} others, of over "
            f"{SINK} times the median norm) were left out of training and of the variance, and left alone in splices.",
        ),
        setting=Setting(
            model=model.name,
            model_loss=loss,
            reference_loss=REFERENCE_LOSS,
            site=SITE,
            layer=layer,
            n_layers=model.n_layers,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            n_tokens_streamed=train_rows.size,
            n_tokens_trained=settings.n_steps * settings.batch_size,
            n_tokens_held_out=held_out_rows.size,
            text="English Wikipedia, an excerpt of 94 articles (CC BY-SA)",
            seconds=time.monotonic() - started,
            versions=(
                ("interp-jax", ij.__version__),
                *((name, importlib.metadata.version(name)) for name in ("jax", "flax", "transformers")),
            ),
        ),
        scores=scores,
        training_curve=curve,
        densities=tuple(map(float, densities)),
        loop=example,
        sites=tuple(SiteRow(row.layer, row.name, tuple(row.shape), str(row.dtype)) for row in sites),
        steering=steering,
        latents=dashboards,
        latents_chosen=(
            "Drawn at random from those active on between 0.05 % and 10 % of held-out tokens. The tokens that they "
            "promote are named among those that occur in the text."
        ),
    )


def _checked_loss(model: LanguageModel) -> float:
    """The model's loss on the reference rows; an error if the model cannot have been loaded rightly."""
    rows = reference_rows(model.tokenizer)
    loss_of = jax.jit(lambda params, tokens: next_token_loss(model.forward(params, tokens), tokens))
    with advancing("Checking the model's loss", rows.size) as advance:
        losses = []
        for start in range(0, len(rows), BATCH_ROWS):
            losses.append(float(loss_of(model.params, jnp.asarray(rows[start : start + BATCH_ROWS]))))
            advance(BATCH_ROWS * CONTEXT)
    loss = float(np.mean(losses))
    if not abs(loss - REFERENCE_LOSS) <= TOLERANCE:
        raise DemoError(
            f"{model.name} loses {loss:.3f} nats a token on the reference rows; expected {REFERENCE_LOSS} within "
            f"{TOLERANCE}. "
            "Weights, tokenizer, rotary base or text are not what they must be, and nothing that follows would mean "
            "anything. `interp-jax data status` checks the files; `make test` the rest."
        )
    _say(f"Loss {loss:.3f} nats a token; expected {REFERENCE_LOSS} within {TOLERANCE}.")
    return loss


def _run_loop_example(model: LanguageModel) -> LoopExample:
    tokens = jnp.asarray([model.tokenizer.encode("The quick brown fox jumps over the lazy")])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        loop_example(model, tokens)
    return LoopExample(code=inspect.getsource(loop_example), output=printed.getvalue())


def _some_rows(documents: list[Any], model: LanguageModel, count: int) -> Int[np.ndarray, "rows context"]:
    """Rows of tokens drawn from all over the documents, the same in every run."""
    rows = pack([document.text for document in documents], model.tokenizer, CONTEXT)
    if len(rows) < count:
        raise DemoError(f"the text gives {len(rows)} rows of {CONTEXT} tokens; {count} are needed")
    return rows[np.random.default_rng(0).permutation(len(rows))[:count]]


def _trained(
    settings: Settings, store: ActivationStore, ordinary: Int[np.ndarray, "n"], directory: pathlib.Path
) -> tuple[SparseAutoencoder, TrainingCurve]:
    config = TrainConfig(
        d_in=store.d_in,
        d_sae=settings.d_sae,
        k=L0,
        n_steps=settings.n_steps,
        dead_after=settings.dead_after,
        log_every=max(1, settings.n_steps // 100),
        checkpoint_every=max(1, settings.n_steps // 10),
    )
    with advancing("Training the dictionary", settings.n_steps * settings.batch_size, unit="activations") as advance:
        sae, history = train(
            config,
            store.shuffled(settings.batch_size, among=ordinary),
            on_step=lambda step, metrics: advance(settings.batch_size),
            checkpoint_dir=directory,
            resume=True,
        )
    return sae, TrainingCurve(
        steps=tuple(int(line["step"]) for line in history), values=tuple(line["fvu"] for line in history)
    )


def _judged(
    model: LanguageModel,
    sae: SparseAutoencoder,
    mean: Float[np.ndarray, "d_in"],
    rows: Int[np.ndarray, "rows context"],
    layer: int,
    sink_norm: float,
) -> tuple[tuple[DictionaryScore, ...], Float[np.ndarray, "d_sae"]]:
    """The dictionary on held-out text, by its encoder and by pursuit; and how often each latent is active there.

    `mean` is that of the training text: held-out text must not help.
    """
    pursuit = PursuitEncoder(sae, L0)
    replacements: dict[str, tuple[Any, ...]] = {
        "clean": (),
        "zero": (jnp.zeros_like,),
        "mean": (lambda value, mean: jnp.broadcast_to(mean, value.shape), jnp.asarray(mean)),
        "encoder": (lambda value, sae: sae(value), sae),
        "pursuit": (lambda value, encoder: encoder(value), pursuit),
    }
    losses = {}
    with advancing("Splicing on held-out text", len(replacements) * rows.size) as advance:
        for name, replacement in replacements.items():
            losses[name] = mean_loss(
                model,
                rows,
                *replacement,
                site=SITE,
                layer=layer,
                keep_above=sink_norm,
                batch_size=BATCH_ROWS,
                advance=advance,
            )
    batches = [rows[i : i + BATCH_ROWS] for i in range(0, len(rows), BATCH_ROWS)]
    stream = stream_activations(model.forward, model.params, batches, site=SITE, layer=layer, skip_first=1)
    activations = [batch[np.linalg.norm(batch, axis=1) <= sink_norm] for batch in map(np.asarray, stream)]
    evaluation = evaluate(sae, activations)
    scores = (
        _score("SAE encoder", evaluation, losses, "encoder"),
        _score("gradient pursuit", evaluate(pursuit, activations), losses, "pursuit"),
    )
    return scores, evaluation.density


def _score(method: str, evaluation: Evaluation, losses: dict[str, float], which: str) -> DictionaryScore:
    score = DictionaryScore(
        method=method,
        l0=evaluation.l0,
        fvu=evaluation.fvu,
        dead_share=evaluation.dead_share,
        loss_clean=losses["clean"],
        loss_spliced=losses[which],
        loss_zero_ablated=losses["zero"],
        loss_mean_ablated=losses["mean"],
        loss_recovered_zero=loss_recovered(losses["clean"], losses[which], losses["zero"]),
        loss_recovered_mean=loss_recovered(losses["clean"], losses[which], losses["mean"]),
    )
    _say(
        f"{method}: L0 {score.l0:.1f}, FVU {score.fvu:.3f}, loss {score.loss_spliced:.3f} "
        f"(clean {score.loss_clean:.3f}, zero-ablated {score.loss_zero_ablated:.3f}, mean-ablated "
        f"{score.loss_mean_ablated:.3f}), recovered {score.loss_recovered_zero:.1%} of the zero ablation, "
        f"{score.loss_recovered_mean:.1%} of the mean ablation."
    )
    return score


def _dashboards(
    settings: Settings,
    model: LanguageModel,
    sae: SparseAutoencoder,
    store: ActivationStore,
    rows: Int[np.ndarray, "rows context"],
    densities: Float[np.ndarray, "d_sae"],
    sink_norm: float,
) -> tuple[LatentDashboard, ...]:
    latents = choose_latents(densities, LATENTS_SHOWN, min_density=5e-4)
    encode = jax.jit(lambda sae, x: sae.encode(x)[:, latents])
    positions = CONTEXT - 1  # the first of each row was not streamed
    codes = np.zeros((settings.rows_shown, CONTEXT, len(latents)), np.float32)
    with advancing("Looking for the texts that activate latents most", settings.rows_shown * CONTEXT) as advance:
        for start in range(0, settings.rows_shown, BATCH_ROWS):
            stop = start + BATCH_ROWS
            activations = store.rows(np.arange(start * positions, stop * positions))
            found = np.array(encode(sae, jnp.asarray(activations)))
            found[np.linalg.norm(activations, axis=1) > sink_norm] = 0.0
            codes[start:stop, 1:] = found.reshape(BATCH_ROWS, positions, -1)
            advance(BATCH_ROWS * CONTEXT)
    return latent_dashboards(model, rows[: settings.rows_shown], codes, latents, sae.W_dec[...][latents])


def _steered(
    settings: Settings,
    model: LanguageModel,
    sae: SparseAutoencoder,
    dashboards: tuple[LatentDashboard, ...],
    layer: int,
    norm: float,
) -> tuple[SteeringSample, ...]:
    """One latent's direction added while the model writes: of those shown, the one that is surest what it is about."""
    chosen = max(dashboards, key=_agreement)
    coefficients = [0.0, *(share * norm for share in STEERING_SHARES)]
    continuations = steer(
        model,
        PROMPT,
        sae.W_dec[...][chosen.latent],
        layer=layer,
        site=SITE,
        coefficients=coefficients,
        max_new_tokens=settings.new_tokens,
        temperature=TEMPERATURE,
        key=jax.random.key(0),
    )
    peaks = ", ".join(repr(snippet.tokens[snippet.peak]) for snippet in chosen.snippets)
    _say(f"Steering with latent {chosen.latent}, most active on {peaks}:")
    for continuation in continuations:
        print(f"  {continuation.coefficient:8.1f}: {PROMPT}{continuation.text!r}")
    return (
        SteeringSample(
            prompt=PROMPT,
            latent=chosen.latent,
            description=(
                f"its decoder row, of norm 1, added to {SITE} of layer {layer} at every position; the coefficients are "
                f"{' and '.join(f'{share:.0%}' for share in STEERING_SHARES)} of the activation's norm {norm:.0f}. "
                f"Drawn at temperature {TEMPERATURE}, with the same random numbers for each text"
            ),
            unsteered=continuations[0].text,
            steered=tuple(SteeredText(one.coefficient, one.text) for one in continuations[1:]),
        ),
    )


def _agreement(dashboard: LatentDashboard) -> tuple[int, float]:
    """How many of a latent's strongest texts peak on the same word, and then how strongly it is active."""
    peaks = [snippet.tokens[snippet.peak].strip().casefold() for snippet in dashboard.snippets]
    words = [word for word in peaks if len(word) > 3 and word.isalpha()]
    return max(map(words.count, words), default=0), dashboard.max_activation


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

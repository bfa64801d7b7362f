"""`interp-jax pursue`: what dictionaries can do at each sparsity, with their encoders and without.

For every autoencoder that is named, and for a random dictionary of the same size, the model's loss is measured on
held-out text with the activation replaced by its reconstruction: from the encoder as it is, from the encoder's k
largest codes, from gradient pursuit and from orthogonal matching pursuit, at several k. The frontier that comes out
tells apart what a dictionary lacks and what its encoder misses.

    index.html     the frontier, loss recovered against L0; codes by pursuit against codes by the encoder, for latents
                   of different frequency; the two codes of a dictionary side by side on the same texts
    frontier.svg   the frontier by itself
    pursue.json    all numbers; written after every point, so that an interrupted command keeps what it measured
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.model_and_rows import BATCH_ROWS, model_and_rows
from interp_jax.activations.splice import SINK_NORM, splice
from interp_jax.activations.stream import stream_activations
from interp_jax.models import ModelDtype
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loss import next_token_losses
from interp_jax.progress import advancing
from interp_jax.pursuit import PursuitEncoder, TopKEncoder, gradient_pursuit, orthogonal_matching_pursuit, topk_encode
from interp_jax.report.coding_point import CodingPoint
from interp_jax.report.pictures import coding_frontier, on_white
from interp_jax.report.pursuit_page import CodedToken, pursuit_page, side_by_side
from interp_jax.sae import Autoencoder, ReLUSAE, SparseAutoencoder, evaluate, load_sae, loss_recovered
from interp_jax.whole_file import make_folder, write_whole

__all__ = ["run"]

_LATENTS = 4
"""Latents in the scatter plot."""
_TEXTS, _TOKENS = 3, 33
"""Texts whose codes are shown side by side, and tokens of each."""


def run(
    paths: list[pathlib.Path],
    *,
    model_name: str,
    model_dtype: ModelDtype,
    layer: int | None,
    site: str,
    text: str,
    n_held_out: int,
    context: int,
    l0s: tuple[int, ...],
    out: pathlib.Path,
) -> None:
    """Measures each dictionary, prints the table and draws the pictures.

    Args:
        paths: folders of autoencoders, of any layout that `load_sae` knows.
        model_name: what `interp_jax.load` takes.
        model_dtype: of its weights and activations.
        layer: the layer; None is the middle one.
        site: the site.
        text: what `documents_of` takes.
        n_held_out: tokens to judge by.
        context: tokens a row.
        l0s: the numbers of latents a token that are tried.
        out: the folder to write to.

    Raises:
        ValueError: before anything long, for no path, a transcoder, an l0 below 1 or above a dictionary's size, or
            autoencoders of another width than the site.
    """
    if not paths:
        raise ValueError("Name the folder of one autoencoder or more; `interp-jax sae train` makes one.")
    if not l0s or min(l0s) < 1:
        raise ValueError(f"--l0 {' '.join(map(str, l0s))}: expected numbers of latents a token, 1 or more each.")
    if n_held_out < 1:
        raise ValueError(f"--n-held-out {n_held_out} leaves nothing to judge by; pass 8 rows of --context or more.")
    l0s = tuple(dict.fromkeys(l0s))
    paths = [path.resolve() for path in paths]
    saes = {path.parent.name if path.name == "sae" else path.name: load_sae(path) for path in paths}
    if len(saes) < len(paths):
        saes = {str(path): load_sae(path) for path in paths}
    for name, sae in saes.items():
        PursuitEncoder(sae, 1).check()
        if max(l0s) > sae.d_sae:
            raise ValueError(f"{name} has {sae.d_sae} latents, fewer than the l0 of {max(l0s)} that is asked for.")
    make_folder(out)
    model, layer, _, rows = model_and_rows(
        model_name, layer, text, context=context, n_tokens=0, n_held_out=n_held_out, dtype=model_dtype
    )
    values, activations, keep_above = _activations(model, rows, site, layer)
    wrong = [f"{name} ({sae.d_in})" for name, sae in saes.items() if sae.d_in != activations[0].shape[1]]
    if wrong:
        raise ValueError(
            f"site {site!r} of layer {layer} has width {activations[0].shape[1]}, not that of {', '.join(wrong)}. "
            "Name the model, site and layer that the autoencoder was trained on."
        )
    largest = max(saes.values(), key=lambda sae: sae.d_sae)
    mean = np.concatenate(activations).mean(axis=0)
    random = ReLUSAE.random(largest.d_in, largest.d_sae, key=jax.random.key(0)).replace(b_dec=jnp.asarray(mean))

    ways = [*_ways(saes, random, l0s)]
    points: list[CodingPoint] = []
    settings: dict[str, Any] = {"model": model_name, "model_dtype": model_dtype, "layer": layer, "site": site}
    settings |= {"text": text, "tokens": rows.size}
    width = max(len(f"{dictionary}: {way}") for dictionary, way, _ in ways)
    with advancing("Splicing on held-out text", (len(ways) + 2) * rows.size) as advance:
        measure = functools.partial(_mean_loss, model, rows, values, _spliced(model, site, layer, keep_above), advance)
        clean, zero = measure(lambda value: value), measure(jnp.zeros_like)
        facts = {"settings": settings, "loss_clean": clean, "loss_zero_ablated": zero}
        print(f"loss: clean {clean:.3f}, zero-ablated {zero:.3f} nats a token")
        print(f"{'':<{width}}      L0     FVU    loss  recovered", flush=True)
        for dictionary, way, coder in ways:
            loss = measure(functools.partial(_reconstruct, coder))
            found = evaluate(coder, activations)
            point = CodingPoint(dictionary, way, found.l0, found.fvu, loss, loss_recovered(clean, loss, zero))
            points.append(point)
            print(
                f"{f'{dictionary}: {way}':<{width}} {point.l0:7.1f} {point.fvu:7.3f} {point.loss:7.3f} "
                f"{point.recovered:9.1%}",
                flush=True,
            )
            measured = [dataclasses.asdict(point) for point in points]
            write_whole(out / "pursue.json", json.dumps(facts | {"points": measured}, indent=1).encode())
    name, sae = next(iter(saes.items()))
    k = min(l0s, key=lambda k: abs(k - evaluate(sae, activations[:1]).l0))
    encoded, pursued, latents = _scatter(sae, k, activations)
    page = pursuit_page(
        setting=settings,
        clean=clean,
        zero=zero,
        points=points,
        encoded=encoded,
        pursued=pursued,
        latents=latents,
        first=name,
        k=k,
        texts=[_coded(model, sae, k, rows[number], values[0][number]) for number in range(_TEXTS)],
    )
    write_whole(out / "index.html", page)
    on_white(coding_frontier(points)).save(out / "frontier.svg")
    print(f"The page is {out / 'index.html'}.")


def _ways(
    saes: dict[str, SparseAutoencoder], random: SparseAutoencoder, l0s: tuple[int, ...]
) -> Iterator[tuple[str, str, Autoencoder]]:
    """Every dictionary with every way of coding: its name, the way's name, and what reconstructs."""
    for name, sae in saes.items():
        yield name, "encoder", sae
        for k in l0s:
            yield name, "encoder's largest", TopKEncoder(sae, k)
            yield name, "gradient pursuit", PursuitEncoder(sae, k)
            yield name, "orthogonal matching pursuit", PursuitEncoder(sae, k, orthogonal_matching_pursuit)
    for k in l0s:
        yield "random directions", "gradient pursuit", PursuitEncoder(random, k)


@jax.jit
def _reconstruct(coder: Autoencoder, value: Float[Array, "batch seq d_in"]) -> Float[Array, "batch seq d_in"]:
    return coder(value)


def _spliced(
    model: LanguageModel, site: str, layer: int, keep_above: float
) -> Callable[[Any, Array, Array], Float[Array, ""]]:
    """The loss with what is given in the activation's place: one compiled program for all ways of coding."""
    spliced = splice(model.forward, lambda _, replacement: replacement, site=site, layer=layer, keep_above=keep_above)

    def loss(params: Any, tokens: Array, replacement: Array) -> Float[Array, ""]:
        return next_token_losses(spliced(params, tokens, replacement), tokens)[:, 1:].mean()

    return jax.jit(loss)


def _mean_loss(
    model: LanguageModel,
    rows: Int[np.ndarray, "rows context"],
    values: list[Float[np.ndarray, "batch context d_in"]],
    loss: Callable[[Any, Array, Array], Float[Array, ""]],
    advance: Callable[[int], None],
    replace: Callable[[Array], Array],
) -> float:
    found = []
    for tokens, value in zip(rows.reshape(len(values), -1, rows.shape[1]), values, strict=True):
        found.append(float(loss(model.params, jnp.asarray(tokens), replace(jnp.asarray(value)))))
        advance(tokens.size)
    return float(np.mean(found))


def _activations(
    model: LanguageModel, rows: Int[np.ndarray, "rows context"], site: str, layer: int
) -> tuple[list[Float[np.ndarray, "batch context d_in"]], list[Float[np.ndarray, "n d_in"]], float]:
    """All activations, batch by batch; those that are no sinks; and the norm above which one is a sink."""
    batches = [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
    values = []
    with advancing("Streaming activations", rows.size) as advance:
        for batch in stream_activations(model.forward, model.params, batches, site=site, layer=layer):
            values.append(np.asarray(batch, np.float32).reshape(BATCH_ROWS, rows.shape[1], -1))
            advance(BATCH_ROWS * rows.shape[1])
    every = np.concatenate([value[:, 1:].reshape(-1, value.shape[2]) for value in values])
    norms = np.linalg.norm(every, axis=1)
    keep_above = SINK_NORM * float(np.median(norms))
    every = every[norms <= keep_above]
    # In parts of one size, so that nothing is compiled for each: a few rows at the end are left out.
    size = len(every) // len(values)
    return values, list(every[: size * len(values)].reshape(len(values), size, -1)), keep_above


def _scatter(
    sae: SparseAutoencoder, k: int, activations: list[Float[np.ndarray, "n d_in"]]
) -> tuple[Float[np.ndarray, "latents tokens"], Float[np.ndarray, "latents tokens"], list[int]]:
    """Codes by the encoder and by pursuit, of latents from the most active one down."""
    x = jnp.asarray(np.concatenate(activations))
    encoded = np.asarray(jax.jit(lambda sae, x: sae.encode(x))(sae, x))
    often = np.argsort(-(encoded > 0).sum(axis=0), kind="stable")
    n_alive = max(1, int((encoded > 0).any(axis=0).sum()))
    latents = often[np.unique(np.linspace(0, n_alive - 1, 2 * _LATENTS).astype(int))[:_LATENTS]]
    code = gradient_pursuit(x - sae.b_dec[...], sae.W_dec[...], k)
    indices, weights = np.asarray(code.indices), np.asarray(code.weights)
    pursued = np.stack([np.where(indices == latent, weights, 0).sum(axis=1) for latent in latents])
    return encoded[:, latents].T, pursued, latents.tolist()


def _coded(
    model: LanguageModel,
    sae: SparseAutoencoder,
    k: int,
    tokens: Int[np.ndarray, "context"],
    value: Float[np.ndarray, "context d_in"],
) -> list[CodedToken]:
    """The tokens at the beginning of a row, but the first, with their two codes."""
    x = jnp.asarray(value[1:_TOKENS])
    codes = topk_encode(sae, x, k), PursuitEncoder(sae, k).code(x)
    both = [
        [
            {int(i): float(w) for i, w in zip(indices, weights, strict=True) if i >= 0}
            for indices, weights in zip(np.asarray(code.indices), np.asarray(code.weights), strict=True)
        ]
        for code in codes
    ]
    texts = model.tokenizer.readable(tokens[1:_TOKENS].tolist())
    return [side_by_side(*one) for one in zip(texts, *both, strict=True)]

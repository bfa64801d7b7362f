"""`interp-jax pursue`: what dictionaries can do at each sparsity, with their encoders and without.

For every autoencoder that is named, and for a random dictionary of the same size, the model's loss is measured on
held-out text with the activation replaced by its reconstruction: from the encoder as it is, from the encoder's k
largest codes, from gradient pursuit and from orthogonal matching pursuit, at several k. The frontier that comes out
tells apart what a dictionary lacks and what its encoder misses.

    pareto.png        loss recovered against L0, a line a dictionary and way of coding
    scatter.png       codes by pursuit against codes by the encoder, for latents of different frequency
    pursue.json       all numbers
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax.activations.splice import mean_loss
from interp_jax.activations.stream import stream_activations
from interp_jax.activations.train_and_held_out import documents_of, train_and_held_out
from interp_jax.models.known import load
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import advancing, working
from interp_jax.pursuit import PursuitEncoder, TopKEncoder, gradient_pursuit, orthogonal_matching_pursuit
from interp_jax.report.frontier import CodingPoint, frontier_figure, scatter_figure
from interp_jax.sae import Autoencoder, ReLUSAE, SparseAutoencoder, evaluate, load_sae, loss_recovered
from interp_jax.whole_file import write_whole

__all__ = ["run"]

_SINK = 3.0
"""Activations of more than this many times the median norm are sinks, and left alone in splices."""
_ROWS = 8
"""Rows of tokens a forward pass."""
_LATENTS = 4
"""Latents in the scatter plot."""


def run(
    paths: list[pathlib.Path],
    *,
    model_name: str,
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
        layer: the layer; None is the middle one.
        site: the site.
        text: what `documents_of` takes.
        n_held_out: tokens to judge by.
        context: tokens a row.
        l0s: the numbers of latents a token that are tried.
        out: the folder to write to.

    Raises:
        ValueError: before anything long, for a transcoder, an l0 above a dictionary's size, or autoencoders of another
            width than the site.
    """
    saes = {path.parent.name if path.name == "sae" else path.name: load_sae(path) for path in paths}
    if len(saes) < len(paths):
        saes = {str(path): load_sae(path) for path in paths}
    for name, sae in saes.items():
        PursuitEncoder(sae, 1)  # refuses a transcoder
        if max(l0s) > sae.d_sae:
            raise ValueError(f"{name} has {sae.d_sae} latents, fewer than the l0 of {max(l0s)} that is asked for.")
    documents = documents_of(text)
    with working(f"Loading {model_name}"):
        model = load(model_name)
    layer = model.layer_or_middle(layer)
    _, rows = train_and_held_out(
        text,
        documents,
        model,
        context=context,
        n_tokens=None,
        n_held_out=n_held_out,
        batch_rows=_ROWS,
    )
    activations, keep_above = _activations(model, rows, site, layer)
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
    measure = functools.partial(mean_loss, model, rows, site=site, layer=layer, keep_above=keep_above, batch_size=_ROWS)
    points = []
    with advancing("Splicing on held-out text", (len(ways) + 2) * rows.size) as advance:
        clean = measure(advance=advance)
        zero = measure(jnp.zeros_like, advance=advance)
        for dictionary, way, coder in ways:
            loss = measure(_replace, coder, advance=advance)
            found = evaluate(coder, activations)
            points.append(CodingPoint(dictionary, way, found.l0, found.fvu, loss, loss_recovered(clean, loss, zero)))
    _tell(points, clean, zero)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": model_name, "layer": layer, "site": site, "text": text, "tokens": rows.size}
    facts = {"settings": settings, "loss_clean": clean, "loss_zero_ablated": zero}
    facts |= {"points": [dataclasses.asdict(point) for point in points]}
    write_whole(out / "pursue.json", json.dumps(facts, indent=1).encode())
    write_whole(out / "pareto.png", frontier_figure(points))
    name, sae = next(iter(saes.items()))
    k = min(l0s, key=lambda k: abs(k - evaluate(sae, activations[:1]).l0))
    write_whole(out / "scatter.png", scatter_figure(*_scatter(sae, k, activations), title=f"{name}, {k} latents"))
    print(f"The pictures are {out / 'pareto.png'} and {out / 'scatter.png'}.")


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


def _replace(value: Float[Array, "batch seq d_in"], coder: Autoencoder) -> Float[Array, "batch seq d_in"]:
    return coder(value)


def _activations(
    model: LanguageModel, rows: Int[np.ndarray, "rows context"], site: str, layer: int
) -> tuple[list[Float[np.ndarray, "n d_in"]], float]:
    """The activations that are no sinks, and the norm above which one is a sink."""
    batches = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
    found = []
    with advancing("Streaming activations", rows.size) as advance:
        for batch in stream_activations(model.forward, model.params, batches, site=site, layer=layer, skip_first=1):
            found.append(np.asarray(batch, np.float32))
            advance(_ROWS * rows.shape[1])
    norms = np.concatenate([np.linalg.norm(batch, axis=1) for batch in found])
    keep_above = _SINK * float(np.median(norms))
    return [batch[np.linalg.norm(batch, axis=1) <= keep_above] for batch in found], keep_above


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


def _tell(points: list[CodingPoint], clean: float, zero: float) -> None:
    print(f"loss: clean {clean:.3f}, zero-ablated {zero:.3f} nats a token")
    width = max(len(f"{point.dictionary}: {point.way}") for point in points)
    print(f"{'':<{width}}      L0     FVU    loss  recovered")
    for point in points:
        name = f"{point.dictionary}: {point.way}"
        print(f"{name:<{width}} {point.l0:7.1f} {point.fvu:7.3f} {point.loss:7.3f} {point.recovered:9.1%}")

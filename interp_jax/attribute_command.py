"""`interp-jax attribute`: which nodes of a site make the difference between two prompts.

    index.html          heat maps of effects, layer by position or by head, and the largest ones
    heat_map_AXIS.png   each heat map as a picture
    attribution.json    all effects

The ranked nodes are printed as well.
"""

import dataclasses
import json
import pathlib
from typing import Literal

import numpy as np

from interp_jax.attribution.activation_patching import Direction, Patching
from interp_jax.attribution.atp import atp
from interp_jax.attribution.atp_star import atp_star
from interp_jax.attribution.nodes import Effects, Nodes, resolve
from interp_jax.attribution.prompt_pair import PromptPair, prompt_pair
from interp_jax.models import ModelDtype
from interp_jax.models.known import load
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import advancing, working
from interp_jax.report.attribution_page import attribution_page
from interp_jax.report.heat_map import HeatMap, heat_map_picture
from interp_jax.whole_file import make_folder, write_whole

__all__ = ["Method", "run"]

Method = Literal["patching", "atp", "atp*"]
"""How effects are found."""

_HEADS = ("q", "k", "v", "attn_heads")


def run(
    clean: str,
    corrupted: str,
    *,
    answer: str,
    wrong: str | None,
    align: str | None,
    model_name: str,
    model_dtype: ModelDtype,
    method: Method,
    site: str,
    by: tuple[str, ...] | None,
    direction: Direction,
    n_ranked: int,
    out: pathlib.Path,
) -> None:
    """Attributes, prints the table and writes the page.

    Args:
        clean: the prompt that shows the behaviour.
        corrupted: the prompt that does not.
        answer: what follows the clean prompt, one token.
        wrong: the token that it is compared with; None measures the answer's log-probability.
        align: what is put before the shorter prompt.
        model_name: what `interp_jax.load` takes.
        model_dtype: of its weights and activations.
        method: how effects are found.
        site: the site.
        by: the axes that tell nodes apart; None is by head for sites that have heads, by position for the others.
        direction: which run is patched.
        n_ranked: how many nodes are listed.
        out: the folder to write to.

    Raises:
        ValueError: for prompts, answers, a site or axes that do not fit, before anything long.
        OSError: before anything long, if nothing can be written to the folder.
    """
    if n_ranked < 1:
        raise ValueError(f"--top {n_ranked} lists nothing; give 1 or more.")
    with working(f"Loading {model_name}"):
        model = load(model_name, dtype=model_dtype)
    pair = prompt_pair(model, clean, corrupted, answer=answer, wrong=wrong, align=align)
    nodes = Nodes(site, by=by or ("head" if site in _HEADS else "position"))
    resolve(model, nodes, pair.seq)
    make_folder(out)
    effects = _effects(model, pair, nodes, method, direction)
    print(effects.table(n_ranked))
    print(f"The metric is {effects.clean:.4f} on the clean prompt and {effects.corrupted:.4f} on the corrupted one.")
    heat_maps = _heat_maps(effects, site)
    ranked = [(row.label, row.effect) for row in effects.ranked(n_ranked)]
    setting = {
        "model": model.name,
        "model_dtype": model_dtype,
        "method": method,
        "site": site,
        "question": _question(method, direction),
        "metric": _metric(pair, model),
        "clean": effects.clean,
        "corrupted": effects.corrupted,
        "tokens": list(zip(pair.labels, pair.corrupted_labels, strict=True)),
    }
    for old in out.glob("heat_map_*.png"):  # of a run by other axes
        old.unlink()
    for heat_map in heat_maps:
        # A picture leaves its page, so it tells by itself what its numbers are.
        title = f"{heat_map.title}\n{model.name}, {method}, {direction}\nchange of the {setting['metric']}"
        heat_map_picture(dataclasses.replace(heat_map, title=title)).save(out / f"heat_map_{heat_map.axis}.png")
    facts = {"setting": setting, "by": effects.families[0].by, "layers": effects.families[0].layers}
    facts |= {"effects": effects.values_of[0].tolist()}
    write_whole(out / "attribution.json", json.dumps(facts, indent=1))
    write_whole(out / "index.html", attribution_page(setting=setting, ranked=ranked, heat_maps=heat_maps))
    print(f"The page is {out / 'index.html'}.")


def _effects(model: LanguageModel, pair: PromptPair, nodes: Nodes, method: Method, direction: Direction) -> Effects:
    estimated = pair if direction == "noising" else pair.swapped
    if method != "patching":
        with working("Compiling and attributing"):
            found = (atp if method == "atp" else atp_star)(model, estimated, nodes)
        if direction == "denoising":
            values = (found.corrupted, found.clean)
            return Effects(found.families, found.values_of, pair.position_labels, clean=values[0], corrupted=values[1])
        return found
    with working("Compiling"):
        patching = Patching(model, pair, nodes, direction=direction)
        n_nodes, _ = patching.n_nodes, patching.rows
    with advancing("Patching", n_nodes, unit="nodes") as advance:
        return patching.as_effects(patching.of_nodes(np.arange(n_nodes), advance))


def _question(method: Method, direction: Direction) -> str:
    runs = ("clean", "corrupted") if direction == "noising" else ("corrupted", "clean")
    what = f"{runs[0]} prompt when one node gets its value from the {runs[1]} prompt"
    if method == "patching":
        return f"Each number is the exact change of the metric on the {what}."
    if method == "atp":
        return f"Each number estimates, to first order (AtP), the change of the metric on the {what}."
    return (
        f"Each number estimates the size, without its sign, of the change of the metric on the {what} (AtP*: the mean "
        "over layers whose contribution to the gradient is dropped)."
    )


def _metric(pair: PromptPair, model: LanguageModel) -> str:
    def shown(token: int | None) -> str:
        return repr(model.tokenizer.readable([token])[0]) if token is not None else ""

    if pair.wrong is None:
        return f"log-probability of {shown(pair.answer)} as the next token"
    return f"logit of {shown(pair.answer)} less that of {shown(pair.wrong)} as the next token"


def _heat_maps(effects: Effects, site: str) -> list[HeatMap]:
    """One for each axis that tells nodes apart and has a place in a picture."""
    (family,) = effects.families
    return [HeatMap.of(effects, site, axis) for axis in ("position", "head") if axis in family.by]

"""`interp-jax steer`: one prompt steered beside itself, and whole studies with their Pareto frontiers.

    interp-jax steer "I think that" --positive " love" --negative " hate" --layer 10 --coefficient 4
    interp-jax steer study wedding --sae demo/work-full/sae

A study's folder:

    index.html             the frontiers on one figure, the numbers, texts beside one another, latents
    frontier.svg           that figure by itself
    study.json             settings, all points, and the loss of each row of text
    rollouts/METHOD.json   every continuation, from which the frontier can be computed again
    vectors/METHOD.safetensors
"""

import dataclasses
import json
import pathlib
import re
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import Float, Int

from interp_jax.activations.model_and_rows import model_and_rows
from interp_jax.models import ModelDtype
from interp_jax.models.known import load
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import advancing, note, working
from interp_jax.report.pictures import frontier_picture
from interp_jax.report.steering_page import comparison, steering_page
from interp_jax.sae import Autoencoder, load_sae
from interp_jax.sae.home import check_home
from interp_jax.steering.contrast import from_pair
from interp_jax.steering.decomposition import Decomposition, decompose
from interp_jax.steering.edits import check_edits
from interp_jax.steering.positions import Stretch
from interp_jax.steering.prompts import begin_id, begun
from interp_jax.steering.reading_activations import activations_of
from interp_jax.steering.reading_vector import read_vector
from interp_jax.steering.steer import finite_coefficients, steer
from interp_jax.steering.steering_vector import SteeringVector
from interp_jax.steering.study import Concept, Method, MethodResult, Strengths, methods_of, run_method
from interp_jax.steering.vocabulary import Vocabulary
from interp_jax.whole_file import make_folder, write_whole

__all__ = ["main", "run_study", "steer_once"]

_CONTEXT = 128


def main(arguments: list[str]) -> None:
    """Runs `interp-jax steer ARGUMENTS`.

    Args:
        arguments: what stands after `steer`.
    """
    config = (tyro.conf.FlagCreatePairsOff,)
    if arguments[:1] == ["study"]:
        tyro.cli(run_study, prog="interp-jax steer study", args=arguments[1:], config=config)
    else:
        tyro.cli(steer_once, prog="interp-jax steer", args=arguments, config=config)


def steer_once(
    prompt: Annotated[str, tyro.conf.Positional],
    /,
    *,
    positive: str | None = None,
    negative: str | None = None,
    vector: pathlib.Path | None = None,
    model: str = "smollm2",
    model_dtype: ModelDtype = "float32",
    layer: int | None = None,
    site: str | None = None,
    coefficient: tuple[float, ...] = (2.0,),
    norm: float | None = None,
    once: bool = False,
    positions: Stretch | None = None,
    pad: str = " ",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    sae: pathlib.Path | None = None,
    words: str | None = None,
    text: str = "wikipedia",
    n_seeds: int = 8,
    save: pathlib.Path | None = None,
    html: pathlib.Path | None = None,
) -> None:
    """Continues a prompt as it is and steered by the difference of two texts; `steer study` sweeps whole studies.

    Args:
        prompt: The text to continue.
        positive: A text of what the model shall be steered to.
        negative: A text of what it shall be steered away from.
        vector: A saved vector, instead of the two texts; it says itself at which layer and site.
        model: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        model_dtype: Of its weights and activations; bfloat16 is half as large, on a CPU faster in long passes only.
        layer: The layer; the middle one when left out.
        site: The site, resid_post when left out; `interp-jax sites MODEL` lists them.
        coefficient: How many times the difference is added; several are shown beside one another.
        norm: Scale the vector to this norm first, in the units of the activation.
        once: Add each position's difference at that position of the prompt, and not the mean of all everywhere.
        positions: Where the mean, or the saved vector, is added: at `all` positions, in the `prompt`, or at what is
            `generated`.
        pad: What the shorter text is filled up with, a text of one token.
        max_new_tokens: How many tokens to generate at most.
        temperature: 0 takes the likeliest token; above it, tokens are drawn.
        seed: Of the draws.
        sae: The folder of an autoencoder of the site: tells what the vector is made of.
        words: For the page: a comma-separated list of words, or a file of one a line, that make a rollout successful;
            those of `positive` when left out.
        text: For the page: ordinary text that the loss is measured on; `wikipedia`, or a file or folder.
        n_seeds: For the page: rollouts at each coefficient.
        save: Write the vector to this file.
        html: Write a page with the texts, the frontier and the latents to this file.
    """
    if (vector is None) == (positive is None or negative is None):
        raise ValueError("Give --positive and --negative, two texts, or --vector, a file that --save wrote.")
    if once and (positions is not None or vector is not None):
        raise ValueError("--once keeps the positions of two texts; leave out --positions and --vector, or --once.")
    if html is not None and n_seeds < 1:
        raise ValueError(f"--n-seeds {n_seeds} gives no rollout to judge; pass at least 1.")
    coefficients = (0.0, *(c for c in coefficient if c))
    finite_coefficients(coefficients)
    judge = _judge(words, positive) if html is not None else None
    if html is not None:
        make_folder(html.parent)
    loaded = None if vector is None else SteeringVector.load(vector)
    if loaded is not None:
        for name, own, got in (("layer", loaded.layer, layer), ("site", loaded.site, site)):
            if got not in (None, own):
                raise ValueError(f"{vector} is for {name} {own}, got --{name} {got}; leave --{name} out.")
    autoencoder = None if sae is None else load_sae(sae)
    rows = np.zeros((0, _CONTEXT), np.int32)
    if html is not None or autoencoder is not None:
        language_model, layer, _, held_out = model_and_rows(
            model, layer, text, context=_CONTEXT - 1, n_tokens=0, n_held_out=16 * _CONTEXT, dtype=model_dtype
        )
        rows = _begun_rows(language_model, held_out)
    else:  # no text is needed, and none need be there
        with working(f"Loading {model}"):
            language_model = load(model, dtype=model_dtype)
        layer = language_model.layer_or_middle(layer)
    if loaded is not None:
        made = loaded if positions is None else loaded.at(positions)
    else:
        assert positive is not None
        assert negative is not None
        made = from_pair(language_model, positive, negative, layer=layer, site=site or "resid_post", pad=pad)
        made = made if once else made.mean().at(positions or "all")
    made = made if norm is None else made.to_norm(norm)
    check_edits(made, language_model, [len(begun(language_model, prompt))])
    parts = None if sae is None or autoencoder is None else _decomposed(made, autoencoder, sae)
    if save is not None:
        made.save(save)
        print(f"The vector is in {save}.")
    key = jax.random.key(seed)
    with working("Compiling and generating"):
        found = steer(
            language_model, prompt, made, coefficients=coefficients, max_new_tokens=max_new_tokens,
            temperature=temperature, key=key,
        )  # fmt: skip
    print(f"{made.source}: norm {made.norm:.3g}, added to {made.site} of layer {made.layer} at {_said(made)}")
    for one in found:
        name = "unsteered" if one.coefficient == 0 else f"{one.coefficient:g} times"
        print(f"--- {name}\n{prompt}{one.text}")
    reading = None
    if parts is not None:
        reading = read_vector(parts, language_model, sae=autoencoder, tokens=rows)
        print(f"--- what it is made of\n{reading}")
    if html is None:
        return
    assert judge is not None
    concept = Concept("steered", positive or "", negative or "", (prompt,), (), (), judge)
    method = Method("the vector", made, once, made.source)
    result = _run(
        method, concept, language_model, None, rows, Strengths(coefficients, coefficients), n_seeds, key,
        max_new_tokens, temperature or 1.0,
    )  # fmt: skip
    setting = _setting(language_model, made.layer, made.site, concept, result, rows, judge)
    setting |= {"model_dtype": model_dtype}
    texts = [(one.coefficient, one.text) for one in found]
    page = steering_page(
        f"{prompt}…", setting=setting, comparisons=[comparison("The same prompt", prompt, texts, judge.pattern)],
        points=result.points, readings=[("the vector", reading)] if reading is not None else [],
    )  # fmt: skip
    write_whole(html, page)
    print(f"The page is {html}.")


def run_study(
    concept: Annotated[str, tyro.conf.Positional],
    /,
    *,
    sae: pathlib.Path | None = None,
    model: str = "smollm2",
    model_dtype: ModelDtype = "float32",
    layer: int | None = None,
    site: str = "resid_post",
    text: str = "wikipedia",
    n_held_out: int = 4096,
    n_seeds: int = 16,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    once: tuple[float, ...] = Strengths().once,
    everywhere: tuple[float, ...] = Strengths().everywhere,
    out: pathlib.Path | None = None,
) -> None:
    """Every way of steering to a concept, swept over strengths: success against loss, on one page.

    Args:
        concept: `anger`, `wedding`, or a TOML file of yours with the same entries as theirs.
        sae: The folder of an autoencoder of the site; without one, the ways that need it are left out.
        model: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        model_dtype: Of its weights and activations; bfloat16 is half as large, on a CPU faster in long passes only.
        layer: The layer; the middle one when left out.
        site: The site.
        text: Ordinary text that the loss is measured on: `wikipedia`, a text file, a .jsonl file or a folder of such.
        n_held_out: Tokens of it, at least 8 rows of 128.
        n_seeds: Rollouts of each prompt at each strength.
        max_new_tokens: Tokens of a rollout.
        temperature: Of the draws.
        seed: Of the draws.
        once: Strengths of what is added at some positions of the prompt, in usual norms of the activation.
        everywhere: Strengths of what is done at every position.
        out: The folder to write to; `steer-CONCEPT` when left out.
    """
    chosen = Concept.load(concept)
    autoencoder = None if sae is None else load_sae(sae)
    if autoencoder is None:
        note("No --sae was given: only what needs no dictionary. `interp-jax sae train` makes one.")
    language_model, layer, _, held_out = model_and_rows(
        model, layer, text, context=_CONTEXT - 1, n_tokens=0, n_held_out=n_held_out, dtype=model_dtype
    )
    chosen.check(language_model)
    out = pathlib.Path(f"steer-{chosen.name}") if out is None else out
    for folder in ("rollouts", "vectors"):
        make_folder(out / folder)
    if sae is not None:
        check_home(sae, layer, site)
    rows = _begun_rows(language_model, held_out)
    with working("Reading activations"):
        values = activations_of(language_model, rows.tolist(), site=site, layer=layer)
        usual_norm = float(np.median(np.linalg.norm(np.concatenate([value[1:] for value in values]), axis=1)))
        methods = [
            *methods_of(
                chosen, language_model, autoencoder, rows, layer=layer, site=site, usual_norm=usual_norm
            )
        ]  # fmt: skip
    results: list[MethodResult] = []
    for method in methods:
        result = _run(
            method, chosen, language_model, autoencoder, rows, Strengths(once, everywhere), n_seeds,
            jax.random.key(seed), max_new_tokens, temperature,
        )  # fmt: skip
        _tell(result)
        result.rollouts.save(out / "rollouts" / f"{_slug(method.name)}.json")
        if isinstance(method.edit, SteeringVector):
            method.edit.save(out / "vectors" / f"{_slug(method.name)}.safetensors")
        results.append(result)
    assert isinstance(chosen.judge, Vocabulary)
    setting = _setting(language_model, layer, site, chosen, results[0], rows, chosen.judge)
    setting |= {"model_dtype": model_dtype, "usual_norm": usual_norm, "text": text}
    setting |= {"sae": None if sae is None else str(sae)}
    points = [point for result in results for point in result.points]
    described = [
        {"name": method.name, "about": method.about, "adds_once": method.adds_once, "losses": result.losses.tolist()}
        for method, result in zip(methods, results, strict=True)
    ]
    facts = {"setting": setting, "methods": described, "points": [dataclasses.asdict(point) for point in points]}
    write_whole(out / "study.json", json.dumps(facts, indent=1, ensure_ascii=False))
    page = steering_page(
        f"{chosen.name}, by {len(results)} methods",
        setting=setting,
        comparisons=[_samples(result, chosen.judge) for result in results],
        points=points,
        readings=[(result.method.name, result.reading) for result in results if result.reading is not None],
    )
    write_whole(out / "index.html", page)
    frontier_picture(points).save(out / "frontier.svg")
    print(f"The page is {out / 'index.html'}.")


def _run(
    method: Method, concept: Concept, language_model: LanguageModel, sae: Autoencoder | None,
    rows: Int[np.ndarray, "rows context"], strengths: Strengths, n_seeds: int, key: Any, max_new_tokens: int,
    temperature: float,
) -> MethodResult:  # fmt: skip
    n = len(strengths.once if method.adds_once else strengths.everywhere)
    total = n * (n_seeds * len(concept.prompts) * max_new_tokens + rows.size)
    with advancing(method.name, total) as advance:
        return run_method(
            method, concept, language_model, sae, rows, strengths=strengths, n_seeds=n_seeds, key=key,
            max_new_tokens=max_new_tokens, temperature=temperature, advance=advance,
        )  # fmt: skip


def _begun_rows(language_model: LanguageModel, rows: Int[np.ndarray, "rows cut"]) -> Int[np.ndarray, "rows context"]:
    """Rows of text that begin as a text does, where the tokenizer knows how."""
    first = begin_id(language_model)
    return rows if first is None else np.concatenate([np.full((len(rows), 1), first, rows.dtype), rows], axis=1)


def _judge(words: str | None, positive: str | None) -> Vocabulary:
    if words is None:
        own = [word for word in re.findall(r"\w+", positive or "") if len(word) > 3]
        if not own:
            raise ValueError("What makes a rollout successful? Pass --words, a list like love,loves,loved or a file.")
        return Vocabulary.of(own, "the words of --positive")
    if pathlib.Path(words).is_file():
        return Vocabulary.from_file(words)
    if "," not in words and (pathlib.Path(words).suffix or "/" in words):
        raise ValueError(f"There is no file {words} of --words; give a file of one word a line, or words with commas.")
    return Vocabulary.of([word for word in words.split(",") if word.strip()], "given as --words")


def _decomposed(vector: SteeringVector, autoencoder: Autoencoder, folder: pathlib.Path) -> Decomposition:
    """The vector in the autoencoder's latents, which must be of the same site."""
    check_home(folder, vector.layer, vector.site)
    return decompose(vector, autoencoder)


def _said(vector: SteeringVector) -> str:
    if isinstance(vector.positions, str):
        return {"all": "every position", "prompt": "the prompt's positions", "generated": "generated positions"}[
            vector.positions
        ]
    return f"tokens {', '.join(map(str, vector.positions or ()))} of the prompt"


def _setting(
    language_model: LanguageModel, layer: int | None, site: str, concept: Concept, result: MethodResult,
    rows: Int[np.ndarray, "rows context"], judge: Vocabulary,
) -> dict[str, Any]:  # fmt: skip
    n_prompt = max(len(begun(language_model, prompt)) for prompt in concept.prompts)
    return {
        "model": language_model.name,
        "layer": layer,
        "site": site,
        "judged_by": ", ".join(judge.words),
        "provenance": judge.provenance,
        "n_rollouts": sum(len(of_prompt) for of_prompt in result.rollouts.texts[0]),
        "confidence": "95 %",
        "n_tokens": int(rows.size),
        "n_prompt": n_prompt,
    }


def _samples(result: MethodResult, judge: Vocabulary) -> Any:
    """One prompt and seed at every strength: the seed with the most successes, so that there is something to see."""
    hits: Float[np.ndarray, "coefficients rollouts"] = result.rollouts.successes(judge)
    n_seeds = len(result.rollouts.texts[0][0])
    prompt, seed = divmod(int(hits.sum(axis=0).argmax()), n_seeds)
    texts = [
        (coefficient, row[prompt][seed])
        for coefficient, row in zip(result.rollouts.coefficients, result.rollouts.texts, strict=True)
    ]
    title = f"{result.method.name}: the seed with the most successes of {n_seeds}"
    return comparison(title, result.rollouts.prompts[prompt], texts, judge.pattern)


def _tell(result: MethodResult) -> None:
    print(f"{result.method.name}: {result.method.about}")
    print("  strength  P(success)    interval      loss")
    for point in result.points:
        low, high = point.success_interval
        star = " *" if point.is_on_frontier else ""
        print(f"  {point.coefficient:8g}  {point.success:10.2f}  {low:.2f} - {high:.2f} {point.loss:9.3f}{star}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")

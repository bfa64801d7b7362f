"""From a file's tensors to a `Transformer`'s parameters, one tensor in host memory at a time.

A format (`hugging_face.py`, `gguf_model.py`) says for each of our parameters which tensor it is read from and how that
one is laid out; this module does the rest: it makes sure that the file holds exactly the tensors that are wanted,
checks each shape, and puts each tensor onto the device, into its row of the stack where layers are stacked.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict, Unpack, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import DTypeLike

from interp_jax.models.transformer import Transformer, named_parameters, partition_specs
from interp_jax.models.transformer_config import TransformerConfig

__all__ = ["LAYER", "Layout", "LoadOptions", "OpenedModel", "TensorSource", "assemble", "faults"]

LAYER = "{i}"
"""Stands for the number of the layer in the names of a layout, ours and theirs."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one of our parameters is in a file."""

    name: str
    """The tensor's name, with `{i}` for the layer."""
    read: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor
    """From the file's layout to ours."""


@runtime_checkable
class TensorSource(Protocol):
    """A file of tensors, or several that belong together."""

    @property
    def path(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def names(self) -> Iterable[str]:
        """The tensors that it holds."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One of them."""
        ...


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model's files, opened: what it is and where each of its parameters lies. No tensor has been read."""

    source: TensorSource
    """The tensors."""
    config: TransformerConfig
    """What the model is."""
    layouts: Mapping[str, Layout]
    """For each of our parameters, `blocks.{i}.attn.W_q`, where it is."""
    ignored: Sequence[str] = ()
    """Regular expressions of tensors that are no weights."""


class LoadOptions(TypedDict, total=False):
    """How a model is loaded."""

    dtype: DTypeLike
    """Of the parameters in memory; float32 unless given."""
    compute_dtype: DTypeLike | None
    """Of activations and logits; the parameters' unless given."""
    layers: Literal["stacked", "unrolled"]
    """As in `Transformer`; stacked unless given."""
    remat: bool
    """As in `Transformer`."""
    mesh: Mesh | None
    """Lays the parameters over its axis `model`, as `partition_specs` says; on the default device unless given."""
    check_finite: bool
    """Whether to look for NaNs and infinities in every tensor."""


def assemble(opened: OpenedModel, **options: Unpack[LoadOptions]) -> Transformer:
    """Reads a model, one tensor at a time, straight onto its devices.

    Args:
        opened: Its files.
        **options: See `LoadOptions`.

    Returns:
        The model.

    Raises:
        ValueError: Tensors are missing or unknown (all are listed) or of a wrong shape, an axis of the mesh does not
            divide what it splits, it has no axis `model`, a dtype is no floating-point one, or `check_finite` found
            something.
        TypeError: There is no such option.
    """
    unknown = sorted(options.keys() - LoadOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"There is no option {', '.join(unknown)}; there are {', '.join(LoadOptions.__annotations__)}.")
    config, dtype, mesh = opened.config, options.get("dtype", jnp.float32), options.get("mesh")
    layers = options.get("layers", "stacked")
    for name in ("dtype", "compute_dtype"):
        given = options.get(name)
        if given is not None and not jnp.issubdtype(jnp.dtype(given), jnp.floating):
            raise ValueError(f"{name}={jnp.dtype(given).name}; it must be a floating-point one, such as bfloat16.")
    if mesh is not None:
        if "model" not in mesh.axis_names:
            raise ValueError(
                f"The mesh has the axes {', '.join(map(repr, mesh.axis_names))}; parameters are laid over one named "
                "'model': jax.make_mesh((1, 4), ('data', 'model')), say."
            )
        # Axes that XLA partitions by itself. Those of `jax.make_mesh` are explicit: every gather would have to say how.
        mesh = Mesh(mesh.devices, mesh.axis_names)
    shapes = jax.eval_shape(
        lambda: Transformer(
            config, jax.random.key(0), dtype=dtype, layers=layers, compute_dtype=options.get("compute_dtype"),
            remat=options.get("remat", False),
        )
    )  # fmt: skip
    tensors = _Tensors(opened)
    check_finite = options.get("check_finite", False)
    put = functools.partial(_put, dtype=dtype, mesh=mesh)
    specs = named_parameters(partition_specs(shapes)).values()
    leaves: list[Any] = []
    for (name, leaf), spec in zip(named_parameters(shapes).items(), specs, strict=True):
        _check_divides(name, leaf.shape, spec, mesh)
        if layers == "stacked" and name.startswith("blocks."):
            sharding = None if mesh is None else NamedSharding(mesh, spec)
            stack = jnp.zeros(leaf.shape, dtype, device=sharding)
            for number in range(config.n_layers):
                row = tensors.read(name.replace("blocks.", f"blocks.{number}.", 1), check_finite=check_finite)
                stack = _with_row(stack, put(row, PartitionSpec(*spec[1:])), number)
            leaves.append(stack)
        else:
            leaves.append(put(tensors.read(name, check_finite=check_finite), spec))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def faults(opened: OpenedModel, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """What is wrong with a model's tensors: each is read once and dropped, so that any model can be looked through.

    Args:
        opened: Its files.
        advance: Called with the number of parameters that were read.

    Returns:
        A sentence for each tensor that has a wrong shape or values that are not finite.

    Raises:
        ValueError: Tensors are missing or unknown; all are listed.
    """
    tensors, found = _Tensors(opened), []
    for name, shape in tensors.shapes.items():
        try:
            tensors.read(name, check_finite=True)
        except ValueError as error:
            found.append(str(error))
        advance(math.prod(shape))
    return found


class _Tensors:
    """What our parameters are read from, by their names where layers are unrolled."""

    def __init__(self, opened: OpenedModel):
        """Makes sure that the file holds exactly what is wanted."""
        shapes = jax.eval_shape(lambda: Transformer(opened.config, jax.random.key(0), layers="unrolled"))
        self.source = opened.source
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(leaf.shape) for n, leaf in named_parameters(shapes).items()}
        self.places = {name: _place(name, opened.layouts) for name in self.shapes}
        _check_names(opened.source, {name for name, _ in self.places.values()}, opened.ignored)

    def read(self, name: str, *, check_finite: bool) -> np.ndarray:
        """One of our parameters, in the dtype that it is stored in."""
        tensor_name, layout = self.places[name]
        values = np.asarray(layout.read(self.source.tensor(tensor_name)))
        if values.shape != self.shapes[name]:
            raise ValueError(
                f"{self.source.path}: {tensor_name} gives {name} the shape {list(values.shape)}, and the config makes "
                f"it {list(self.shapes[name])}."
            )
        if check_finite and not (is_finite := np.isfinite(values.astype(np.float32))).all():
            bad = int((~is_finite).sum())
            raise ValueError(f"{self.source.path}: {tensor_name} holds {bad} values that are not finite.")
        return values


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(stack: Any, row: Any, number: Any) -> Any:
    return stack.at[number].set(row)


def _put(values: np.ndarray, spec: PartitionSpec, *, dtype: DTypeLike, mesh: Mesh | None) -> Any:
    values = values.astype(jnp.dtype(dtype), copy=False)
    return jnp.asarray(values) if mesh is None else jax.device_put(values, NamedSharding(mesh, spec))


def _place(name: str, layouts: Mapping[str, Layout]) -> tuple[str, Layout]:
    """The tensor that one of our parameters is read from."""
    general = re.sub(r"^blocks\.(\d+)\.", f"blocks.{LAYER}.", name)
    number = re.match(r"blocks\.(\d+)\.", name)
    layout = layouts[general]
    return layout.name.replace(LAYER, number[1]) if number else layout.name, layout


def _check_names(source: TensorSource, wanted: set[str], ignored: Sequence[str]) -> None:
    held = set(source.names)
    unknown = sorted(name for name in held - wanted if not any(re.search(each, name) for each in ignored))
    missing = sorted(wanted - held)
    if missing or unknown:
        raise ValueError(
            f"{source.path} does not hold the tensors of its configuration. Missing: {_some(missing)}. "
            f"Unknown: {_some(unknown)}."
        )


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")) or "none"


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | None) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if mesh is not None and axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name}{list(shape)} cannot be split over the {mesh.shape[axis]} devices of the mesh's axis {axis!r}; "
                "take a mesh whose axis divides the heads, neurons and vocabulary."
            )

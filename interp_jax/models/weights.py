"""From a file's tensors to a `Transformer`'s parameters, one tensor in host memory at a time.

A format (`hugging_face.py`, `gguf_model.py`) says for each of our parameters which tensor it is read from and how that
one is laid out; this module does the rest: it makes sure that the file holds exactly the tensors that are wanted,
checks each shape, and puts each tensor onto the device, into its row of the stack where layers are stacked.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import DTypeLike

from interp_jax.models.transformer import Transformer, named_parameters, partition_specs
from interp_jax.models.transformer_config import TransformerConfig

__all__ = ["LAYER", "Layout", "TensorSource", "assemble"]

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


def assemble(
    source: TensorSource,
    config: TransformerConfig,
    layouts: Mapping[str, Layout],
    *,
    ignored: Sequence[str] = (),
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    layers: Literal["stacked", "unrolled"] = "stacked",
    remat: bool = False,
    mesh: Mesh | None = None,
    check_finite: bool = False,
) -> Transformer:
    """Reads a model.

    Args:
        source: The tensors.
        config: What the model is.
        layouts: For each of our parameters, `blocks.{i}.attn.W_q`, where it is.
        ignored: Regular expressions of tensors that are no weights.
        dtype: Of the parameters in memory.
        compute_dtype: As in `Transformer`.
        layers: As in `Transformer`.
        remat: As in `Transformer`.
        mesh: Lays the parameters over its axis `model`, as `partition_specs` says; on the default device when None.
        check_finite: Look for NaNs and infinities in every tensor.

    Returns:
        The model.

    Raises:
        ValueError: Tensors are missing, unknown or of a wrong shape (all are listed), an axis of the mesh does not
            divide what it splits, or `check_finite` found something.
    """
    if mesh is not None:
        # Axes that XLA partitions by itself. Those of `jax.make_mesh` are explicit: every gather would have to say how.
        mesh = Mesh(mesh.devices, mesh.axis_names)
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "remat": remat}

    def skeleton(kind: Literal["stacked", "unrolled"]) -> Transformer:
        return jax.eval_shape(lambda: Transformer(config, jax.random.key(0), dtype=dtype, layers=kind, **options))

    wanted = {name: tuple(leaf.shape) for name, leaf in named_parameters(skeleton("unrolled")).items()}
    places = {name: _place(name, layouts) for name in wanted}
    _check_names(source, {name for name, _ in places.values()}, ignored)
    shapes = skeleton(layers)
    specs = partition_specs(shapes)
    paths = named_parameters(shapes)
    leaves: list[Any] = []
    for (name, leaf), spec in zip(paths.items(), named_parameters(specs).values(), strict=True):
        put = functools.partial(_put, dtype=dtype, mesh=mesh)
        _check_divides(name, leaf.shape, spec, mesh)

        def read(each: str) -> np.ndarray:
            tensor_name, layout = places[each]
            values = np.asarray(layout.read(source.tensor(tensor_name)))
            if values.shape != wanted[each]:
                raise ValueError(
                    f"{source.path}: {tensor_name} gives {each} the shape {list(values.shape)}, and the config makes "
                    f"it {list(wanted[each])}."
                )
            if check_finite and not np.isfinite(values.astype(np.float32)).all():
                bad = int((~np.isfinite(values.astype(np.float32))).sum())
                raise ValueError(f"{source.path}: {tensor_name} holds {bad} values that are not finite.")
            return values

        if layers == "stacked" and name.startswith("blocks."):
            sharding = None if mesh is None else NamedSharding(mesh, spec)
            stack = jnp.zeros(leaf.shape, dtype, device=sharding)
            for number in range(config.n_layers):
                row = read(name.replace("blocks.", f"blocks.{number}.", 1))
                stack = _with_row(stack, put(row, PartitionSpec(*spec[1:])), number)
            leaves.append(stack)
        else:
            leaves.append(put(read(name), spec))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


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

"""What effects are attributed to: nodes, the slices of a site's value, and the effects themselves.

`Nodes("attn_heads", by=("position", "head"))` is a family of nodes: in every layer one node for each position and
head, which holds that head's whole vector there. What `by` does not name is held together: `Nodes("attn_heads",
by="head")` has one node a head, all positions at once.

A family is resolved against a model once (`resolve`); from then on it is shapes and names. Axes have names by site:

| sites | axes of a row | nodes, unless told otherwise |
|---|---|---|
| `q`, `k`, `v`, `attn_heads` | position, head, unit | position, head |
| `attn_logits`, `attn_probs` | head, position, key | head, position, key |
| `mlp_pre`, `mlp_act` | position, unit | position, unit |
| all others of two axes (the stream, `attn_out`, `mlp_out`, a site of the model's own) | position, unit | position |

A key and value head of a group is a node of its own. The last axis may also be called `neuron` or `latent`. So latents
are nodes where the model's forward pass marks their codes as a site.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interp_jax.instrument import SiteTable, list_sites
from interp_jax.models.language_model import LanguageModel

__all__ = [
    "Effects",
    "Family",
    "Node",
    "NodeEffect",
    "Nodes",
    "as_mask",
    "axes_of",
    "every_stream_site",
    "resolve",
    "sites_of",
]

_HEADS = ("q", "k", "v", "attn_heads")
_SCORES = ("attn_logits", "attn_probs")
_NEURONS = ("mlp_pre", "mlp_act")
_UNIT_NAMES = ("unit", "neuron", "latent")


@dataclasses.dataclass(frozen=True)
class Nodes:
    """A family of nodes: slices of one site's value, in some layers."""

    site: str
    """The site's name."""
    by: str | Sequence[str] | None = None
    """The axes that tell nodes apart; None for the site's usual ones, () for one node a layer."""
    layers: int | Sequence[int] | None = None
    """The layers; None for all that have the site."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One node: a slice of a site's value. An axis that is not fixed is meant as a whole."""

    layer: int | None
    """The layer; None for a site outside the layers."""
    site: str
    """The site's name."""
    position: int | None = None
    """The token position (of `attn_probs` and `attn_logits`: the query's)."""
    head: int | None = None
    """The head; of k and v, the key-value head."""
    unit: int | None = None
    """The neuron, latent or coordinate."""
    key: int | None = None
    """The key position, of `attn_probs` and `attn_logits`."""

    @property
    def fixed(self) -> dict[str, int]:
        """The axes that are fixed, by name."""
        names = ("position", "head", "unit", "key")
        return {name: at for name in names if (at := getattr(self, name)) is not None}

    def in_words(self, labels: Sequence[str] | None = None) -> str:
        """For tables: `L5 attn_heads, head 3, position 7 'Paris'`.

        Args:
            labels: the tokens' labels by position.
        """
        parts = [self.site if self.layer is None else f"L{self.layer} {self.site}"]
        for name, at in self.fixed.items():
            label = f" {labels[at]!r}" if labels is not None and name in ("position", "key") else ""
            parts.append(f"{name} {at}{label}")
        return ", ".join(parts)


class NodeEffect(NamedTuple):
    """A node with its effect."""

    node: Node
    """Which."""
    effect: float
    """In the metric's units."""
    label: str
    """The node in words."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Nodes resolved against a model: which layers there are, and the shape of one row's value."""

    site: str
    """The site's name."""
    layers: tuple[int | None, ...]
    """Its layers, in order."""
    shape: tuple[int, ...]
    """Of one row's value, the same in each layer."""
    axes: tuple[str, ...]
    """The name of each axis of `shape`."""
    by: tuple[str, ...]
    """The axes that tell nodes apart, in the order of `axes`."""

    @property
    def by_shape(self) -> tuple[int, ...]:
        """The sizes of the axes in `by`."""
        return tuple(size for size, axis in zip(self.shape, self.axes, strict=True) if axis in self.by)

    @property
    def spread_shape(self) -> tuple[int, ...]:
        """`shape` with 1 where an axis does not tell nodes apart: to this `by_shape` is reshaped to broadcast."""
        return tuple(size if axis in self.by else 1 for size, axis in zip(self.shape, self.axes, strict=True))

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return len(self.layers) * math.prod(self.by_shape)

    def summed(self, value: Float[Array, "*shape"]) -> Float[Array, "*by_shape"]:
        """One row's value summed over the axes that do not tell nodes apart, in float32."""
        held = tuple(place for place, axis in enumerate(self.axes) if axis not in self.by)
        return jnp.sum(value.astype(jnp.float32), axis=held)

    def node(self, number: int) -> Node:
        """The node of this number, counted through layers first."""
        layer, *places = np.unravel_index(number, (len(self.layers), *self.by_shape))
        fixed = dict(zip(self.by, map(int, places), strict=True))
        return Node(self.layers[int(layer)], self.site, **fixed)


def sites_of(language_model: LanguageModel, seq: int) -> SiteTable:
    """The sites of a model for one row, found without computing; the same question is answered from memory.

    Args:
        language_model: the model.
        seq: tokens of the row.
    """
    leaves, tree = jax.tree.flatten(language_model.params)
    avals = tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves)
    return _sites(language_model.forward, tree, avals, seq)


@functools.lru_cache(maxsize=16)
def _sites(forward: Any, tree: Any, avals: tuple[Any, ...], seq: int) -> SiteTable:
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*aval) for aval in avals])
    return list_sites(forward)(params, jax.ShapeDtypeStruct((1, seq), jnp.int32))


def every_stream_site(language_model: LanguageModel, seq: int) -> tuple[Nodes, ...]:
    """Every site of floating-point numbers in the layers, by position: all there is at `(site, layer, position)`.

    Args:
        language_model: the model.
        seq: tokens of a prompt.
    """
    names = {row.name: len(row.shape) for row in sites_of(language_model, seq) if row.layer is not None}
    return tuple(Nodes(name, by="position") for name in names)


def resolve(language_model: LanguageModel, nodes: Nodes | Sequence[Nodes], seq: int) -> tuple[Family, ...]:
    """Families of nodes, checked against the model.

    Args:
        language_model: the model.
        nodes: one family or several.
        seq: tokens of a prompt.

    Returns:
        The families in the given order.

    Raises:
        ValueError: if a site, a layer or an axis does not exist (the error lists what there is), or a site is named
            twice.
    """
    several: list[Any] = [nodes] if isinstance(nodes, Nodes | Node | str) else list(nodes)
    if wrong := [each for each in several if not isinstance(each, Nodes)]:
        raise ValueError(f"Expected Nodes, as Nodes('resid_post', by='position'), got {wrong[0]!r}.")
    if not several:
        raise ValueError("There are no nodes; give at least one family, for example Nodes('resid_post').")
    table = sites_of(language_model, seq)
    families = tuple(_resolved(each, table, language_model.name) for each in several)
    names = [family.site for family in families]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several families have the site {', '.join(twice)}; ask for them in calls of their own.")
    return families


def _resolved(nodes: Nodes, table: SiteTable, model_name: str) -> Family:
    rows = {row.layer: row for row in table if row.name == nodes.site}
    if not rows:
        raise ValueError(_no_such("site", nodes.site, {row.name: None for row in table}, model_name))
    layers = tuple(rows)
    if nodes.layers is not None:
        layers = (nodes.layers,) if isinstance(nodes.layers, int | np.integer) else tuple(nodes.layers)
        if not layers:
            raise ValueError(f"The nodes of {nodes.site} name no layer; leave layers= out for all that have the site.")
        if missing := [layer for layer in layers if layer not in rows]:
            raise ValueError(
                f"{model_name} has no {nodes.site} in layer {', '.join(map(str, missing))}; there is one in layers "
                f"{', '.join(map(str, rows))}."
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"A layer is named twice: {layers}.")
    shapes = {tuple(rows[layer].shape) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"{nodes.site} has several shapes, {sorted(shapes)}; name layers in which it has one.")
    shape = shapes.pop()[1:]
    axes = axes_of(nodes.site, len(shape))
    return Family(nodes.site, layers, shape, axes, _by(nodes, axes))


def axes_of(site: str, rank: int) -> tuple[str, ...]:
    """The names of the axes of one row's value.

    Args:
        site: the site.
        rank: how many axes there are.

    Raises:
        ValueError: if values of such a rank have no names here.
    """
    if site in _SCORES and rank == 3:
        return ("head", "position", "key")
    named = {1: ("position",), 2: ("position", "unit"), 3: ("position", "head", "unit")}
    if rank not in named:
        raise ValueError(f"{site} has {rank} axes besides the batch; nodes are known for sites of one to three.")
    return named[rank]


def _by(nodes: Nodes, axes: tuple[str, ...]) -> tuple[str, ...]:
    if nodes.by is None:
        if nodes.site in (*_SCORES, *_NEURONS):
            return axes
        return tuple(axis for axis in axes if axis != "unit")
    given = (nodes.by,) if isinstance(nodes.by, str) else nodes.by
    wanted = {"unit" if axis in _UNIT_NAMES else axis for axis in given}
    if unknown := sorted(wanted - set(axes)):
        raise ValueError(f"{nodes.site} has no axis {', '.join(unknown)}; it has {', '.join(axes)}.")
    return tuple(axis for axis in axes if axis in wanted)


def _no_such(what: str, name: str, existing: Iterable[str], model_name: str) -> str:
    close = difflib.get_close_matches(name, list(existing), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{model_name} has no {what} {name!r}.{hint} It has: {', '.join(existing)}."


def as_mask(
    language_model: LanguageModel, nodes: Node | Collection[Node], seq: int
) -> dict[tuple[int | None, str], np.ndarray]:
    """Nodes as masks over their sites' values.

    Args:
        language_model: the model.
        nodes: the nodes.
        seq: tokens of a prompt.

    Returns:
        For each (layer, site) that has a node, a boolean array in the shape of one row's value: true where a node is.

    Raises:
        ValueError: for a node that does not exist; it says what there is.
    """
    table = sites_of(language_model, seq)
    masks: dict[tuple[int | None, str], np.ndarray] = {}
    for node in [nodes] if isinstance(nodes, Node) else nodes:
        layers = None if node.layer is None else (node.layer,)
        family = _resolved(Nodes(node.site, by=(), layers=layers), table, language_model.name)
        if node.layer is None and family.layers != (None,):
            raise ValueError(f"{node.site} stands in layers; say in which one: Node(layer, {node.site!r}, ...).")
        places: list[Any] = [slice(None)] * len(family.axes)
        for axis, at in node.fixed.items():
            if axis not in family.axes:
                raise ValueError(f"{node.in_words()}: {node.site} has no axis {axis}; it has {', '.join(family.axes)}.")
            size = family.shape[family.axes.index(axis)]
            if not 0 <= at < size:
                raise ValueError(f"{node.in_words()} does not exist: its {axis} can be 0 to {size - 1}.")
            places[family.axes.index(axis)] = at
        mask = masks.setdefault((node.layer, node.site), np.zeros(family.shape, bool))
        mask[tuple(places)] = True
    return masks


class Effects(Mapping[tuple[int | None, str], np.ndarray]):
    """Effects of nodes: an array over the axes of `by` for each (layer, site)."""

    def __init__(
        self,
        families: Sequence[Family],
        values: Sequence[Any],
        labels: Sequence[str] | None = None,
        *,
        clean: float | None = None,
        corrupted: float | None = None,
    ):
        """Effects that were computed.

        Args:
            families: the nodes.
            values: for each family, `[n_layers, *by_shape]`.
            labels: the tokens' labels by position.
            clean: the metric on the clean prompt.
            corrupted: the metric on the corrupted prompt.
        """
        self.clean, self.corrupted = clean, corrupted
        self.families = tuple(families)
        self.values_of = tuple(np.asarray(value, np.float32) for value in values)
        for family, value in zip(self.families, self.values_of, strict=True):
            if value.shape != (len(family.layers), *family.by_shape):
                expected = (len(family.layers), *family.by_shape)
                raise ValueError(f"effects of {family.site} must have shape {expected}, got {value.shape}")
        self.labels = None if labels is None else tuple(labels)

    def __getitem__(self, key: tuple[int | None, str]) -> np.ndarray:
        for family, value in zip(self.families, self.values_of, strict=True):
            if family.site == key[1] and key[0] in family.layers:
                return np.asarray(value[family.layers.index(key[0])])
        raise KeyError(f"{key} was not attributed to; there are {', '.join(map(str, self))}")

    def __iter__(self) -> Iterator[tuple[int | None, str]]:
        return ((layer, family.site) for family in self.families for layer in family.layers)

    def __len__(self) -> int:
        return sum(len(family.layers) for family in self.families)

    @property
    def flat(self) -> Float[np.ndarray, "n_nodes"]:
        """Every effect, family by family, layer by layer: the order of `node`."""
        return np.concatenate([value.reshape(-1) for value in self.values_of])

    @classmethod
    def from_flat(cls, families: Sequence[Family], flat: Any, *args: Any, **kwargs: Any) -> "Effects":
        """Effects from one vector in the order of `flat`; the other arguments are those of `Effects`."""
        ends = np.cumsum([family.n_nodes for family in families])[:-1]
        parts = np.split(np.asarray(flat), ends)
        shaped = [
            part.reshape(len(family.layers), *family.by_shape) for family, part in zip(families, parts, strict=True)
        ]
        return cls(families, shaped, *args, **kwargs)

    def node(self, number: int) -> Node:
        """The node whose effect is `flat[number]`."""
        for family in self.families:
            if number < family.n_nodes:
                return family.node(number)
            number -= family.n_nodes
        raise IndexError(f"there are {sum(family.n_nodes for family in self.families)} nodes")

    def __repr__(self) -> str:
        return self.table()

    def ranked(self, k: int | None = None) -> list[NodeEffect]:
        """The nodes with the largest absolute effects, the largest first.

        Args:
            k: how many; None for all.
        """
        flat = self.flat
        order = np.argsort(-np.abs(flat), kind="stable")[:k]
        nodes = [(self.node(int(number)), float(flat[number])) for number in order]
        return [NodeEffect(node, effect, node.in_words(self.labels)) for node, effect in nodes]

    def table(self, k: int = 20) -> str:
        """The ranked nodes as text, a line each.

        Args:
            k: how many.
        """
        rows = self.ranked(k)
        lines = [f"{'effect':>10}  node", *(f"{row.effect:>+10.4f}  {row.label}" for row in rows)]
        return "\n".join(lines)

    def grid(self, site: str, axis: str = "position") -> Float[np.ndarray, "layers size"]:
        """A site's effects as layers by one axis, for a heat map; over the other axes of `by` they are summed.

        Sums of effects that were measured one by one are no joint effect. For that, name in `by` the one axis alone.

        Args:
            site: the site.
            axis: the axis, `position` or `head`, say.

        Raises:
            ValueError: if the site was not attributed to, or not by this axis.
        """
        for family, value in zip(self.families, self.values_of, strict=True):
            if family.site == site:
                if axis not in family.by:
                    raise ValueError(f"{site} was attributed by {', '.join(family.by) or 'layer'}, not by {axis}.")
                others = tuple(1 + place for place, name in enumerate(family.by) if name != axis)
                return value.sum(axis=others)
        sites = ", ".join(family.site for family in self.families)
        raise ValueError(f"{site} was not attributed to; there is {sites}.")

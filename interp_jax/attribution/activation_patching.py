"""Activation patching: a node's value is replaced, the pass runs on, and the metric tells what that did.

The effect of a node, or of several at once, is *metric(patched) - metric(base)*. What is patched into which base:

| direction | base | patched in | asks |
|---|---|---|---|
| `noising` | the clean prompt | the corrupted prompt's value, or an ablation | is the node needed? |
| `denoising` | the corrupted prompt | the clean prompt's value | does the node suffice? |

Instead of the corrupted prompt's value, noising may put in zero, the mean over other prompts, or other prompts' values
one after another (`resample`: the effect is the mean over them).

How it runs. A set of nodes is a mask: a boolean for each node. The rows of one batch are patched by one mask each, so a
sweep over all nodes is a few batches with one node a row, and the joint patching of random subsets, which the bound on
what was missed needs, runs in the very same program. That is compiled once for a model, a length and the families of
nodes; tokens, answers, values and masks are its arguments.

Below the lowest layer that a batch patches, its rows are the base run. On this project's `Transformer` a batch enters
there, with the base run's `resid_pre`: over all layers that saves half of the blocks' work. The nodes or sets of a call
are taken in the order of their layers for that. Any other model runs from its first layer (`measured_pass`).

Memory. The rows of a batch are as many as fit `memory_budget`: the program is compiled, and what XLA says that it needs
besides the model's parameters is held against the budget.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from interp_jax.attribution.measured_pass import measured_pass
from interp_jax.attribution.metric import Metric, check_varies, metric_of
from interp_jax.attribution.nodes import Effects, Family, Node, Nodes, as_mask, axes_of, resolve
from interp_jax.attribution.prompt_pair import PromptPair
from interp_jax.instrument import iterate
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.token_ids import check_ids

__all__ = [
    "DEFAULT_BUDGET",
    "Ablation",
    "Direction",
    "Forward",
    "Patching",
    "activation_patching",
    "by_family",
    "check_budget",
    "families_of_sets",
    "joint_patching",
    "patch_families",
    "rows_that_fit",
    "site_values",
]

Ablation = Literal["corrupted", "zero", "mean", "resample"]
"""What stands in a node's place; see the module's docstring."""
Direction = Literal["noising", "denoising"]
"""Which run is patched; see the module's docstring."""

Forward = Callable[[Any, Int[Array, "batch seq"]], Float[Array, "batch seq vocab"]]
MOST_ROWS = 64
"""Rows of a batch at most. More rows make it no faster once the processor is busy."""
DEFAULT_BUDGET = 2 * 2**30
_TOO_SMALL = (
    "A batch of one row needs {least} bytes besides the model's parameters, more than the memory budget of {budget:,}. "
    "Raise the budget, or name fewer layers."
)


def site_values(forward: Forward, families: Sequence[Family], params: Any, tokens: Any) -> tuple[Any, tuple[Any, ...]]:
    """The logits, and each family's values stacked over its layers; to be called under jit.

    Args:
        forward: the model's function.
        families: whose sites are read.
        params: the model's parameters.
        tokens: `[batch, seq]`.

    Returns:
        The logits, and for each family `[n_layers, batch, *shape]`.
    """
    wanted = {(layer, family.site) for family in families for layer in family.layers}
    start = iterate(forward, sites={name for _, name in wanted}, layers={layer for layer, _ in wanted})
    for layer, name, value in (running := start(params, tokens)):
        if (layer, name) in wanted:
            running.save((layer, name), value)
        del value
    found = running.saved
    return running.retval, tuple(
        _stacked([found[layer, family.site] for layer in family.layers]) for family in families
    )


def _stacked(values: Sequence[Any]) -> Any:
    # By an axis that is there: XLA then sees that pieces of one buffer are put together again. jnp.stack of 30 layers
    # took it twenty times as long as the forward pass.
    return jnp.concatenate(values, axis=0).reshape(len(values), *values[0].shape)


def patch_families(
    families: Sequence[Family], masks: Sequence[Any], sources: Sequence[Any]
) -> Callable[[int | None, str, Any], Any]:
    """What the loop over a patched pass puts in at a site.

    Args:
        families: the nodes.
        masks: for each family, `[rows, n_layers, *by_shape]`: where the source's value stands.
        sources: for each family, `[n_layers, *shape]`.

    Returns:
        A function of a step's layer, name and value that gives the value to carry on with, or None to leave it alone.
    """
    by_site = {family.site: number for number, family in enumerate(families)}

    def patched(layer: int | None, name: str, value: Any) -> Any:
        number = by_site.get(name)
        if number is None or layer not in families[number].layers:
            return None
        family = families[number]
        place = family.layers.index(layer)
        mask = masks[number][:, place].reshape(-1, *family.spread_shape)
        return jnp.where(mask, sources[number][place], value).astype(value.dtype)

    return patched


def check_direction(direction: str) -> None:
    """Refuses a direction that is none.

    Args:
        direction: what was given.

    Raises:
        ValueError: if it is no `Direction`.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"direction is one of {', '.join(get_args(Direction))}; got {direction!r}.")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(forward: Forward, families: tuple[Family, ...], params: Any, tokens: Any, metric: Any) -> Any:
    """The metric and the sites' values of prompts `tokens[batch, seq]`."""
    logits, values = site_values(forward, families, params, tokens)
    return metric(logits), values


@functools.partial(jax.jit, static_argnums=(0, 1))
def _patched(
    forward: Callable[..., Any],
    families: tuple[Family, ...],
    params: Any,
    metric: Any,
    tokens: Int[Array, "seq"],
    sources: tuple[Any, ...],
    masks: tuple[Any, ...],
    streams: Float[Array, "n_layers seq d_model"] | None,
    first: Int[Array, ""],
) -> Float[Array, "rows"]:
    """The metric of one row for each mask, patched where it is true; from layer `first` on, if there are `streams`."""
    rows = masks[0].shape[0]
    patch = patch_families(families, masks, sources)
    given = (params, jnp.broadcast_to(tokens, (rows, len(tokens))))
    if streams is not None:
        given = (*given, jnp.broadcast_to(streams[first], (rows, *streams.shape[1:])), first)
    start = iterate(
        forward,
        sites={family.site for family in families},
        layers={layer for family in families for layer in family.layers},
    )
    for layer, name, value in (running := start(*given)):
        if (new := patch(layer, name, value)) is not None:
            running.modified_value = new
        del value
    return metric(running.retval)


def by_family(families: Sequence[Family], masks: Bool[np.ndarray, "rows n_nodes"]) -> tuple[np.ndarray, ...]:
    """Masks in the order of `Effects.flat` as `[rows, n_layers, *by_shape]` for each family."""
    ends = np.cumsum([family.n_nodes for family in families])[:-1]
    return tuple(
        part.reshape(-1, len(family.layers), *family.by_shape)
        for family, part in zip(families, np.split(masks, ends, axis=1), strict=True)
    )


def check_budget(families: Sequence[Family], memory_budget: int) -> None:
    """Refuses, before anything is run, a budget that cannot even hold what is patched in.

    What a batch needs in all is known once it is compiled (`rows_that_fit`).

    Args:
        families: whose values are held.
        memory_budget: bytes.

    Raises:
        ValueError: if their values, at two bytes a number, do not fit.
    """
    least = 2 * sum(len(family.layers) * math.prod(family.shape) for family in families)
    if least > memory_budget:
        raise ValueError(_TOO_SMALL.format(least=f"at least {least:,}", budget=memory_budget))


def rows_that_fit(n_rows: int, needed: Callable[[int], int], memory_budget: int) -> int:
    """How many rows a batch has: as many as fit the budget, and no more than share all rows out evenly.

    Args:
        n_rows: of the whole work.
        needed: the bytes that a batch of so many rows takes.
        memory_budget: bytes.

    Raises:
        ValueError: if one row does not fit.
    """
    rows = -(-n_rows // -(-n_rows // MOST_ROWS))
    while (bytes_needed := needed(rows)) > memory_budget:
        if rows == 1:
            raise ValueError(_TOO_SMALL.format(least=f"{bytes_needed:,}", budget=memory_budget))
        rows = max(1, min(rows - 1, rows * memory_budget // bytes_needed))
    return rows


class Patching:
    """A base run and what can be patched into it: gives the effects of any sets of the nodes."""

    def __init__(
        self,
        language_model: LanguageModel,
        pair: PromptPair,
        nodes: Nodes | Sequence[Nodes],
        *,
        metric: Metric | None = None,
        ablation: Ablation = "corrupted",
        direction: Direction = "noising",
        prompts: Int[np.ndarray, "n seq"] | None = None,
        memory_budget: int = DEFAULT_BUDGET,
    ):
        """Runs both prompts and keeps what is patched in. The arguments are those of `activation_patching`."""
        if ablation not in get_args(Ablation):
            raise ValueError(f"ablation is one of {', '.join(get_args(Ablation))}; got {ablation!r}.")
        check_direction(direction)
        if direction == "denoising" and ablation != "corrupted":
            raise ValueError(
                f"Denoising puts clean values into the corrupted run; ablation={ablation!r} is for noising."
            )
        if (ablation in ("mean", "resample")) != (prompts is not None):
            raise ValueError("prompts= are what mean and resample ablation take values from: give both or neither.")
        self.language_model, self.pair = language_model, pair
        self.families = resolve(language_model, nodes, pair.seq)
        check_budget(self.families, memory_budget)
        self._pass = run = measured_pass(
            language_model, self.families, metric_of(metric, pair, language_model.vocab_size)
        )
        self.memory_budget = memory_budget
        tokens = jnp.asarray(np.stack([pair.clean, pair.corrupted]), jnp.int32)
        entries = resolve(language_model, Nodes("resid_pre"), pair.seq) if run.enter is not None else ()
        self._read = (*self.families, *entries)
        values, found = _measure(run.forward, self._read, run.params, tokens, run.metric)
        check_varies(*values)
        self.clean, self.corrupted = map(float, values)
        self.base, row, other = (self.clean, 0, 1) if direction == "noising" else (self.corrupted, 1, 0)
        self._tokens = tokens[row]
        of_sites, streams = found[: len(self.families)], found[len(self.families) :]
        self._streams = streams[0][:, row] if streams else None
        if ablation == "corrupted":
            self._sources = [tuple(value[:, other] for value in of_sites)]
        elif ablation == "zero":
            self._sources = [tuple(jnp.zeros_like(value[:, 0]) for value in of_sites)]
        else:
            self._sources = list(self._of_prompts(prompts))
            if ablation == "mean":
                means = jax.tree.map(lambda *each: sum(each) / len(each), *self._sources)
                self._sources = [means]

    def _of_prompts(self, prompts: Any) -> Iterator[tuple[Any, ...]]:
        rows = np.asarray(prompts)
        if rows.ndim != 2 or rows.shape[1] != self.pair.seq or not len(rows):
            raise ValueError(f"prompts must be tokens [n, {self.pair.seq}], as long as the pair's, got {rows.shape}.")
        check_ids(rows, self.language_model.vocab_size, "prompts")
        run = self._pass
        for row in rows:
            given = jnp.asarray(np.stack([row, row]), jnp.int32)  # the shape that is compiled already
            values = _measure(run.forward, self._read, run.params, given, run.metric)[1]
            yield tuple(value[:, 0] for value in values[: len(self.families)])

    @property
    def n_nodes(self) -> int:
        """How many nodes the families have."""
        return sum(family.n_nodes for family in self.families)

    def of_sets(
        self, sets: Bool[np.ndarray, "n_sets n_nodes"], advance: Callable[[int], Any] | None = None
    ) -> Float[np.ndarray, "n_sets"]:
        """The effect of each set of nodes, patched jointly.

        Args:
            sets: which nodes are in each set, in the order of `Effects.flat`.
            advance: called with the number of sets as they are done.

        Returns:
            metric(patched) - metric(base).
        """
        last = self.language_model.n_layers - 1
        lowest = [self._layers[each].min(initial=last) for each in sets]
        return self._effects(np.asarray(lowest, np.int32), lambda chosen: sets[chosen], advance)

    def of_nodes(
        self, numbers: Int[np.ndarray, "n"] | Sequence[int], advance: Callable[[int], Any] | None = None
    ) -> Float[np.ndarray, "n"]:
        """The effect of each node by itself.

        Args:
            numbers: the nodes' places in `Effects.flat`.
            advance: called with the number of nodes as they are done.

        Returns:
            metric(patched) - metric(base).
        """
        places = np.asarray(numbers, np.int64)

        def sets(chosen: np.ndarray) -> np.ndarray:
            mask = np.zeros((len(chosen), self.n_nodes), bool)
            mask[np.arange(len(chosen)), places[chosen]] = True
            return mask

        return self._effects(self._layers[places], sets, advance)

    @functools.cached_property
    def _layers(self) -> Int[np.ndarray, "n_nodes"]:
        """The layer of each node; 0 for sites outside the layers, of which `embed` stands before them."""
        each = [
            np.repeat([layer or 0 for layer in one.layers], one.n_nodes // len(one.layers)) for one in self.families
        ]
        return np.concatenate(each).astype(np.int32)

    def _effects(
        self, lowest: Int[np.ndarray, "n_sets"], sets: Callable[[np.ndarray], np.ndarray], advance: Any
    ) -> np.ndarray:
        """The effects of sets, given each one's lowest layer and a function from their numbers to their masks."""
        if not len(lowest):
            return np.zeros(0, np.float32)
        rows, order = self.rows, np.argsort(lowest, kind="stable")
        found = np.zeros(len(lowest), np.float32)
        for begin in range(0, len(lowest), rows):
            chosen = order[begin : begin + rows]
            masks = np.concatenate([sets(chosen), np.zeros((rows - len(chosen), self.n_nodes), bool)])
            each = [np.asarray(self._run(masks, sources, int(lowest[chosen[0]]))) for sources in self._sources]
            found[chosen] = np.mean(each, axis=0)[: len(chosen)] - self.base
            if advance is not None:
                advance(len(chosen))
        return found

    def _run(self, masks: np.ndarray, sources: tuple[Any, ...], first: int) -> Float[Array, "rows"]:
        return _patched(*self._arguments(masks, sources, first))

    def _arguments(self, masks: np.ndarray, sources: tuple[Any, ...], first: int) -> tuple[Any, ...]:
        run, shaped = self._pass, by_family(self.families, masks)
        given = (run.params, run.metric, self._tokens, sources, shaped, self._streams, np.int32(first))
        return (run.enter or run.forward, self.families, *given)

    @functools.cached_property
    def rows(self) -> int:
        """Rows of a batch: as many as fit the budget, and no more than share the nodes out evenly."""
        return rows_that_fit(self.n_nodes, self._needed, self.memory_budget)

    def _needed(self, rows: int) -> int:
        masks = np.zeros((rows, self.n_nodes), bool)
        arguments = self._arguments(masks, self._sources[0], 0)
        found: Any = _patched.lower(*arguments).compile().memory_analysis()
        given = sum(array.nbytes for array in (masks, *jax.tree.leaves((self._sources, self._streams))))
        return int(found.temp_size_in_bytes + found.output_size_in_bytes + given)

    def as_effects(self, flat: Float[np.ndarray, "n_nodes"]) -> Effects:
        """Effects of all nodes, with the names of this pair's tokens."""
        labels = self.pair.position_labels
        return Effects.from_flat(self.families, flat, labels, clean=self.clean, corrupted=self.corrupted)


def activation_patching(
    language_model: LanguageModel,
    pair: PromptPair,
    nodes: Nodes | Sequence[Nodes],
    *,
    metric: Metric | None = None,
    ablation: Ablation = "corrupted",
    direction: Direction = "noising",
    prompts: Int[np.ndarray, "n seq"] | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    advance: Callable[[int], Any] | None = None,
) -> Effects:
    """The exact effect of every node, patched by itself.

    Args:
        language_model: the model.
        pair: the prompts.
        nodes: which nodes.
        metric: what is measured; None is the pair's own (see `metric_of`).
        ablation: what is put in: the corrupted prompt's value, zero, the mean over `prompts`, or each of `prompts` in
            turn, averaged.
        direction: `noising` the clean run or `denoising` the corrupted one.
        prompts: tokens as long as the pair's, for `mean` and `resample`.
        memory_budget: bytes that a batch may take besides the model's parameters; it sets the rows of a batch.
        advance: called with the number of nodes as they are done.

    Returns:
        metric(patched) - metric(base), a node.

    Raises:
        ValueError: for nodes that do not exist, a metric that is the same on both prompts, a budget too small for one
            row, or arguments that do not fit together.
    """
    patching = Patching(
        language_model, pair, nodes, metric=metric, ablation=ablation, direction=direction, prompts=prompts,
        memory_budget=memory_budget,
    )  # fmt: skip
    return patching.as_effects(patching.of_nodes(np.arange(patching.n_nodes), advance))


def joint_patching(
    language_model: LanguageModel,
    pair: PromptPair,
    sets: Sequence[Collection[Node]],
    **options: Any,
) -> Float[np.ndarray, "n_sets"]:
    """The effect of sets of nodes, each set patched at once: any slices of any sites.

    Args:
        language_model: the model.
        pair: the prompts.
        sets: the sets; an empty one has no effect.
        **options: as of `activation_patching`.

    Returns:
        metric(patched) - metric(base) a set.

    Raises:
        ValueError: as `activation_patching`.
    """
    families, flat = families_of_sets(language_model, sets, pair.seq)
    return Patching(language_model, pair, families, **options).of_sets(flat)


def families_of_sets(
    language_model: LanguageModel, sets: Sequence[Collection[Node]], seq: int
) -> tuple[list[Nodes], Bool[np.ndarray, "n_sets n_nodes"]]:
    """The coarsest families whose nodes make up the sets, and the sets as masks in the order of `Effects.flat`.

    Args:
        language_model: the model.
        sets: the sets.
        seq: tokens of a prompt.

    Raises:
        ValueError: for a node that does not exist, or if there is none in any set.
    """
    for each in sets:
        if isinstance(each, Node) or not all(isinstance(node, Node) for node in each):
            raise ValueError(f"Expected sets of nodes, [[Node(...), ...], ...]; one of them is {each!r}.")
    masks = [as_mask(language_model, list(each), seq) for each in sets]
    nodes = _families_for(masks, sets)
    if not nodes:
        raise ValueError("There are no nodes in any of the sets.")
    families = resolve(language_model, nodes, seq)
    flat = np.zeros((len(sets), sum(family.n_nodes for family in families)), bool)
    for row, of_set in zip(flat, masks, strict=True):
        start = 0
        for family in families:
            part = row[start : start + family.n_nodes].reshape(len(family.layers), *family.by_shape)
            start += family.n_nodes
            held = tuple(place for place, axis in enumerate(family.axes) if axis not in family.by)
            for place, layer in enumerate(family.layers):
                if (layer, family.site) in of_set:
                    part[place] = of_set[layer, family.site].any(axis=held)
    return nodes, flat


def _families_for(masks: Sequence[Mapping[Any, np.ndarray]], sets: Sequence[Collection[Node]]) -> list[Nodes]:
    """The coarsest families whose nodes make up the masks."""
    layers: dict[str, dict[Any, None]] = {}
    for key, _ in (item for of_set in masks for item in of_set.items()):
        layers.setdefault(key[1], {})[key[0]] = None
    shapes = {key[1]: mask.shape for of_set in masks for key, mask in of_set.items()}
    fixed = {
        site: {axis for each in sets for node in each if node.site == site for axis in node.fixed} for site in layers
    }
    found = []
    for site, of_site in layers.items():
        by = tuple(axis for axis in axes_of(site, len(shapes[site])) if axis in fixed[site])
        numbered = None if None in of_site else tuple(sorted(of_site))
        found.append(Nodes(site, by=by, layers=numbered))
    return found

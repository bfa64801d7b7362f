"""Gradients of a scalar with respect to activations, in one backward pass.

Every wanted site is tapped (`tap.py`): an identity that sows the gradient that comes back through it, and a harvest
around the backward pass collects what was sown. So nothing is added to the forward pass, a gradient is as large as its
activation and no larger, and it comes out of whatever the site stands in, as a saved value does: through `jit`,
`checkpoint` and `vmap` as it is (the batch axis first), from a bare `scan` stacked over the iterations, from
`shard_map` stacked over the devices.

What is differentiated is a scalar zero that every tap takes beside its value. What no tap precedes does not depend
on it, and keeps nothing for the backward pass. A scan over layers depends on it from its first iteration, whichever
layer is tapped; so `layer_scan` runs the layers before the earliest one that is tapped as a scan of their own.

What bites:

* A function inside the model must not close over that zero: JAX's caches would keep it with the function. A tap asks
  for it by a sow, and it is planted (`harvest.plant`) from outside.
* The model may differentiate itself, forward and backward. A tap sows in the derivative with respect to its zero only,
  and is the identity in others.
* From a layer scan the gradients leave in a buffer of its own, which the backward pass carries. Another scan around the
  layer scan, or in its body around the site, would overwrite it, and a `shard_map` would put its axis in the place of
  the rows': both are errors.
* A `vmap` around a `shard_map` with a site in it is an error too: the devices would come before the batch.
* `vmap` of a `cond` on a predicate of each row's own runs both branches, so a site of one name may stand in one of them
  only.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from interp_jax.instrument import harvest, running_pass
from interp_jax.instrument.fetch import SiteValues
from interp_jax.instrument.sow import sow_value
from interp_jax.instrument.tap import tap

__all__ = ["GradientPass", "Place", "gradients", "the_zero"]

_Key = tuple[int | None, str]

_ZERO = "the zero that ij.gradients differentiates"


def gradients(
    fn: Callable[..., Any],
    sites: str | Collection[str] | None = None,
    layers: int | Collection[int | None] | None = None,
    *,
    objective: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[Any, SiteValues]]:
    """Makes of a function one that also returns the gradients of a scalar with respect to its activations.

    Args:
        fn: a forward pass, or any function that reaches `site`.
        sites: the names of the sites; None for all.
        layers: the layers of the sites; None for all.
        objective: gives the scalar, from what `fn` returns; None if `fn` returns the scalar.

    Returns:
        A function of `fn`'s arguments that gives `(out, {(layer, name): gradient})`, with `out` what `fn` returned and
        each gradient in the shape of its activation; zeros where the objective does not depend on it.

    Raises:
        SiteError: on the call, if a name or a layer does not occur, or a site's values are no floating-point numbers.
        ReapError: on the call, if a site occurs twice (a model called twice in `fn`, say).
        TypeError: on the call, if the objective is no floating-point scalar.
    """
    site_filter, layer_filter = running_pass.as_filter(sites, str), running_pass.as_filter(layers, int)

    def differentiating(*args: Any, **kwargs: Any) -> tuple[Any, SiteValues]:
        state = GradientPass(site_filter, layer_filter)
        with harvest.reaping(state.tag) as reaper:
            backward, out = tapped_vjp(state, fn, objective, args, kwargs)
            backward()
            reaped = reaper.take()
        running_pass.check_filters(state)
        return out, state.gradients(reaped)

    return differentiating


def tapped_vjp(
    state: "GradientPass", fn: Callable[..., Any], objective: Callable[[Any], Any] | None, args: Any, kwargs: Any
) -> tuple[Callable[[], Any], Any]:
    """Runs `fn` with its sites tapped.

    Args:
        state: the pass that taps.
        fn: as in `gradients`.
        objective: as in `gradients`.
        args: of `fn`.
        kwargs: of `fn`.

    Returns:
        What runs the backward pass, and what `fn` returned.
    """

    def run(zero: Any) -> tuple[Any, Any]:
        def tapped() -> Any:
            the_zero()  # planting what nobody asks for is an error
            # Made anew in this trace, as jax.grad's are: NNX variables remember the trace that they were made in.
            own_args, own_kwargs = jax.tree.map(lambda leaf: leaf, (args, kwargs))
            with running_pass.standing(state):
                return fn(*own_args, **own_kwargs)

        out = harvest.plant(tapped, tag=_ZERO)({_ZERO: zero})
        return _scalar(out if objective is None else objective(out)), out

    scalar, backward, out = jax.vjp(run, jnp.zeros(()), has_aux=True)
    return lambda: backward(jnp.ones_like(scalar)), out


def _scalar(value: Any) -> Any:
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            "the objective must be a floating-point scalar, but it has shape "
            f"{jnp.shape(value)} and dtype {jnp.result_type(value)}: give objective=, a function of what fn returns"
        )
    return value


def the_zero() -> Any:
    """What is differentiated, as a value of the current trace."""
    return sow_value(jnp.zeros(()), tag=_ZERO, name=_ZERO, mode="ask", scope=())


@dataclasses.dataclass(frozen=True)
class Place:
    """A site in layer scans; what the buffer of its gradients is called."""

    tag: object
    """One object for all of a scan, another for another."""
    name: str
    scans: int
    """How many layer scans stand around it."""

    def __str__(self) -> str:
        return f"site {self.name!r}"


class GradientPass(running_pass.PassState):
    """A pass in which no loop listens, but taps."""

    def __init__(self, sites: frozenset[str] | None, layers: frozenset[int | None] | None):
        super().__init__(sites, layers)
        self._taps: dict[_Key, list[tuple[Any, Hashable, int | None]]] = {}
        """For each site, what was tapped: its type, the name that the gradient is sown under, the row there."""

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        """Taps a site."""
        if self.scans:  # it will stand in a layer scan, in the branch of this very layer
            return self.visit_rows(value, {layer: 0}, _first(), Place(object(), name, 0), is_whole=True)
        key = (layer, name)
        avals = _avals(value, name, layer)
        self._taps.setdefault(key, []).append((avals, key, None))

        def collect(value: None, gradient: Any, row: Any) -> None:
            sow_value(gradient, tag=self.tag, name=key, mode="save")

        return tap(value, _first(), the_zero(), collect)

    def expect(self, layer: int, name: str) -> None:
        """Says, in the order of the pass, which sites of a layer scan will be tapped."""
        self._taps.setdefault((layer, name), [])

    def visit_rows(self, value: Any, rows: Mapping[int | None, int], row: Any, place: Place, *, is_whole: bool) -> Any:
        """Taps a site of a layer scan.

        Args:
            value: the site's value.
            rows: the rows of the layers that are tapped.
            row: the row of the layer that runs, traced; -1 if it is not tapped.
            place: where the site stands.
            is_whole: whether every layer that comes here is tapped.
        """
        place = dataclasses.replace(place, scans=place.scans + self.scans)
        for layer, number in rows.items():
            key = (layer, place.name)
            self._taps.setdefault(key, []).append((_avals(value, place.name, layer), place, number))

        def collect(value: None, gradient: Any, row: Any) -> None:
            def write(gradient: Any, row: Any) -> None:
                put(gradient, self.tag, place, row, len(rows))

            if is_whole:
                write(gradient, row)
            else:
                jax.lax.cond(row >= 0, write, lambda *_: None, gradient, row)

        return tap(value, row, the_zero(), collect)

    def gradients(self, reaped: Mapping[Hashable, Any]) -> SiteValues:
        """The gradients by site, in the order of the pass."""
        found = SiteValues()
        for key, taps in self._taps.items():
            # A function may have been traced more than once; what is not in the program sows nothing.
            live = [tap for tap in taps if tap[1] in reaped]
            if len(live) > 1 and live[0][2] is not None:
                raise harvest.ReapError(
                    f"{running_pass.in_words(*key)} occurs in two layer_scans: give each a first_layer of its own"
                )
            if not live:
                found[key] = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), taps[-1][0])
                continue
            (_, buffer, row), *_ = live
            found[key] = reaped[buffer] if row is None else _row(reaped[buffer], row)
        return found


def _first() -> Any:
    return jnp.zeros((), jnp.int32)


def put(value: Any, tag: object, place: Place, row: Any, rows: int) -> None:
    """Sows what belongs to a row of a place's buffer."""
    sow_value(value, tag=tag, name=place, mode="slot", index=row, slots=rows, scans=place.scans)


def _row(buffer: Any, row: int) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, row, keepdims=False), buffer)


def _avals(value: Any, name: str, layer: int | None) -> Any:
    def check(leaf: Any) -> jax.ShapeDtypeStruct:
        aval = jax.typeof(leaf)
        if not jnp.issubdtype(aval.dtype, jnp.inexact):
            raise running_pass.SiteError(
                f"{running_pass.in_words(layer, name)} has dtype {aval.dtype}, so there is no gradient with "
                "respect to it: name the sites that are wanted in sites="
            )
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return jax.tree.map(check, value)

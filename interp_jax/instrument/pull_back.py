"""A backward pass in which something is done at every site: the gradient's counterpart of the loop over a running pass.

`gradients` hands out gradients as large as their activations. `pull_back` calls a function at each site while the
gradient goes by, with the activation beside it: what it keeps is handed out, say a product of the two summed to a few
numbers, and what it returns goes on in the gradient's place. So no gradient outlives its layer, and paths can be cut.

The forward pass runs once, and the backward pass as often as asked: `back(given)` plants `given` into it, a pytree of
arrays that may differ from call to call, under `jax.lax.map` too.

```python
def visit(given, layer, name, value, gradient):
    return (value * gradient).sum(), gradient * given["gate"][layer]

out, back = pull_back(model, visit, "resid_post", range(4), objective=objective)(params, tokens)
kept = back({"gate": jnp.ones(4)})  # {(layer, "resid_post"): scalar}
```

In a layer scan the function is traced once for all layers, with a traced layer. What bites is what bites in
`gradients`; besides, `visit` may not close over arrays that are traced: give them by `given`.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from interp_jax.instrument import harvest, running_pass
from interp_jax.instrument.fetch import SiteValues
from interp_jax.instrument.gradients import GradientPass, Place, put, tapped_vjp, the_zero
from interp_jax.instrument.sow import sow_value
from interp_jax.instrument.tap import tap

__all__ = ["Visit", "pull_back"]

Visit = Callable[[Any, Any, str, Any, Any], tuple[Any, Any]]
"""`visit(given, layer, name, value, gradient) -> (kept, gradient)`; None for either keeps nothing, changes nothing."""

_GIVEN = "what ij.pull_back is given"


def pull_back(
    fn: Callable[..., Any],
    visit: Visit,
    sites: str | Collection[str] | None = None,
    layers: int | Collection[int | None] | None = None,
    *,
    objective: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[Any, Callable[[Any], SiteValues]]]:
    """Makes of a function one that gives what it returned and a backward pass that visits its sites.

    Args:
        fn: a forward pass, or any function that reaches `site`.
        visit: what is done at a site.
        sites: the names of the sites; None for all.
        layers: the layers of the sites; None for all.
        objective: gives the scalar that is differentiated, from what `fn` returns; None if `fn` returns the scalar.

    Returns:
        A function of `fn`'s arguments that gives `(out, back)`. `back(given)` runs the backward pass with `given`, and
        returns what was kept, by `(layer, name)`. Sites that the objective does not depend on are missing from that.

    Raises:
        SiteError: on the call, as `gradients` does.
        TypeError: on the call, if the objective is no floating-point scalar.
    """
    site_filter, layer_filter = running_pass.as_filter(sites, str), running_pass.as_filter(layers, int)

    def start(*args: Any, **kwargs: Any) -> tuple[Any, Callable[[Any], SiteValues]]:
        state = _VisitingPass(site_filter, layer_filter, visit)
        backward, out = tapped_vjp(state, fn, objective, args, kwargs)
        running_pass.check_filters(state)

        def back(given: Any) -> SiteValues:
            state.given = jax.tree.map(jax.typeof, given)

            def run() -> None:
                state.ask()  # planting what nobody asks for is an error
                backward()

            with harvest.reaping(state.tag) as reaper:
                harvest.plant(run, tag=_GIVEN)({_GIVEN: given})
                return state.kept(reaper.take())

        return out, back

    return start


class _VisitingPass(GradientPass):
    """A pass whose taps call a function."""

    def __init__(self, sites: Any, layers: Any, visit: Visit):
        super().__init__(sites, layers)
        self.given: Any = None
        """The types of what is given."""
        self._visit = visit
        self._buffers: dict[Hashable, dict[int, tuple[int | None, str]]] = {}
        """For each buffer of a layer scan, which site each row is of."""

    def ask(self) -> Any:
        """What was given, as a value of the current trace."""
        zeros = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), self.given)
        return sow_value(zeros, tag=_GIVEN, name=_GIVEN, mode="ask", scope=())

    def visit(self, value: Any, name: str, layer: int | None) -> Any:
        """Taps a site."""
        self.seen[layer, name] = None
        row = jnp.zeros((), jnp.int32)
        if self.scans:  # it will stand in a layer scan, in the branch of this very layer
            return self.visit_rows(value, {layer: 0}, row, Place(object(), name, 0), is_whole=True)

        def collect(value: Any, gradient: Any, row: Any) -> Any:
            kept, new = self._visit(self.ask(), layer, name, value, gradient)
            if kept is not None:
                sow_value(kept, tag=self.tag, name=(layer, name), mode="save")
            return new

        return tap(value, row, the_zero(), collect, keeps_value=True)

    def expect(self, layer: int, name: str) -> None:
        """Nothing is handed out for a site that was not visited."""

    def visit_rows(self, value: Any, rows: Mapping[int | None, int], row: Any, place: Place, *, is_whole: bool) -> Any:
        """Taps a site of a layer scan; the arguments are those of `GradientPass.visit_rows`."""
        place = dataclasses.replace(place, scans=place.scans + self.scans)
        self._buffers[place] = {number: (layer, place.name) for layer, number in rows.items()}
        layers = sorted(rows, key=rows.__getitem__)
        layer_of = (lambda row: layers[0]) if len(layers) == 1 else (lambda row: jnp.asarray(layers, jnp.int32)[row])

        def collect(value: Any, gradient: Any, row: Any) -> Any:
            def run(given: Any, value: Any, gradient: Any, row: Any) -> Any:
                kept, new = self._visit(given, layer_of(row), place.name, value, gradient)
                if kept is not None:
                    put(kept, self.tag, place, row, len(rows))
                return gradient if new is None else new

            if is_whole:
                return run(self.ask(), value, gradient, row)
            return jax.lax.cond(row >= 0, run, lambda *each: each[2], self.ask(), value, gradient, row)

        return tap(value, row, the_zero(), collect, keeps_value=True)

    def kept(self, reaped: Mapping[Hashable, Any]) -> SiteValues:
        """What the function kept, by site."""
        found = SiteValues()
        for name, value in reaped.items():
            if name in self._buffers:
                for row, key in self._buffers[name].items():
                    found[key] = jax.tree.map(lambda leaf, row=row: leaf[row], value)
            else:
                found[name] = value  # pyright: ignore[reportArgumentType]
        return found

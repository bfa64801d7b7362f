"""Which sites a function has, found without computing anything."""

import dataclasses
import html
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from interp_jax.instrument import running_pass

__all__ = ["SiteInfo", "SiteTable", "list_sites"]


class SiteInfo(NamedTuple):
    """What a site holds."""

    layer: int | None
    """The layer, None outside the layers."""
    name: str
    """The site's name."""
    shape: Any
    """The value's shape, or a tree of shapes."""
    dtype: Any
    """The value's dtype, or a tree of dtypes."""


@dataclasses.dataclass(frozen=True)
class SiteTable:
    """The sites of a function in the order of the pass; prints as a table."""

    rows: tuple[SiteInfo, ...]
    """A row for each time that a site is reached."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, index: int) -> SiteInfo:
        return self.rows[index]

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [
            ("-" if row.layer is None else str(row.layer), row.name, str(row.shape), str(row.dtype))
            for row in self.rows
        ]

    def __str__(self) -> str:
        cells = [("layer", "site", "shape", "dtype"), *self._cells()]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in cells
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._cells()
        )
        return f"<table><tr><th>layer</th><th>site</th><th>shape</th><th>dtype</th></tr>{body}</table>"


def list_sites(fn: Callable[..., Any]) -> Callable[..., SiteTable]:
    """Makes of a function one that lists its sites.

    Args:
        fn: a forward pass, or any function that reaches `site`.

    Returns:
        A function of `fn`'s arguments (arrays, or `jax.ShapeDtypeStruct` in their place) that gives a `SiteTable`. The
        pass is evaluated abstractly: no floating-point operation is run and no activation is allocated.
    """

    def listing(*args: Any, **kwargs: Any) -> SiteTable:
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for leaf in leaves]
        rows: list[SiteInfo] = []

        def visit(arrays: list[Any]) -> None:
            given = iter(arrays)
            filled = [next(given) if is_one else leaf for leaf, is_one in zip(leaves, is_array, strict=True)]
            args, kwargs = jax.tree.unflatten(tree, filled)
            for layer, name, value in running_pass.iterate(fn)(*args, **kwargs):
                rows.append(SiteInfo(layer, name, _of(value, "shape"), _of(value, "dtype")))
                del value

        jax.eval_shape(visit, [leaf for leaf, is_one in zip(leaves, is_array, strict=True) if is_one])
        return SiteTable(tuple(rows))

    return listing


def _of(value: Any, attribute: str) -> Any:
    return jax.tree.map(lambda leaf: getattr(jax.typeof(leaf), attribute), value)

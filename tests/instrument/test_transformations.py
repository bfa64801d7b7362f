"""Every transformation, with the loop around it and inside it, crossed with what a loop's body does.

The rows stand in `transformation_rows.py`. Each cell is right to the hand-written double, or is refused with a message
that the row states; and each leaves behind what it found: a clean call of the same function gives the same bits, and
JAX's current trace is the one before. The page docs/transformations.md prints the table;
`python tests/instrument/test_transformations.py` rewrites it.
"""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import traceback
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
from transformation_rows import GROUPS, Body

import interp_jax as ij
from interp_jax.instrument import trace_context

ROWS = [row for rows in GROUPS.values() for row in rows]
WHERES = ["around", "around, in jit", "inside"]
ACTS = ["read", "modify", "save", "break", "exception"]
X = np.linspace(-0.5, 1.5, 32, dtype=np.float32).reshape(8, 4)
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "transformations.md"
BEGIN, END = "<!-- the table, from tests/instrument/test_transformations.py -->\n", "<!-- end of the table -->\n"

rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


class Mine(Exception):
    """What a loop's body raises."""


class Visit(NamedTuple):
    layer: int | None
    name: str
    shape: tuple[int, ...]
    dtype: Any
    value: np.ndarray | None
    """Where it is concrete."""


SITES = ("resid_pre", "mlp_out", "resid_post")
went_on = []  # an entry for each time that the model ran on after its edit point


def block(x):
    x = ij.site(x, "resid_pre", layer=2)
    out = ij.site(jnp.tanh(x) * x.mean(), "mlp_out", layer=2)
    went_on.append(out.shape)
    return ij.site(x * 0.5 + out, "resid_post", layer=2)


def edited(value):
    return value * 0.5 + 0.25


def kept(value):
    return value * 2.0


def block_by_hand(x, act, visits):
    """The block, and what a loop that does `act` makes of it: `(y, what was saved)`."""
    out = jnp.tanh(x) * x.mean()
    saved = {"mlp_out": kept(out)} if "save" in act else {}
    changed = edited(out) if "modify" in act else out
    y = x * 0.5 + changed
    visits += [visit(2, name, value) for name, value in zip(SITES, (x, out, y), strict=True)]
    return (-x, {}) if act == "break" else (y, saved)


def visit(layer, name, value):
    concrete = None if isinstance(value, jax.core.Tracer) else np.array(value)
    return Visit(layer, name, value.shape, value.dtype, concrete)


def loop(fn, act, visits, numbered=False):
    """A function that loops over `fn` and gives its result and what was saved."""

    def run(x):
        for layer, name, value in (running := ij.iterate(fn)(x)):
            visits.append(visit(layer, name, value))
            if name == "mlp_out":
                if "save" in act:
                    running.save(f"mlp_out/{len(visits)}" if numbered else "mlp_out", kept(value))
                if "modify" in act:
                    running.modified_value = edited(value)
                if act == "break":
                    break
                if act == "exception":
                    raise Mine
            del value
        if act == "break":
            with pytest.raises(RuntimeError, match="left before the end"):
                _ = running.retval
            return -x, {}
        return running.retval, running.saved

    return run


def crossed(row, where, act, visits):
    """The row's transformation of the block with a loop around it, or of a loop over the block: `x -> (out, saved)`."""
    if where == "inside":
        return row.transform(Body(loop(block, act, visits), nothing_of(act)))
    looped = loop(clean_program(row), act, visits, row.numbered)  # one program for all acts: a stale cache shows

    def run(x):
        out, saved = looped(x)
        return (out if act == "break" else out[0]), saved  # the row gives what is carried out too, which is nothing

    return jax.jit(run) if where == "around, in jit" else run


def nothing_of(act):
    return lambda x: {"mlp_out": jnp.zeros_like(x)} if "save" in act else {}


@functools.cache
def clean_program(row):
    """The row's transformation of the block, which nothing loops over."""
    return row.transform(Body(lambda x: (block(x), {})))


@functools.cache
def clean_bits(row):
    """What it gave before any pass."""
    return [np.array(leaf) for leaf in jax.tree.leaves(clean_program(row)(jnp.asarray(X)))]


@functools.cache
def by_hand(row, act):
    visits = []

    def nothing(x):
        block_by_hand(x, act, visits)  # for the shapes
        return nothing_of(act)(x)

    out, saved = row.by_hand(Body(lambda x: block_by_hand(x, act, visits), nothing))(jnp.asarray(X))
    return out, saved, visits


@contextlib.contextmanager
def nothing_stays_behind(row):
    bits, trace = clean_bits(row), trace_context.current_trace()
    went_on.clear()
    yield
    assert trace_context.current_trace() is trace
    for before, after in zip(bits, jax.tree.leaves(clean_program(row)(jnp.asarray(X))), strict=True):
        np.testing.assert_array_equal(before, after)


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert [np.shape(leaf) for leaf in actual] == [np.shape(leaf) for leaf in expected]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def assert_visits(visits, expected, times):
    """The sites in their order, `times` over, with the double's shapes and, where they are concrete, its values."""
    assert [(one.layer, one.name) for one in visits] == [(2, name) for name in SITES] * times
    shapes = {one.name: (one.shape, one.dtype) for one in expected}
    assert {one.name: (one.shape, one.dtype) for one in visits} == shapes
    for one, other in zip(visits, expected, strict=False):
        if one.value is not None and other.value is not None:
            np.testing.assert_allclose(one.value, other.value, rtol=1e-5, atol=1e-6)


class Pass(NamedTuple):
    out: Any
    saved: Any
    visits: list[Visit]
    went_on: list[Any]


@functools.cache
def made(row, where, act):
    """One pass, which several cells look at; whatever it does, nothing stays behind."""
    visits, out, saved = [], None, None
    run = crossed(row, where, act, visits)
    with nothing_stays_behind(row):
        if act == "exception":
            with pytest.raises(Mine):
                run(jnp.asarray(X))
        else:
            out, saved = run(jnp.asarray(X))
        return Pass(out, saved, visits, list(went_on))


def is_refused(row, where, act):
    return where != "inside" and act in row.refused and row.refused_here


def act_of(row, where, act):
    """What the loop does in the pass that a cell looks at: one modifies and saves, and shows what it read too."""
    if act in ("break", "exception"):
        return act
    return "modify" if is_refused(row, where, "save") else "modify and save"


@rows
def test_nothing_leaks(row):
    """Traced under JAX's leak checker, which bypasses the caches; first, while little is alive for it to search."""
    if row.values_only:
        pytest.skip("takes values")
    act = "modify" if row.holds_effects else act_of(row, "around", "save")
    jax.eval_shape(crossed(row, "around", act, []), X)


@pytest.mark.caches
@rows
@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=[pytest.mark.slow] * (where == "around, in jit")) for where in WHERES]
)
@pytest.mark.parametrize("act", ACTS)
def test_a_cell(row, where, act):
    if row.values_only and where == "around, in jit":
        pytest.skip("takes values")
    if is_refused(row, where, act):
        with pytest.raises(ValueError, match=row.refused[act]):
            made(row, where, act)
        return
    act_made = act_of(row, where, act)
    done = made(row, where, act_made)
    if act in ("break", "exception"):
        assert done.went_on == []
        assert {one.name for one in done.visits} == {"resid_pre", "mlp_out"}
    if act == "exception":
        return
    out, saved, visits = (-X, {}, None) if (act, where[:6]) == ("break", "around") else by_hand(row, act_made)
    if act == "read":
        assert_visits(done.visits, visits, row.visits if where != "inside" else len(done.visits) // len(SITES))
    if act == "save":
        assert_close(done.saved, saved)
    else:
        assert_close(done.out, out)


# The same, under a transformation of the whole


def double(row, act):
    return row.by_hand(Body(lambda x: block_by_hand(x, act, []), nothing_of(act)))


@pytest.mark.slow
@pytest.mark.caches
@rows
def test_the_whole_is_differentiated(row):
    """An objective of what came back from a loop around the row and of what it saved."""
    if row.derivative in ("rule", "none"):
        pytest.skip("has a derivative of its own, which the rows named `grad of` cross, or none")
    act, x = act_of(row, "around", "save"), jnp.asarray(X)

    def objective(run):
        return lambda x: sum((leaf**2).sum() for leaf in jax.tree.leaves(run(x)))

    def derivative(run):
        if row.derivative == "grad":
            return jax.grad(objective(run))(x)
        return jax.jvp(objective(run), (x,), (jnp.cos(x),))

    actual, expected = derivative(crossed(row, "around", act, [])), derivative(double(row, act))
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.caches
@rows
def test_the_whole_is_mapped(row):
    """A loop around the row, mapped over a batch of inputs."""
    if row.values_only:
        pytest.skip("takes values")
    act = act_of(row, "around", "save")
    batch = jnp.stack([X, X[::-1] * 0.5, -X])
    actual = jax.vmap(crossed(row, "around", act, []))(batch)
    for index, x in enumerate(batch):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], actual)
        assert_close(one, double(row, act)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_rows_of_shard_map_hold_on_eight_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "test_a_cell and shard_map", __file__]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# Errors


def overflowing(x):
    """XLA cannot allocate this."""
    x = ij.site(x, "before")
    return jnp.broadcast_to(x.mean(), (2**50,))


def calling_back(x):
    """XLA runs a function of the user's, which raises."""
    x = ij.site(x, "before")

    def host(value):
        raise ValueError("raised on the host")

    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def mistaken(x):
    x = ij.site(x, "before")
    return x.reshape(5, 7)


UNDER = {
    "nothing": lambda function: function,
    "jit": jax.jit,
    "grad of checkpoint": lambda function: jax.grad(lambda x: jax.checkpoint(function)(x).sum()),
    "scan": lambda function: lambda x: jax.lax.scan(lambda carry, _: (carry, function(carry)), x, length=2)[1],
}


def frames(error):
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def looks(function, x):
    for _, _, value in (running := ij.iterate(function)(x)):
        running.modified_value = value + 1.0
        del value
    return jax.block_until_ready(running.retval)


def loops_wrongly(function, x):
    for _, _, value in (running := ij.iterate(function)(x)):
        mishap(running, value)


def mishap(running, value):
    raise Mine


@pytest.mark.caches
@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER.keys())
def test_an_error_in_the_model_shows_the_users_frames(under):
    with pytest.raises(TypeError, match="reshape") as error:
        looks(under(mistaken), jnp.asarray(X))
    assert {"looks", "mistaken"} <= set(frames(error.value))


@pytest.mark.caches
@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER.keys())
def test_an_error_in_the_loops_body_shows_the_users_frames(under):
    with pytest.raises(Mine) as error:
        loops_wrongly(under(lambda x: ij.site(x, "before")), jnp.asarray(X))
    assert frames(error.value)[-2:] == ["loops_wrongly", "mishap"]


@pytest.mark.caches
@pytest.mark.parametrize("under", ["nothing", "jit", "scan"])
@pytest.mark.parametrize(
    ("model", "message"), [(overflowing, "allocat"), (calling_back, "raised on the host")], ids=["memory", "callback"]
)
def test_an_error_of_xla_shows_the_users_frames(model, message, under):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message) as error:
        looks(UNDER[under](model), jnp.asarray(X))
    assert "looks" in frames(error.value)


# The page


def table() -> str:
    """The rows as the page prints them. A cell says `yes` where all its tests hold: the loop around and inside."""
    lines = []
    for title, group in GROUPS.items():
        lines += [f"## {title}", "", f"| | {' | '.join(ACTS)} | what `save` gives |", "|---" * (len(ACTS) + 2) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in group]
        lines.append("")
    return "\n".join(lines)


def _cells(row):
    return [f"`{row.name}`", *[row.refused_as if act in row.refused else "yes" for act in ACTS], row.saved]


def page_with_table(page: str) -> str:
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def test_the_page_prints_this_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), f"run `python {pathlib.Path(__file__).relative_to(PAGE.parents[1])}`"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

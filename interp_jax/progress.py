"""Progress on anything that takes longer than two seconds: a bar with tokens a second and the time left.

On a terminal it is a live bar. Elsewhere (a log, CI) a line is written at the start and at the end of each stage, so
that a log stays readable.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

__all__ = ["advancing", "note", "working"]

_console = rich.console.Console(stderr=True)


class _Rate(rich.progress.ProgressColumn):
    """How many units a second."""

    def render(self, task: rich.progress.Task) -> str:
        unit = task.fields["unit"]
        return f"{task.speed:,.0f} {unit}/s" if task.speed else f"- {unit}/s"


def note(text: str) -> None:
    """Says something beside the progress.

    Args:
        text: a sentence.
    """
    _console.print(text, soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """Shows that something is being done whose end is not known: a compilation, say.

    Args:
        description: what is being done.

    Yields:
        Nothing.
    """
    if _console.is_terminal:
        with _console.status(description):
            yield
        return
    start = time.monotonic()
    yield
    _console.print(f"{description}: {time.monotonic() - start:.0f} s", soft_wrap=True)


@contextlib.contextmanager
def advancing(description: str, total: int, *, unit: str = "tokens", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows the progress of the block.

    Args:
        description: what is being done.
        total: how many units there are.
        unit: what is counted.
        done: how many were done before, by a run that is now resumed.

    Yields:
        `advance(units)`, to be called as the work goes on.
    """
    if not _console.is_terminal:
        start, count = time.monotonic(), 0

        def count_up(units: int) -> None:
            nonlocal count
            count += units

        _console.print(f"{description}: {total - done:,} {unit}", soft_wrap=True)
        yield count_up
        seconds = time.monotonic() - start
        rate = f"{count / max(seconds, 1e-9):,.0f} {unit}/s"
        _console.print(f"{description}: {count:,} {unit} in {seconds:.0f} s, {rate}", soft_wrap=True)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=_console) as progress:
        task = progress.add_task(description, total=total, completed=done, unit=unit)
        yield lambda units: progress.advance(task, units)

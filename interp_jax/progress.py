"""Progress on anything that takes longer than two seconds: a bar with tokens a second and the time left.

On a terminal it is a live bar. Elsewhere (a log, CI) a line is written at the start of each stage, every half minute
and at the end, so that a log stays readable.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
import rich.table
import rich.text

__all__ = ["Advance", "advancing", "note", "silence", "working"]

_INTERVAL = 30.0
"""Seconds from one line to the next, off a terminal."""

_console = rich.console.Console(stderr=True)


class _Rate(rich.progress.ProgressColumn):
    """How many units a second."""

    def render(self, task: rich.progress.Task) -> str:
        unit = task.fields["unit"]
        return f"{_count(task.speed)} {unit}/s" if task.speed else f"- {unit}/s"


class _Text(rich.progress.ProgressColumn):
    """What else is known; where the terminal is narrow, the beginning of it."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


def silence() -> None:
    """Shows nothing from now on: one of several processes that do the same tells enough."""
    _console.quiet = True


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
    note(f"{description}: {time.monotonic() - start:.0f} s")


class Advance:
    """What a stage tells of its progress."""

    def __init__(self, total: int, done: int, show: Callable[["Advance"], None]):
        """A stage that begins now.

        Args:
            total: how many units there are.
            done: how many were done before.
            show: called whenever something changes.
        """
        self.total, self.done, self.text = total, done, ""
        self._show = show
        self.start_at(done)

    def __call__(self, units: int, text: str | None = None) -> None:
        """Tells that work was done.

        Args:
            units: how much.
            text: what else is known now, shown beside the progress until there is other text.
        """
        self.done += units
        self.text = self.text if text is None else text
        self._show(self)

    def start_at(self, done: int) -> None:
        """Tells how many units an earlier run has done, which must not count in the speed.

        Args:
            done: how many.
        """
        self.done = self._done_before = done
        self._start = time.monotonic()

    @property
    def new(self) -> int:
        """Units that were done since the start."""
        return self.done - self._done_before

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.new / max(self.seconds, 1e-9)


@contextlib.contextmanager
def advancing(description: str, total: int, *, unit: str = "tokens", done: int = 0) -> Iterator[Advance]:
    """Shows the progress of the block.

    Args:
        description: what is being done.
        total: how many units there are.
        unit: what is counted.
        done: how many were done before, by a run that is now resumed.

    Yields:
        `advance(units, text)`, to be called as the work goes on.
    """
    if not _console.is_terminal:
        next_line = time.monotonic() + _INTERVAL

        def show_line(advance: Advance) -> None:
            nonlocal next_line
            if time.monotonic() < next_line:
                return
            next_line = time.monotonic() + _INTERVAL
            left = _clock((advance.total - advance.done) / advance.rate) if advance.new else "-"
            text = f", {advance.text}" if advance.text else ""
            rate = f"{_count(advance.rate)} {unit}/s"
            note(f"{description}: {advance.done:,} of {advance.total:,} {unit}, {rate}, {left} left{text}")

        note(f"{description}: {total - done:,} {unit}")
        advance = Advance(total, done, show_line)
        yield advance
        note(f"{description}: {advance.new:,} {unit} in {advance.seconds:.0f} s, {_count(advance.rate)} {unit}/s")
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        _Rate(table_column=rich.table.Column(no_wrap=True)),
        rich.progress.TimeRemainingColumn(table_column=rich.table.Column(no_wrap=True)),
        _Text(),
    )
    with rich.progress.Progress(*columns, console=_console) as progress:
        task = progress.add_task(description, total=total, completed=done, unit=unit, text="")
        shown_before = done

        def show_bar(advance: Advance) -> None:
            nonlocal shown_before
            if advance.done - advance.new != shown_before:  # begins elsewhere: speed is measured from there
                shown_before = advance.done - advance.new
                progress.reset(task, completed=shown_before)
            progress.update(task, completed=advance.done, text=advance.text)

        yield Advance(total, done, show_bar)


def _count(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

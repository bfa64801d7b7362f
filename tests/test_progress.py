"""Progress: a bar on a terminal, lines at intervals elsewhere, and no speed from work that was done before."""

import io

import pytest
import rich.console

from interp_jax import progress


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def console(monkeypatch, **options):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "_console", rich.console.Console(file=shown, width=200, **options))
    return shown


def test_off_a_terminal_there_is_a_line_every_half_minute(monkeypatch, clock):
    shown = console(monkeypatch)
    with progress.advancing("Training", 1000, unit="steps") as advance:
        advance.start_at(400)
        for _ in range(7):
            clock.now += 10
            advance(10, f"loss {clock.now:.0f}")
    assert shown.getvalue().splitlines() == [
        "Training: 1,000 steps",
        "Training: 430 of 1,000 steps, 1.0 steps/s, 0:09:30 left, loss 130",
        "Training: 460 of 1,000 steps, 1.0 steps/s, 0:09:00 left, loss 160",
        "Training: 70 steps in 70 s, 1.0 steps/s",
    ]


def test_on_a_terminal_the_text_stands_beside_the_bar(monkeypatch):
    shown = console(monkeypatch, force_terminal=True)
    with progress.advancing("Training", 10, unit="steps") as advance:
        advance.start_at(4)
        advance(1, "loss 0.25")
        advance(5)
    last = shown.getvalue().splitlines()[-2:]
    assert any("100%" in line and "loss 0.25" in line for line in last), last


def test_a_silenced_process_shows_nothing(monkeypatch):
    shown = console(monkeypatch)
    progress.silence()
    with progress.working("Loading"), progress.advancing("Training", 10):
        progress.note("a note")
    assert shown.getvalue() == ""

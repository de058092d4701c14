"""What a verb tells its user on standard error: sentences, and how far it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

if TYPE_CHECKING:
    from latentguard.guard.evaluation import Comparison
    from latentguard.states import Progress

T = TypeVar("T")

PERIOD = 30.0
"""Seconds between two progress lines where there is no terminal."""

REMEMBERED = 5
"""Progress lines over which the speed is measured."""


def echo_err(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


def count_each(items: Iterable[T], advance: Progress) -> Iterator[T]:
    """The same items; each is reported as it passes."""
    for item in items:
        advance(1)
        yield item


def echo_changes(changes: Sequence[Comparison], note: str) -> None:
    """Print what a change of a guard changes, and warn where it is surely worse."""
    from latentguard.guard.evaluation import comparison_table

    typer.echo(f"\n{comparison_table(changes, note).markdown()}")
    for change in changes:
        if change.is_worse:
            prompts = "" if change.name == "all" else f" ({change.name})"
            echo_err(f"Warning: worse than before{prompts}: {change}.")


class ProgressView(Protocol):
    """Shows how far a verb is."""

    def advance(self, count: int) -> None:
        """So many more prompts are done."""

    def step(self, name: str, total: int | None) -> Progress:
        """Begin a step of so many prompts; returns what is called as they are done."""


@contextmanager
def progress(name: str, total: int | None = None) -> Iterator[ProgressView]:
    """Show progress on standard error: a bar on a terminal, else a line each half minute.

    Args:
        name: Of the first step.
        total: How many prompts it has; None if that is unknown.
    """
    from rich.console import Console

    stderr = Console(stderr=True)  # verdicts may go to standard output
    with _bar(stderr, name, total) if stderr.is_terminal else _lines(name, total) as view:
        yield view


class _Bar:
    """A Rich progress bar."""

    def __init__(self, bar: Any, name: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(name, total=total)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def step(self, name: str, total: int | None) -> Progress:
        self._bar.reset(self._task, description=name, total=total)
        return self.advance


@contextmanager
def _bar(console: Any, name: str, total: int | None) -> Iterator[_Bar]:
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description:<28}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console, redirect_stdout=False) as bar:
        yield _Bar(bar, name, total)


class ProgressLines:
    """How far a step is, as a line of text with the time left."""

    def __init__(
        self, name: str, total: int | None, clock: Callable[[], float] = monotonic
    ) -> None:
        """Begin the first step."""
        self._clock = clock
        self.step(name, total)

    def advance(self, count: int) -> None:
        """So many more prompts are done."""
        self._done += count

    def step(self, name: str, total: int | None) -> Progress:
        """Begin a step of so many prompts; returns what is called as they are done."""
        self._name = name
        self._total = total
        self._done = 0
        self._samples = deque([(self._clock(), 0)], maxlen=REMEMBERED)
        return self.advance

    def line(self) -> str:
        """Name, count, share and time left, at the speed of the last lines."""
        now = self._clock()
        then, before = self._samples[0]
        self._samples.append((now, self._done))
        if not self._total:
            return f"{self._name}: {self._done:,} done"
        share = f"{self._name}: {self._done:,} of {self._total:,} ({self._done / self._total:.0%})"
        if self._done <= before or self._done >= self._total:
            return share
        seconds = (self._total - self._done) * (now - then) / (self._done - before)
        return f"{share}, about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time span in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def _lines(name: str, total: int | None) -> Iterator[ProgressLines]:
    """Write a line each half minute, from a thread of its own: a single batch may take longer."""
    lines, stop = ProgressLines(name, total), Event()

    def write() -> None:
        while not stop.wait(PERIOD):
            echo_err(lines.line())

    writer = Thread(target=write, name="latentguard-progress", daemon=True)
    writer.start()
    try:
        yield lines
    finally:
        stop.set()
        writer.join()

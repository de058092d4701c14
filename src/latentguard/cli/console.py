"""What a verb tells its user on standard error: sentences, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from latentguard.states import Progress


def echo_err(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


class ProgressBar:
    """A progress bar on standard error."""

    def __init__(self, bar: object, task: object) -> None:
        """Wrap a task of a Rich bar."""
        self._bar = bar
        self._task = task

    def advance(self, count: int) -> None:
        """So many more prompts are done."""
        self._bar.advance(self._task, count)  # type: ignore[attr-defined]

    def step(self, name: str, total: int) -> Progress:
        """A new step of so many prompts."""
        self._bar.reset(self._task, description=name, total=total)  # type: ignore[attr-defined]
        return self.advance


@contextmanager
def progress(name: str, total: int | None = None) -> Iterator[ProgressBar]:
    """A progress bar on standard error, with time left."""
    from rich import progress as rich
    from rich.console import Console

    name_column = rich.TextColumn("{task.description:<28}")
    shown = (name_column, rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    stderr = Console(stderr=True)  # verdicts may go to standard output
    with rich.Progress(*shown, *times, console=stderr, redirect_stdout=False) as bar:
        yield ProgressBar(bar, bar.add_task(name, total=total))

"""What verbs do at the edge: load models and prompts, tell the user how far they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from latentguard.data.builtin import load_contrast
from latentguard.errors import PromptError
from latentguard.prompts import Columns, Prompt, read_prompts, side

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.models.chat_model import ChatModel
    from latentguard.states import Progress


def load(source: str, dtype: str = "auto", device_map: str | None = None) -> ChatModel:
    """Load a model, quietly."""
    from transformers.utils import logging as transformers_logging

    from latentguard.models.chat_model import ChatModel

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    note(f"Loading {source} ...")
    placing = {"device_map": device_map} if device_map else {}
    return ChatModel.load(source, dtype=dtype, **placing)


def load_guard(
    folder: Path,
    model: str | None,
    *,
    allow_mismatch: bool = False,
    device_map: str | None = None,
) -> tuple[LatentGuard, ChatModel]:
    """A guard and the model that it is bound to, checked; or bound to the one that it met."""
    from latentguard.guard.compatibility import Shift
    from latentguard.guard.latent_guard import LatentGuard

    guard = LatentGuard.load(folder)
    backend = load(model or guard.fingerprint.model, guard.fingerprint.dtype, device_map)
    if not allow_mismatch:
        guard.check(backend)
        return guard, backend
    met = guard.admit(backend)
    if met is not guard:
        note(f"Warning: {Shift.between(guard, met)}")
    return met, backend


def keep(guard: LatentGuard, folder: Path, *, report: bool = False) -> None:
    """Save a guard, and the page of its calibration if it is asked for, or one is there."""
    from latentguard.guard.calibration_report import calibration_report
    from latentguard.guard.thresholds import Calibration
    from latentguard.report.document import clear

    guard.save(folder)
    page = folder / "calibration"
    there = (page / "report.json").exists()
    if there and guard.part(Calibration) is None:
        clear(page)  # it is of the guard that was there before
    elif report or there:
        note(f"Report: {calibration_report(guard).save(page)}/report.html")


def columns_of(guard: LatentGuard, text: str) -> Columns:
    """The columns for a guard: a segment is read if the guard was calibrated by segments."""
    from latentguard.guard.thresholds import Calibration

    calibration = guard.part(Calibration)
    return Columns(text=text, segment=(calibration and calibration.column) or "")


def read(source: str, columns: Columns, harmful: bool | None) -> list[Prompt]:
    """The prompts of a source, or the whole contrast set."""
    if source == "contrast":
        return load_contrast()
    return read_prompts(source, columns=columns, harmful=harmful)


def read_side(sources: Sequence[str] | None, columns: Columns, *, harmful: bool) -> list[Prompt]:
    """The prompts of some sources that are of one side."""
    prompts: list[Prompt] = []
    if twice := [source for source, count in Counter(sources or ()).items() if count > 1]:
        raise PromptError(f"{twice[0]} is given twice; its prompts would count twice.")
    for source in sources or ():
        kept = side(read(source, columns, None), harmful=harmful)
        if not kept:
            wanted = "harmful" if harmful else "harmless"
            raise PromptError(f"{source} was given for {wanted} prompts and holds none.")
        prompts += kept
    return prompts


def note(text: str) -> None:
    """Tell the user, on standard error."""
    typer.echo(text, err=True)


class Bar:
    """A progress bar on standard error."""

    def __init__(self, bar: object, task: object) -> None:
        """Wrap a task of a Rich bar."""
        self._bar, self._task = bar, task

    def advance(self, count: int) -> None:
        """So many more prompts are done."""
        self._bar.advance(self._task, count)  # type: ignore[attr-defined]

    def step(self, name: str, total: int) -> Progress:
        """A new step of so many prompts."""
        self._bar.reset(self._task, description=name, total=total)  # type: ignore[attr-defined]
        return self.advance


@contextmanager
def progress(name: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar on standard error, with time left."""
    from rich import progress as rich
    from rich.console import Console

    name_column = rich.TextColumn("{task.description:<28}")
    shown = (name_column, rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    stderr = Console(stderr=True)  # verdicts may go to standard output
    with rich.Progress(*shown, *times, console=stderr, redirect_stdout=False) as bar:
        yield Bar(bar, bar.add_task(name, total=total))

"""Prompts and columns that a verb is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard.cli.console import echo_err
from latentguard.data.builtin import load_contrast
from latentguard.data.prompt_files import (
    Columns,
    read_prompts,
    select_side,
    stream_prompts,
    stream_replies,
)
from latentguard.errors import PromptError
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard

CONTRAST = "contrast"
"""The name of the built-in contrast set, where a verb takes a file."""


def guard_columns(guard: LatentGuard, text: str) -> Columns:
    """The columns that a guard reads: the segment too, if it was calibrated by segments."""
    column = guard.thresholds.column if guard.thresholds else None
    return Columns(text=text, segment=column or "")


def read_source(source: str, columns: Columns, harmful: bool | None) -> list[Prompt]:
    """The prompts of a file, of a Hub data set or of the built-in contrast set."""
    if source == CONTRAST:
        return load_contrast()
    return read_prompts(source, columns=columns, harmful=harmful)


def read_side(sources: Sequence[str] | None, columns: Columns, *, harmful: bool) -> list[Prompt]:
    """The harmful or the harmless prompts of some sources.

    Rows that are labelled otherwise are left out, and counted on standard error.

    Raises:
        PromptError: if a source is given twice, or holds no prompt of that side.
    """
    require_distinct(sources or ())
    side, other_side = ("harmful", "harmless") if harmful else ("harmless", "harmful")
    prompts: list[Prompt] = []
    for source in sources or ():
        rows = read_source(source, columns, None)
        selected = select_side(rows, harmful=harmful)
        if not selected:
            raise PromptError(
                f"{source} was given for {side} prompts and holds none: each of its {len(rows)} "
                f"rows is labelled {other_side}."
            )
        if left_out := len(rows) - len(selected):
            echo_err(
                f"{source}: {left_out} of {len(rows)} rows are labelled {other_side}: left out."
            )
        prompts += selected
    return prompts


def check_prompts(source: str, columns: Columns) -> int | None:
    """Check every row of a file before the model loads.

    Returns:
        How many prompts it holds; None for what can be read only once, such as standard input.

    Raises:
        PromptError: if a row cannot be used, or there is none.
    """
    return _check_rows(source, partial(stream_prompts, source, columns=columns), "prompts")


def check_replies(source: str) -> int | None:
    """As ``check_prompts``, for rows that hold replies."""
    return _check_rows(source, partial(stream_replies, source), "replies")


def _check_rows(source: str, stream: Callable[[], Iterator[object]], what: str) -> int | None:
    if Path(source).is_file():
        count = sum(1 for _ in stream())
        if not count:
            raise PromptError(f"{source} holds no {what}; expected at least one row with a text.")
        return count
    if source != "-" and not Path(source).exists():  # a Hub data set, or a name mistyped
        next(stream(), None)
    return None


def require_distinct(sources: Sequence[str]) -> None:
    """Raise a PromptError if a source is given twice."""
    if repeated := [source for source, count in Counter(sources).items() if count > 1]:
        raise PromptError(f"{repeated[0]} is given twice; its prompts would count twice.")

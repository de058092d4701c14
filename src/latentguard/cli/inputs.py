"""Prompts and columns that a verb is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentguard.data.builtin import load_contrast
from latentguard.errors import PromptError
from latentguard.prompts import Columns, Prompt, read_prompts, select_side

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard

CONTRAST = "contrast"
"""The name of the built-in contrast set, where a verb takes a file."""


def guard_columns(guard: LatentGuard, text: str) -> Columns:
    """The columns that a guard reads: the segment too, if it was calibrated by segments."""
    from latentguard.guard.thresholds import Calibration

    calibration = guard.part(Calibration)
    return Columns(text=text, segment=(calibration and calibration.column) or "")


def read_source(source: str, columns: Columns, harmful: bool | None) -> list[Prompt]:
    """The prompts of a file, of a Hub data set or of the built-in contrast set."""
    if source == CONTRAST:
        return load_contrast()
    return read_prompts(source, columns=columns, harmful=harmful)


def read_side(sources: Sequence[str] | None, columns: Columns, *, harmful: bool) -> list[Prompt]:
    """The harmful or the harmless prompts of some sources.

    Raises:
        PromptError: if a source is given twice, or holds no prompt of that side.
    """
    require_distinct(sources or ())
    prompts: list[Prompt] = []
    for source in sources or ():
        kept = select_side(read_source(source, columns, None), harmful=harmful)
        if not kept:
            wanted = "harmful" if harmful else "harmless"
            raise PromptError(f"{source} was given for {wanted} prompts and holds none.")
        prompts += kept
    return prompts


def require_distinct(sources: Sequence[str]) -> None:
    """Raise a PromptError if a source is given twice."""
    if repeated := [source for source, count in Counter(sources).items() if count > 1]:
        raise PromptError(f"{repeated[0]} is given twice; its prompts would count twice.")

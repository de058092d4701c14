"""Finding: what one experiment shows (a section of the report) and the effects that claims need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from latentguard.report.document import Cell, Section
from latentguard.stats.estimate import Estimate

CELLS = ("value", "low", "high", "n")
"""Column heads of ``cells``."""


@dataclass(frozen=True)
class Finding:
    """What one experiment shows."""

    section: Section
    """Head line, text, tables, figures."""

    effects: Mapping[str, Estimate] = field(default_factory=dict)
    """Measured effects by name, such as ``flip to No``, for the claims."""

    caveats: tuple[str, ...] = ()
    """What cannot be concluded, and why; one sentence each."""


def too_few(what: str, count: int, noun: str, enough: int) -> list[str]:
    """The caveat of an experiment on fewer prompts than are enough; nothing if there are enough."""
    return [f"{what}: {count} {noun} are too few to conclude from."] if count < enough else []


def cells(estimate: Estimate) -> tuple[Cell, ...]:
    """Value, ends of the 95 % interval, n; the mean of a single value has no interval."""
    count = sum(estimate.n)
    if count == 1 and estimate.low == estimate.high:
        return (estimate.value, None, None, count)
    return (estimate.value, estimate.low, estimate.high, count)

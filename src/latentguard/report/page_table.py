"""Tables as people read them: an interval in one column, verdicts in colour, long texts folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

Cell = str | float | int | bool | None

TONES = {
    "replicated": "good",
    "replicated, but form explains it": "mixed",
    "not replicated": "bad",
    "cannot tell": "open",
    "not run": "none",
}
"""Verdict -> class of its cell in the page."""

FOLDED = 120
"""Characters of a cell beyond which the page shows its beginning and opens the rest on a click."""


@dataclass(frozen=True)
class PageCell:
    """A cell as the page shows it."""

    text: str
    """All of it."""

    is_number: bool = False
    """Whether it stands right and is never wrapped."""

    tone: str = ""
    """Class of a verdict; empty if it is none."""

    @property
    def summary(self) -> str:
        """The beginning of a long text; empty if it is shown whole."""
        return f"{self.text[: FOLDED // 2].rstrip()} ..." if len(self.text) > FOLDED else ""


@dataclass(frozen=True)
class PageTable:
    """A table as the page shows it."""

    columns: tuple[str, ...]
    """Column headings; the ends of intervals have none."""

    rows: tuple[tuple[PageCell, ...], ...]
    """One tuple per row, as long as ``columns``."""


def page_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> PageTable:
    """The table with each interval in the column of its value.

    A column is the value of an interval if the next two end in ``low`` and ``high``.
    """
    places = list(_places(columns))
    column_cells = [_column(rows, at, has_interval=has_interval) for at, has_interval in places]
    heads = tuple(columns[at] for at, _ in places)
    return PageTable(heads, tuple(zip(*column_cells, strict=True)) if rows else ())


def format_cell(cell: Cell) -> str:
    """A cell as people read it."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def format_interval(value: float, low: float, high: float, *, digits: int = 2) -> str:
    """A figure and its interval, ``0.50 [0.25, 0.75]``; three digits where all are below 0.1."""
    if 0 < _largest((value, low, high)) < 0.1:
        digits = 3
    return f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def _places(columns: Sequence[str]) -> Iterator[tuple[int, bool]]:
    """Column that is shown, and whether the next two are the ends of its interval."""
    at = 0
    while at < len(columns):
        ends = [name.rpartition(" ")[2] for name in columns[at + 1 : at + 3]]
        has_interval = ends == ["low", "high"]
        yield at, has_interval
        at += 3 if has_interval else 1


def _column(rows: Sequence[Sequence[Cell]], at: int, *, has_interval: bool) -> list[PageCell]:
    if not has_interval:
        return [_cell(row[at]) for row in rows]
    triples = [row[at : at + 3] for row in rows]
    largest = [_largest(row) for row in triples]
    digits = 2 if max(largest, default=1) >= 0.5 else 3
    return [_interval(row, digits) for row in triples]


def _largest(cells: Sequence[Cell]) -> float:
    """The largest finite number of some cells, without its sign; 0 if there is none."""
    numbers = [abs(c) for c in cells if isinstance(c, (int, float)) and isfinite(c)]
    return max(numbers, default=0)


def _interval(cells: Sequence[Cell], digits: int) -> PageCell:
    numbers = [cell for cell in cells if isinstance(cell, (int, float))]
    if len(numbers) == len(cells):
        return PageCell(format_interval(*numbers, digits=digits), is_number=True)
    value = cells[0]
    text = f"{value:z.{digits}f}" if isinstance(value, float) else format_cell(value)
    return PageCell(text, is_number=True)


def _cell(cell: Cell) -> PageCell:
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    tone = TONES.get(cell, "") if isinstance(cell, str) else ""
    return PageCell(format_cell(cell), is_number, tone)

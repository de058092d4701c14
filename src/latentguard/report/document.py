"""Reports: tables and figures in one folder, as HTML, JSON and CSV, with their provenance."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from latentguard.errors import require_extra
from latentguard.files import write_atomic

Cell = str | float | int | bool | None

PICTURES = ("json", "png", "svg")
"""The files of a figure."""


@dataclass(frozen=True)
class Table:
    """A titled table."""

    title: str
    """Also names its CSV file."""

    columns: tuple[str, ...]
    """Column heads."""

    rows: tuple[tuple[Cell, ...], ...]
    """One tuple a row, as long as ``columns``."""

    note: str = ""
    """What a reader must know: n, where from, how to read it."""

    def csv(self) -> str:
        """As CSV text."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
        return out.getvalue()

    def markdown(self) -> str:
        """As a Markdown table under its title, with its note."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(map(show, line)) + " |" for line in lines)
        return f"**{self.title}.** {self.note}\n\n{table}"


@dataclass(frozen=True)
class Figure:
    """A titled Plotly figure."""

    title: str
    """Head line."""

    plot: Any
    """A ``plotly.graph_objects.Figure``."""

    caption: str = ""
    """What it shows, with n."""


@dataclass(frozen=True)
class Section:
    """A head line, what it says in a paragraph, and its tables and figures."""

    title: str
    """Head line."""

    text: str = ""
    """One paragraph."""

    parts: tuple[Table | Figure, ...] = ()
    """In order of appearance."""


@dataclass(frozen=True)
class Report:
    """What a run found."""

    title: str
    """Head line of the page."""

    sections: tuple[Section, ...]
    """In order of appearance."""

    meta: dict[str, Any] = field(default_factory=dict)
    """Provenance: model, data digests, versions, settings, seeds."""

    @property
    def tables(self) -> list[Table]:
        """Every table."""
        return [p for section in self.sections for p in section.parts if isinstance(p, Table)]

    @property
    def figures(self) -> list[Figure]:
        """Every figure."""
        return [p for section in self.sections for p in section.parts if isinstance(p, Figure)]

    def save(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``report.json`` and ``tables/*.csv``; returns the folder.

        An earlier report in the folder is replaced, its tables and pictures too; other files stay.
        """
        folder = Path(folder)
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        for path in _written(folder):
            path.unlink(missing_ok=True)
        for name, table in zip(numbered([t.title for t in self.tables]), self.tables, strict=True):
            write_atomic(folder / "tables" / f"{name}.csv", table.csv())
        write_atomic(folder / "report.json", json.dumps(self.as_dict(), indent=1, allow_nan=False))
        write_atomic(folder / "report.html", self.html())
        return folder

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON types."""
        tables = [
            dict(title=t.title, columns=t.columns, rows=_known(t.rows), note=t.note)
            for t in self.tables
        ]
        figures = [figure.title for figure in self.figures]
        return dict(title=self.title, meta=self.meta, tables=tables, figures=figures)

    def html(self) -> str:
        """One self-contained page: no request leaves it.

        Raises:
            MissingExtra: if there are figures, and the extra ``report`` is not installed.
        """
        from jinja2 import Environment, PackageLoader

        environment = Environment(loader=PackageLoader("latentguard.report", "."), autoescape=True)
        environment.filters |= {"show": show, "slug": slug}
        environment.tests["table"] = lambda part: isinstance(part, Table)
        page = environment.get_template("report.html")
        script = _plotly_script() if self.figures else ""
        return page.render(report=self, plotly=script, meta=json.dumps(self.meta, indent=1))


def _plotly_script() -> str:
    """The JavaScript that draws the figures, 4.6 MB."""
    offline = require_extra("plotly.offline", "report", "A report with figures")
    return str(offline.get_plotlyjs())


def clear(folder: Path) -> None:
    """Remove the report in a folder, and the folder if nothing else is in it."""
    for path in _written(folder):
        path.unlink(missing_ok=True)
    for name in ("report.html", "report.json"):
        (folder / name).unlink(missing_ok=True)
    for place in (folder / "tables", folder / "figures", folder):
        with contextlib.suppress(OSError):  # it is not there, or holds something else
            place.rmdir()


def _written(folder: Path) -> list[Path]:
    """The tables and pictures of the report in a folder; none if it holds none that can be read."""
    try:
        known = json.loads((folder / "report.json").read_text("utf-8"))
        tables = numbered([table["title"] for table in known["tables"]])
        figures = numbered(known.get("figures", []))  # older ones name none
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    drawn = [folder / "figures" / f"{name}.{kind}" for name in figures for kind in PICTURES]
    return [*(folder / "tables" / f"{name}.csv" for name in tables), *drawn]


def _known(rows: tuple[tuple[Cell, ...], ...]) -> list[list[Cell]]:
    """Cells as JSON has them: what is undefined is null."""
    return [
        [None if isinstance(cell, float) and not isfinite(cell) else cell for cell in row]
        for row in rows
    ]


def show(cell: Cell) -> str:
    """A cell as people read it."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def slug(title: str) -> str:
    """A title as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def numbered(titles: Sequence[str]) -> list[str]:
    """Titles as file names, those that come again numbered."""
    names: list[str] = []
    for title in titles:
        name, again = slug(title), 2
        while name in names:
            name, again = f"{slug(title)}-{again}", again + 1
        names.append(name)
    return names

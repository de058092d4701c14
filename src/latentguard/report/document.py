"""Reports: tables and figures with their provenance, written as HTML, JSON and CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from latentguard.errors import require_extra
from latentguard.files import write_atomic
from latentguard.report.page_table import Cell, PageTable, format_cell, page_table

__all__ = ["Cell", "Figure", "Report", "Section", "Series", "Table", "format_cell"]

FIGURE_FORMATS = ("json", "png", "svg", "pdf")
"""File name extensions of a figure."""


@dataclass(frozen=True, repr=False)
class Table:
    """A titled table."""

    title: str
    """Title; also names the CSV file."""

    columns: tuple[str, ...]
    """Column headings."""

    rows: tuple[tuple[Cell, ...], ...]
    """One tuple per row, as long as ``columns``."""

    note: str = ""
    """What a reader must know: n, source, how to read it."""

    def __repr__(self) -> str:
        """Return title and size."""
        return f"Table({self.title!r}, {len(self.rows)} rows x {len(self.columns)} columns)"

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        heads = "".join(f"<th>{escape(column)}</th>" for column in self.page.columns)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell.text)}</td>' for cell in row)}</tr>"
            for row in self.page.rows
        )
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return (
            f"<p><strong>{escape(self.title)}</strong></p><table><thead><tr>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table>{note}"
        )

    @property
    def page(self) -> PageTable:
        """The table as people read it, each interval in the column of its value."""
        return page_table(self.columns, self.rows)

    def csv(self) -> str:
        """Return the table as CSV text; the ends of intervals have columns of their own."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
        return out.getvalue()

    def markdown(self) -> str:
        """Return the table as Markdown, under its title and note."""
        heads = self.page.columns
        rows = ([_escape_markdown(cell.text) for cell in row] for row in self.page.rows)
        lines = [heads, ("---",) * len(heads), *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}.** {self.note}\n\n{table}"


@dataclass(frozen=True)
class Series:
    """A curve of a figure as numbers, which other reports can be compared with."""

    name: str
    """What it is of."""

    places: tuple[float | str, ...]
    """Where on the horizontal axis."""

    value: tuple[float, ...]
    """At each place."""

    low: tuple[float, ...]
    """Lower end of the 95 % interval at each place."""

    high: tuple[float, ...]
    """Upper end of the 95 % interval at each place."""


@dataclass(frozen=True, repr=False)
class Figure:
    """A titled Plotly figure."""

    title: str
    """Heading."""

    plot: Any
    """A ``plotly.graph_objects.Figure``."""

    caption: str = ""
    """What it shows, with n."""

    series: tuple[Series, ...] = ()
    """Its curves as numbers, where it has any."""

    axes: tuple[str, str] = ("", "")
    """Names of the horizontal and the vertical axis of the curves."""

    def __repr__(self) -> str:
        """Return title and caption."""
        return f"Figure({self.title!r}, {self.caption!r})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Return what Plotly shows in a notebook."""
        return self.plot._repr_mimebundle_(**options)


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and tables and figures."""

    title: str
    """Heading."""

    text: str = ""
    """One paragraph of text."""

    parts: tuple[Table | Figure, ...] = ()
    """Tables and figures in order of appearance."""


@dataclass(frozen=True, repr=False)
class Report:
    """A titled report with its provenance."""

    title: str
    """Title of the page."""

    sections: tuple[Section, ...]
    """Sections in order of appearance."""

    meta: dict[str, Any] = field(default_factory=dict)
    """Provenance: model, data digests, versions, settings, seeds."""

    def __repr__(self) -> str:
        """Return title, section titles and counts."""
        titles = ", ".join(section.title for section in self.sections)
        counts = f"{_count(self.tables, 'table')}, {_count(self.figures, 'figure')}"
        return f"Report({self.title!r}, {counts}; sections: {titles})"

    def _repr_html_(self) -> str:
        """Return the whole page in a frame of its own, as a notebook shows it."""
        page = escape(self.html())
        style = "width:100%;height:40rem;border:0"
        frame = f'<iframe title="{escape(self.title)}" style="{style}" srcdoc="{page}">'
        return f"{frame}</iframe>"

    @property
    def tables(self) -> list[Table]:
        """Every table of the report."""
        return [p for section in self.sections for p in section.parts if isinstance(p, Table)]

    @property
    def figures(self) -> list[Figure]:
        """Every figure of the report."""
        return [p for section in self.sections for p in section.parts if isinstance(p, Figure)]

    def save(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``report.json`` and ``tables/*.csv``; returns the folder.

        An earlier report in the folder is replaced, its tables and pictures too; other files stay.
        """
        folder = Path(folder)
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        for path in _report_files(folder):
            path.unlink(missing_ok=True)
        names = file_names([table.title for table in self.tables])
        for name, table in zip(names, self.tables, strict=True):
            write_atomic(folder / "tables" / f"{name}.csv", table.csv())
        write_atomic(folder / "report.json", json.dumps(self.to_dict(), indent=1, allow_nan=False))
        write_atomic(folder / "report.html", self.html())
        return folder

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, as JSON types."""
        tables = [
            dict(title=t.title, columns=t.columns, rows=_json_rows(t.rows), note=t.note)
            for t in self.tables
        ]
        figures = [figure.title for figure in self.figures]
        curves = [_curves(figure) for figure in self.figures if figure.series]
        return dict(title=self.title, meta=self.meta, tables=tables, figures=figures, curves=curves)

    def html(self) -> str:
        """Return one self-contained page; it makes no requests.

        Raises:
            MissingExtra: if there are figures, and the extra ``report`` is not installed.
        """
        from jinja2 import Environment, PackageLoader

        environment = Environment(loader=PackageLoader("latentguard.report", "."), autoescape=True)
        environment.filters["slug"] = slug
        environment.tests["table"] = lambda part: isinstance(part, Table)
        page = environment.get_template("report.html")
        script = _plotly_script() if self.figures else ""
        return page.render(report=self, plotly=script, meta=json.dumps(self.meta, indent=1))


def _count(parts: Sequence[object], noun: str) -> str:
    return f"{len(parts)} {noun}" if len(parts) == 1 else f"{len(parts)} {noun}s"


def _plotly_script() -> str:
    """The JavaScript that draws the figures, 4.6 MB."""
    offline = require_extra("plotly.offline", "report", "A report with figures")
    return str(offline.get_plotlyjs())


def remove_report(folder: Path) -> None:
    """Remove the report in a folder, and the folder if it is empty then."""
    for path in _report_files(folder):
        path.unlink(missing_ok=True)
    for name in ("report.html", "report.json"):
        (folder / name).unlink(missing_ok=True)
    for place in (folder / "tables", folder / "figures", folder):
        with contextlib.suppress(OSError):  # it is not there, or holds something else
            place.rmdir()


def _report_files(folder: Path) -> list[Path]:
    """Return the tables and pictures of the report in a folder; none without a readable report."""
    try:
        record = json.loads((folder / "report.json").read_text("utf-8"))
        tables = file_names([table["title"] for table in record["tables"]])
        figures = file_names(record["figures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    pictures = [
        folder / "figures" / f"{name}.{kind}" for name in figures for kind in FIGURE_FORMATS
    ]
    return [*(folder / "tables" / f"{name}.csv" for name in tables), *pictures]


def _json_rows(rows: tuple[tuple[Cell, ...], ...]) -> list[list[Cell]]:
    """Return cells as JSON types: an undefined number is null."""
    return [[_defined(cell) for cell in row] for row in rows]


def _defined(cell: Cell) -> Cell:
    """A cell, or None for a number that is undefined."""
    return None if isinstance(cell, float) and not isfinite(cell) else cell


def _curves(figure: Figure) -> dict[str, Any]:
    """The curves of a figure as JSON types."""
    lines = [
        {name: [*map(_defined, of)] if name != "name" else of for name, of in vars(one).items()}
        for one in figure.series
    ]
    return dict(title=figure.title, x=figure.axes[0], y=figure.axes[1], series=lines)


def _escape_markdown(text: str) -> str:
    """A cell's text, which must not end its cell or its line."""
    return text.replace("|", "\\|").replace("\n", " ")


def slug(title: str) -> str:
    """Return a title as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def file_names(titles: Sequence[str]) -> list[str]:
    """Return titles as file names, with a number after repeated ones."""
    names: list[str] = []
    for title in titles:
        name, again = slug(title), 2
        while name in names:
            name, again = f"{slug(title)}-{again}", again + 1
        names.append(name)
    return names

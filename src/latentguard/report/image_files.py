"""The figures of a report as files: SVG and PDF for papers, PNG to look at, JSON to draw again."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from latentguard.errors import LatentGuardError, require_extra
from latentguard.files import write_atomic
from latentguard.report.document import FIGURE_FORMATS, Figure, Report, file_names

WIDTH = 900
"""Of a PNG, in pixels."""

PRINT_WIDTH = 480
"""Of an SVG or PDF, in CSS pixels: 5 inches, with letters of 9 points."""

PRINT_PANELS_WIDTH = 672
"""The same for panels: 7 inches, both columns of a page."""


AXIS = 50
"""Pixels for the numbers and the name of the horizontal axis in print."""

ROW = 20
"""Height of a row of the legend in print, in pixels."""


def write_pictures(report: Report, folder: str | Path) -> list[Path]:
    """Write ``figures/*.json``, then ``*.png``, ``*.svg`` and ``*.pdf``, under a report's folder.

    SVG and PDF have no title, as the caption in a paper has one.

    Returns:
        The pictures.

    Raises:
        LatentGuardError: if there is no Chrome or Chromium to draw pictures with, or it fails;
            the JSON files are there.
        MissingExtra: if the extra ``report`` is not installed.
    """
    folder = Path(folder) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([figure.title for figure in report.figures])
    for name, figure in zip(names, report.figures, strict=True):
        write_atomic(folder / f"{name}.json", figure.plot.to_json())
    jobs = {
        folder / f"{name}.{kind}": _image_options(figure, kind)
        for name, figure in zip(names, report.figures, strict=True)
        for kind in FIGURE_FORMATS[1:]
    }
    if jobs:
        _render([job | {"path": path} for path, job in jobs.items()])
    return list(jobs)


def _render(jobs: list[dict[str, Any]]) -> None:
    kaleido = require_extra("kaleido", "report", "Drawing PNG and SVG figures")
    errors = require_extra("choreographer.errors", "report", "Drawing PNG and SVG figures")
    try:
        failed = kaleido.write_fig_from_object_sync(jobs)
    except (errors.BrowserClosedError, errors.BrowserFailedError) as error:
        raise LatentGuardError(
            f"The browser that draws PNG and SVG figures failed: {_first_line(error)}. All else is "
            "kept."
        ) from error
    except errors.ChromeNotFoundError as error:
        raise LatentGuardError(
            "PNG and SVG figures are drawn by Chrome or Chromium, and none was found. Install one "
            "(Debian: apt-get install chromium) and run the study again: all else is kept."
        ) from error
    if failed:
        raise LatentGuardError(
            f"{len(failed)} of {len(jobs)} pictures were not drawn: {_first_line(failed[0])}. All "
            "else is kept."
        )


def _first_line(error: Exception) -> str:
    text = str(error.args[0]).strip() if error.args else ""
    return text.split("\n")[0].rstrip(".") or type(error).__name__


def _image_options(figure: Figure, kind: str) -> dict[str, Any]:
    """The figure as one kind of file shows it, and its size."""
    plot = deepcopy(figure.plot)
    height = plot.layout.height
    if kind == "png":
        plot.update_layout(title_text=figure.title, template="plotly_white")
        return dict(fig=plot, opts=dict(format=kind, width=WIDTH, height=height or 520))
    is_panels = plot.layout.meta is not None
    width = PRINT_PANELS_WIDTH if is_panels else PRINT_WIDTH
    font = dict(family="Helvetica, Arial, DejaVu Sans, sans-serif", size=12, color="black")
    legend_height = ROW * _legend_rows(plot, width)
    margin = dict(l=50, r=10, t=24 if is_panels else 10, b=AXIS + legend_height)
    # room for the legend is added below, so that it lies behind the name of the axis
    drawn = (height or 340) - margin["t"] - AXIS
    height = drawn + margin["t"] + margin["b"]
    legend = dict(orientation="h", x=0, y=-AXIS / drawn, yanchor="top")
    plot.update_layout(template="simple_white", font=font, margin=margin, legend=legend)
    plot.update_xaxes(showgrid=False, automargin=True)
    plot.update_yaxes(showgrid=True, gridcolor="#e3e3e3", automargin=True)
    return dict(fig=plot, opts=dict(format=kind, width=width, height=height))


def _legend_rows(plot: Any, width: int) -> int:
    """Rows that the legend of a printed figure takes at most."""
    names = {one.name for one in plot.data if one.name and one.showlegend is not False}
    if not names:
        return 0
    entry = 45 + 7 * max(map(len, names))
    columns = max(1, (width - 60) // entry)
    return -(-len(names) // columns)

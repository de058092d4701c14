"""The figures of a report as files: PNG and SVG for papers, JSON to draw again."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from latentguard.errors import LatentGuardError, require_extra
from latentguard.files import write_atomic
from latentguard.report.document import FIGURE_FORMATS, Figure, Report, file_names

SIZE = dict(width=900, height=520)


def write_pictures(report: Report, folder: str | Path) -> list[Path]:
    """Write ``figures/*.json``, then ``*.png`` and ``*.svg``, under a report's folder.

    Returns:
        The pictures.

    Raises:
        LatentGuardError: if there is no Chrome or Chromium to draw PNG and SVG with, or it fails;
            the JSON files are there.
        MissingExtra: if the extra ``report`` is not installed.
    """
    folder = Path(folder) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([figure.title for figure in report.figures])
    for name, figure in zip(names, report.figures, strict=True):
        write_atomic(folder / f"{name}.json", figure.plot.to_json())
    jobs = {
        folder / f"{name}.{kind}": dict(fig=_titled(figure), opts=dict(format=kind, **SIZE))
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
    said = str(error.args[0]).strip() if error.args else ""
    return said.split("\n")[0].rstrip(".") or type(error).__name__


def _titled(figure: Figure) -> Any:
    plot = deepcopy(figure.plot)
    plot.update_layout(title_text=figure.title, template="plotly_white")
    return plot

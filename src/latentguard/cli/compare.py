"""The verb ``compare``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.outputs import output_folder, save_report, warn_of_replacement
from latentguard.errors import require_extra


def compare(
    reports: Annotated[list[Path], typer.Argument(help="Folders that 'latentguard study' wrote.")],
    out: Annotated[Path, typer.Option(help="Report folder.")],
) -> None:
    """Compare REPORTS of models, checkpoints or protocols: claims by report, curves overlaid.

    The page begins with each claim's verdict, effect, interval, n and form control in every report.
    Tables lie beside it as CSV, all figures of all reports in report.json. No model is
    loaded.

    Example: latentguard compare reports/base reports/instruct --out reports/both
    """
    require_extra("plotly", "report", "latentguard compare")
    from latentguard.study.compare import compare as compared
    from latentguard.study.compare import read_reports

    report = compared(read_reports(reports))
    with output_folder(out):
        warn_of_replacement(out)
        save_report(report, out)
    typer.echo(out / "report.html")

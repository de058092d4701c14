"""The verb ``demo``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import progress
from latentguard.cli.loading import load_model
from latentguard.cli.options import Model


def demo(
    out: Annotated[Path, typer.Option(help="Report folder.")] = Path("reports/demo"),
    guard: Annotated[Path, typer.Option(help="Guard folder; reused if it is there.")] = Path(
        "guards/demo"
    ),
    model: Model = "default",
) -> None:
    """Fit, calibrate and try a guard on a real model; prints the report's path last.

    Uses the built-in contrast set. A second run reuses the guard.

    Example: latentguard demo
    """
    from latentguard.cli.demo.run import run

    with progress("demo") as bar:
        folder = run(load_model(model), guard, out, step=bar.step)
    typer.echo(folder / "report.html")

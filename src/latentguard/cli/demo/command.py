"""The verb ``demo``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import progress
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_model, require_model
from latentguard.cli.options import Model
from latentguard.cli.outputs import output_folder
from latentguard.errors import require_extra


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
    require_extra("plotly", "report", "latentguard demo")
    require_model(model)
    advice = f"A guard that is whole stays in {guard}. Run the same command again to go on."
    with output_folder(out), output_folder(guard), explain_interrupt(advice):
        from latentguard.cli.demo.run import run

        backend = load_model(model)
        with progress("demo") as view:
            folder = run(backend, guard, out, step=view.step)
    typer.echo(folder / "report.html")

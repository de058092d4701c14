"""The verb ``audit``; heavy imports stay inside it."""

from __future__ import annotations

from typing import Annotated

import typer

from latentguard.cli.console import echo_err
from latentguard.cli.inputs import read_source
from latentguard.cli.options import Label, Side, TextColumn
from latentguard.data.prompt_files import Columns


def audit(
    files: Annotated[
        list[str], typer.Argument(help="Labelled files, or 'contrast' for the built-in set.")
    ],
    text_column: TextColumn = "text",
    label: Label = None,
) -> None:
    """Measure how well surface form alone separates the labels of a set (0.5: not at all).

    Example: latentguard audit advbench.jsonl alpaca.jsonl
    """
    from rich.console import Console
    from rich.table import Table

    from latentguard.data.surface_audit import audit_surface

    harmful = None if label is None else label is Side.harmful
    prompts = [p for file in files for p in read_source(file, Columns(text=text_column), harmful)]
    result = audit_surface(prompts)
    view = Table("feature", "separates", title=f"{result.n[0]} harmful, {result.n[1]} harmless")
    for name in ("ending", "form", "length", "ngrams"):
        view.add_row(name, f"{getattr(result, name):.3f}")
    Console().print(view)
    for counts in (result.endings, result.forms):
        rows = [f"{name} {a} / {b}" for name, (a, b) in counts.items()]
        typer.echo("harmful / harmless: " + ", ".join(rows))
    for warning in result.warnings:
        echo_err(f"Warning: {warning}")

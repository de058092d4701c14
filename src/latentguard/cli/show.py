"""The verb ``show``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.loading import read_guard
from latentguard.guard.hub import find_guard


def show(
    guard: Annotated[
        str | None,
        typer.Argument(help="Guard folder, Hub id (org/guard), or 'default'."),
    ] = None,
) -> None:
    """Print what a guard is, what it promises, and what it is bound to.

    Without GUARD, list the models that are ready on this disk.

    Example: latentguard show guards/qwen
    """
    if guard is None:
        _list_models()
    else:
        _show_guard(find_guard(guard))


def _show_guard(folder: Path) -> None:
    from latentguard.guard.artifact import read_card, read_record

    record = read_record(folder)
    typer.echo(read_card(folder, record) or read_guard(folder).card)
    for name, value in (record.get("fitted") or {}).items():
        typer.echo(f"{name}: {value}")


def _list_models() -> None:
    from latentguard.models.sources import local_models

    models = list(local_models())
    for model in models:
        typer.echo(f"{model.name}\t{model.bytes / 1e6:,.0f} MB\t{model.path}")
    if not models:
        typer.echo("No models yet; 'latentguard demo' fetches the default one.")

"""Verbs that make and use guards; heavy imports stay inside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.app import app
from latentguard.cli.console import columns_of, load, load_guard, note, progress, read, read_side
from latentguard.cli.options import (
    AllowMismatch,
    Dtype,
    GuardFolder,
    Label,
    Model,
    Moved,
    Side,
    TextColumn,
)
from latentguard.contrast import load_contrast
from latentguard.prompts import Columns, stream_prompts


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Report folder.")] = Path("reports/demo"),
    guard: Annotated[Path, typer.Option(help="Guard folder; reused if it is there.")] = Path(
        "guards/demo"
    ),
    model: Model = "default",
) -> None:
    """Fit, calibrate and try a guard on a real model; prints the report's path last.

    Uses the built-in contrast set. A second run reuses the guard.
    """
    from latentguard.demo import run

    with progress("demo") as bar:
        folder = run(load(model), guard, out, step=bar.step)
    typer.echo(folder / "report.html")


@app.command()
def fit(  # noqa: PLR0913, PLR0917 (the contract names these options)
    out: Annotated[Path, typer.Option(help="Folder for the guard.")],
    model: Model = "default",
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Train on the built-in contrast set (the default).")
    ] = False,
    harmful: Annotated[list[str] | None, typer.Option(help="Harmful prompts; repeatable.")] = None,
    harmless: Annotated[
        list[str] | None, typer.Option(help="Harmless prompts; repeatable.")
    ] = None,
    reading: Annotated[
        str, typer.Option(help="t_inst, t_post, post+K, sealed, or span (t_inst and all after).")
    ] = "span",
    readout: Annotated[
        str, typer.Option(help="linear, or centroid (the paper's rule).")
    ] = "linear",
    long: Annotated[
        bool, typer.Option("--long", help="Also read long prompts and chats by windows.")
    ] = False,
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
) -> None:
    """Fit a guard for MODEL and write it to OUT.

    The paper's guard: --harmful advbench.jsonl --harmless alpaca.jsonl --reading t_inst --readout
    centroid. Rows that carry a label are used only for the side that their file is named for.
    """
    from latentguard.audit import surface_warnings
    from latentguard.guard import LatentGuard

    columns = Columns(text=text_column)
    sides = read_side(harmful, columns, harmful=True) + read_side(harmless, columns, harmful=False)
    prompts = sides + (load_contrast("train") if contrast or not sides else [])
    for warning in surface_warnings(prompts):
        note(f"Warning: {warning}")
    backend = load(model, dtype)
    with progress("capture", len(prompts)) as bar:
        guard = LatentGuard.fit(
            backend,
            prompts,
            reading=reading,
            readout=readout,  # type: ignore[arg-type]
            progress=bar.advance,
        )
    if long:
        from latentguard.window_fitting import fit_windows

        with progress("windows") as bar:
            guard = fit_windows(backend, guard, progress=bar.advance)
    guard.save(out)
    note(f"Guard written to {out}. Next: latentguard calibrate {out} --harmless FILE")


@app.command()
def score(
    guard: GuardFolder,
    prompts: Annotated[str, typer.Argument(help="File, '-', or Hub data set.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file; standard output if none.")
    ] = None,
    text_column: TextColumn = "text",
    model: Moved = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Score prompts: one JSON object a line, in input order (id, score, probability, flagged).

    The slice of a prompt, if the guard was calibrated by slices, comes from the same column.

    With --out, a killed run goes on where it stopped when it is called again.
    """
    from latentguard.verdicts import line_of, score_to_file

    loaded, backend = load_guard(guard, model, allow_mismatch=allow_mismatch)
    columns = replace(columns_of(loaded, text_column), label="")  # labels are not read
    rows = stream_prompts(prompts, columns=columns)
    with progress("score") as bar:
        if out is None:
            for verdict in loaded.scan(backend, rows, progress=bar.advance):
                typer.echo(line_of(verdict))
            return
        done = score_to_file(loaded, backend, rows, out, progress=bar.advance)
    note(f"Verdicts in {out}" + (f" ({done} were there from an earlier run)." if done else "."))


@app.command()
def audit(
    files: Annotated[list[str], typer.Argument(help="Labelled files, or 'contrast'.")],
    text_column: TextColumn = "text",
    label: Label = None,
) -> None:
    """Say how well surface form alone separates the labels of a set (0.5: not at all)."""
    from rich.console import Console
    from rich.table import Table

    from latentguard.audit import audit as audit_set

    known = None if label is None else label is Side.harmful
    prompts = [p for file in files for p in read(file, Columns(text=text_column), known)]
    found = audit_set(prompts)
    view = Table("feature", "separates", title=f"{found.n[0]} harmful, {found.n[1]} harmless")
    for name in ("ending", "form", "length", "ngrams"):
        view.add_row(name, f"{getattr(found, name):.3f}")
    Console().print(view)
    for counts in (found.endings, found.forms):
        rows = [f"{name} {a} / {b}" for name, (a, b) in counts.items()]
        typer.echo("harmful / harmless: " + ", ".join(rows))
    for warning in found.warnings:
        note(f"Warning: {warning}")


@app.command()
def show(guard: GuardFolder) -> None:
    """Print what a guard is, what it promises, and what it is bound to."""
    from latentguard.guard import LatentGuard

    loaded = LatentGuard.load(guard)
    typer.echo(loaded.card)
    for name, value in (loaded.fitted or {}).items():
        typer.echo(f"{name}: {value}")


@app.command()
def models() -> None:
    """List the models that are ready on this disk."""
    from latentguard.model.sources import cached_models

    found = list(cached_models())
    for model in found:
        typer.echo(f"{model.name}\t{model.size / 1e6:,.0f} MB\t{model.path}")
    if not found:
        typer.echo("None yet; 'latentguard demo' fetches the default model.")

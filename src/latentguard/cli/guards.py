"""Verbs that make and use guards; heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.app import app
from latentguard.cli.console import load, load_guard, note, progress, read, read_side
from latentguard.cli.options import Dtype, GuardFolder, Label, Model, Side, TextColumn
from latentguard.contrast import load_contrast
from latentguard.prompts import Columns, Prompt, stream_prompts

if TYPE_CHECKING:
    from latentguard.guard import LatentGuard
    from latentguard.model.hf import ChatModel


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

    sides = read_side(harmful, text_column, harmful=True) + read_side(
        harmless, text_column, harmful=False
    )
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
def calibrate(
    guard: GuardFolder,
    harmless: Annotated[
        list[str] | None,
        typer.Option(help="Harmless prompts like your traffic; default: the built-in ones."),
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="Rate to keep; 0.01, or 0.05 with the built-in prompts.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the Clopper-Pearson bound.")] = 0.95,
    text_column: TextColumn = "text",
    model: Annotated[str | None, typer.Option(help="If the model has moved.")] = None,
) -> None:
    """Set the guard's threshold so that it flags at most MAX_FPR of harmless prompts.

    A guard that was fitted with --long has a second threshold, for long prompts and chats: it is
    set from those in HARMLESS if there are any.
    """
    loaded, backend = load_guard(guard, model)
    prompts = read_side(harmless, text_column, harmful=False)
    if not harmless:
        prompts = [p for p in load_contrast("validation") if not p.harmful]
    rate = max_fpr if max_fpr is not None else (0.01 if harmless else 0.05)
    with progress("calibrate", len(prompts)) as bar:
        calibrated = loaded.calibrate(
            backend, prompts, max_fpr=rate, confidence=confidence, progress=bar.advance
        )
    calibrated = calibrated_long(calibrated, backend, prompts, rate, confidence)
    calibrated.save(guard)
    typer.echo(f"Threshold {calibrated.threshold:.6g}: {calibrated.promise}.")


def calibrated_long(
    guard: LatentGuard, backend: ChatModel, prompts: list[Prompt], rate: float, confidence: float
) -> LatentGuard:
    """The guard with the threshold of its windows set from the long ones of the prompts."""
    from latentguard.window_fitting import calibrate_windows
    from latentguard.windows import Windows

    windows = guard.part(Windows)
    long = [p for p in prompts if windows and windows.needed(backend, p)]
    if not long:
        return guard
    with progress("windows", len(long)) as bar:
        return calibrate_windows(
            backend, guard, long, max_fpr=rate, confidence=confidence, progress=bar.advance
        )


@app.command()
def score(
    guard: GuardFolder,
    prompts: Annotated[str, typer.Argument(help="File, '-', or Hub data set.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file; standard output if none.")
    ] = None,
    text_column: TextColumn = "text",
    model: Annotated[str | None, typer.Option(help="If the model has moved.")] = None,
) -> None:
    """Score prompts: one JSON object a line, in input order (id, score, probability, flagged).

    With --out, a killed run goes on where it stopped when it is called again.
    """
    from latentguard.verdicts import line_of, score_to_file

    loaded, backend = load_guard(guard, model)
    rows = stream_prompts(prompts, columns=Columns(text=text_column, label=""))  # labels unread
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
    prompts = [p for file in files for p in read(file, text_column, known)]
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

"""Verbs that make and use guards; heavy imports stay inside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.app import app
from latentguard.cli.console import (
    columns_of,
    keep,
    load,
    load_guard,
    note,
    progress,
    read,
    read_side,
)
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    Dtype,
    Engine,
    GuardFolder,
    Label,
    Model,
    Moved,
    Quantize,
    Side,
    TextColumn,
)
from latentguard.data.builtin import load_traffic
from latentguard.errors import LatentGuardError
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
    from latentguard.cli.demo.run import run

    with progress("demo") as bar:
        folder = run(load(model), guard, out, step=bar.step)
    typer.echo(folder / "report.html")


@app.command()
def fit(  # noqa: PLR0913, PLR0917 (the contract names these options)
    out: Annotated[Path, typer.Option(help="Folder for the guard.")],
    model: Model = "default",
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Train on the built-in prompts (the default).")
    ] = False,
    harmful: Annotated[list[str] | None, typer.Option(help="Harmful prompts; repeatable.")] = None,
    harmless: Annotated[
        list[str] | None, typer.Option(help="Harmless prompts; repeatable.")
    ] = None,
    reading: Annotated[
        str,
        typer.Option(
            help="pooled (t_inst, t_post, two means), t_inst, t_post, post+K, sealed, span."
        ),
    ] = "pooled",
    probe: Annotated[str, typer.Option(help="linear, or centroid (the paper's rule).")] = "linear",
    long: Annotated[
        bool, typer.Option("--long", help="Also read long prompts and chats by windows.")
    ] = False,
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Weights: int8 (needs torchao) or nf4 (needs bitsandbytes)."),
    ] = None,
    device_map: DeviceMap = None,
) -> None:
    """Fit a guard for MODEL and write it to OUT.

    The paper's guard: --harmful advbench.jsonl --harmless alpaca.jsonl --reading t_inst --probe
    centroid. Rows that carry a label are used only for the side that their file is named for.

    A large model: --device-map auto, and --quantize int8 or nf4. A guard is of the quantised model
    or of the plain one, never of both; the other verbs quantise as it was fitted.
    """
    from latentguard.data.surface_audit import surface_warnings
    from latentguard.guard.latent_guard import LatentGuard

    columns = Columns(text=text_column)
    sides = read_side(harmful, columns, harmful=True) + read_side(harmless, columns, harmful=False)
    prompts = sides + (load_traffic("train") if contrast or not sides else [])
    for warning in surface_warnings(prompts):
        note(f"Warning: {warning}")
    backend = load(model, f"{dtype}/{quantize.value}" if quantize else dtype, device_map)
    with progress("capture", len(prompts)) as bar:
        guard = LatentGuard.fit(
            backend,
            prompts,
            reading=reading,
            probe=probe,  # type: ignore[arg-type]
            progress=bar.advance,
        )
    if long:
        from latentguard.guard.chunk_calibration import fit_windows

        with progress("windows") as bar:
            guard = fit_windows(backend, guard, progress=bar.advance)
    keep(guard, out)
    note(f"Guard written to {out}. Next: latentguard calibrate {out} --harmless FILE")


@app.command()
def score(  # noqa: PLR0913, PLR0917 (the contract names these options)
    guard: GuardFolder,
    prompts: Annotated[str, typer.Argument(help="File, '-', or Hub data set.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file; standard output if none.")
    ] = None,
    text_column: TextColumn = "text",
    model: Moved = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
    engine: Annotated[
        Engine, typer.Option(help="ray: many devices and nodes (extra 'ray'); OUT is a folder.")
    ] = Engine.local,
    actors: Annotated[
        int | None, typer.Option(help="With ray; default: one a GPU, or one a node.", min=1)
    ] = None,
    block_rows: Annotated[
        int, typer.Option(help="With ray: rows of one output file.", min=1)
    ] = 8192,
) -> None:
    """Score prompts: one JSON object a line, in input order (id, score, probability, flagged).

    The segment of a prompt, if the guard was calibrated by segments, comes from the same column.

    With --out, a killed run goes on where it stopped when it is called again. With --engine ray
    PROMPTS may be a folder or a pattern of Parquet and JSON Lines files, OUT becomes a folder of
    Parquet files, and workers and nodes may die; RAY_ADDRESS names the cluster.
    """
    if engine is Engine.ray:
        if device_map is not None or allow_mismatch:
            reason = "with --engine ray each actor has one device, and the guard's own model"
            raise typer.BadParameter(reason, param_hint="--device-map, --allow-mismatch")
        _score_corpus(guard, prompts, out, model, text_column, (actors, block_rows))
        return
    from latentguard.guard.score_files import line_of, score_to_file

    loaded, backend = load_guard(guard, model, allow_mismatch=allow_mismatch, device_map=device_map)
    columns = replace(columns_of(loaded, text_column), label="")  # labels are not read
    rows = stream_prompts(prompts, columns=columns)
    with progress("score") as bar:
        if out is None:
            for verdict in loaded.scan(backend, rows, progress=bar.advance):
                typer.echo(line_of(verdict))
            return
        done = score_to_file(loaded, backend, rows, out, progress=bar.advance)
    note(f"Verdicts in {out}" + (f" ({done} were there from an earlier run)." if done else "."))


def _score_corpus(
    guard: Path,
    prompts: str,
    out: Path | None,
    model: str | None,
    text_column: str,
    shares: tuple[int | None, int],
) -> None:
    from latentguard.guard.latent_guard import LatentGuard

    if out is None:
        raise typer.BadParameter("--engine ray writes a folder; name it", param_hint="--out")
    try:
        from latentguard.integrations.ray import Workers, score_corpus
    except ModuleNotFoundError as error:
        raise LatentGuardError(
            f"--engine ray needs the extra 'ray' ({error.name} is not there): "
            "pip install 'latentguard[ray]'"
        ) from None
    loaded = LatentGuard.load(guard)
    columns = replace(columns_of(loaded, text_column), label="")
    with progress("score") as bar:
        total = score_corpus(
            loaded,
            prompts,
            out,
            model=model,
            columns=columns,
            workers=Workers(*shares),
            progress=bar.advance,
        )
    note(
        f"{total.rows:,} verdicts in {out}, {total.parts:,} files; {total.flagged:,} flagged, "
        f"{total.unscored:,} without a verdict (column 'error')."
    )


@app.command()
def audit(
    files: Annotated[list[str], typer.Argument(help="Labelled files, or 'contrast'.")],
    text_column: TextColumn = "text",
    label: Label = None,
) -> None:
    """Say how well surface form alone separates the labels of a set (0.5: not at all)."""
    from rich.console import Console
    from rich.table import Table

    from latentguard.data.surface_audit import audit as audit_set

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
    from latentguard.guard.latent_guard import LatentGuard

    loaded = LatentGuard.load(guard)
    typer.echo(loaded.card)
    for name, value in (loaded.fitted or {}).items():
        typer.echo(f"{name}: {value}")


@app.command()
def models() -> None:
    """List the models that are ready on this disk."""
    from latentguard.models.sources import stored_models

    found = list(stored_models())
    for model in found:
        typer.echo(f"{model.name}\t{model.size / 1e6:,.0f} MB\t{model.path}")
    if not found:
        typer.echo("None yet; 'latentguard demo' fetches the default model.")

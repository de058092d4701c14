"""The verb ``score``; heavy imports stay inside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import guard_columns
from latentguard.cli.loading import load_guard
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    Engine,
    GuardFolder,
    MovedModel,
    PromptSource,
    TextColumn,
)
from latentguard.errors import LatentGuardError
from latentguard.prompts import stream_prompts


def score(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardFolder,
    prompts: PromptSource,
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file; standard output if none.")
    ] = None,
    text_column: TextColumn = "text",
    model: MovedModel = None,
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

    Example: latentguard score guards/qwen prompts.jsonl --out verdicts.jsonl
    """
    if engine is Engine.ray:
        if device_map is not None or allow_mismatch:
            reason = "with --engine ray each actor has one device, and the guard's own model"
            raise typer.BadParameter(reason, param_hint="--device-map, --allow-mismatch")
        _score_corpus(guard, prompts, out, model, text_column, (actors, block_rows))
        return
    from latentguard.guard.score_files import line_of, score_to_file

    loaded, backend = load_guard(guard, model, allow_mismatch=allow_mismatch, device_map=device_map)
    columns = replace(guard_columns(loaded, text_column), label="")  # labels are not read
    rows = stream_prompts(prompts, columns=columns)
    with progress("score") as bar:
        if out is None:
            for verdict in loaded.scan(backend, rows, progress=bar.advance):
                typer.echo(line_of(verdict))
            return
        done = score_to_file(loaded, backend, rows, out, progress=bar.advance)
    earlier = f" ({done} were there from an earlier run)." if done else "."
    echo_err(f"Verdicts in {out}{earlier}")


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
    columns = replace(guard_columns(loaded, text_column), label="")
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
    echo_err(
        f"{total.rows:,} verdicts in {out}, {total.parts:,} files; {total.flagged:,} flagged, "
        f"{total.unscored:,} without a verdict (column 'error')."
    )

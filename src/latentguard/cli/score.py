"""The verb ``score``; heavy imports stay inside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import ProgressView, echo_err, progress
from latentguard.cli.inputs import check_prompts, check_replies, guard_columns
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import (
    load_cascade,
    load_guard_model,
    read_cascade,
    read_guard,
    warn_if_uncalibrated,
)
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    Engine,
    GuardSource,
    MovedModel,
    PromptSource,
    SecondOpinionSource,
    TextColumn,
)
from latentguard.cli.outputs import output_file, output_folder, warn_of_replacement
from latentguard.data.prompt_files import stream_prompts, stream_replies
from latentguard.errors import require_extra
from latentguard.prompts import Prompt, Reply

if TYPE_CHECKING:
    from latentguard.guard.cascade import Cascade
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.models.chat_model import ChatModel


def score(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    prompts: PromptSource,
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file; default: standard output.")
    ] = None,
    replies: Annotated[
        bool, typer.Option("--replies", help="Rows hold prompt and reply: score the reply.")
    ] = False,
    second_opinion: SecondOpinionSource = None,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
    engine: Annotated[
        Engine, typer.Option(help="ray: many devices and nodes (extra 'ray'); --out is a folder.")
    ] = Engine.local,
    actors: Annotated[
        int | None,
        typer.Option(
            help="With ray: number of workers; default: one for each GPU, or one for each node.",
            min=1,
        ),
    ] = None,
    block_rows: Annotated[
        int, typer.Option(help="With ray: rows of each output file.", min=1)
    ] = 8192,
) -> None:
    """Score prompts: one JSON object a line, in input order (id, score, probability, flagged).

    If the guard was calibrated by segments, a prompt's segment is read from the same column.

    With --second-opinion, prompts in the review band are decided by another guard, a guard model or
    an endpoint; a verdict then says what it said (second_opinion).

    With --replies each row has a prompt and a reply, or messages that end with the assistant. A
    verdict names the token after which the reply is flagged (flagged_at).

    With --out, a killed run continues where it stopped when it is called again. With --engine ray,
    PROMPTS may be a folder or a pattern of Parquet and JSON Lines files, and --out is a folder of
    Parquet files. Workers and nodes may die. RAY_ADDRESS names the cluster.

    Example: latentguard score guards/qwen prompts.jsonl --out verdicts.jsonl
    """
    if second_opinion and (replies or engine is Engine.ray):
        reason = "it is asked of prompts, without ray"
        raise typer.BadParameter(reason, param_hint="--second-opinion")
    if engine is Engine.ray:
        if replies:
            raise typer.BadParameter("replies are scored without ray", param_hint="--replies")
        if device_map is not None or allow_mismatch:
            reason = "with --engine ray each actor has one device, and the guard's own model"
            raise typer.BadParameter(reason, param_hint="--device-map, --allow-mismatch")
        _score_corpus(guard, prompts, out, model, text_column, (actors, block_rows))
        return
    locked = output_file(out) if out else nullcontext()
    with locked, explain_interrupt(partial(_kept_verdicts, out)):
        loaded = read_guard(guard)
        warn_if_uncalibrated(loaded, guard, replies=replies)
        columns = replace(guard_columns(loaded, text_column), label="")  # labels are not read
        if replies:
            loaded.require_reply_probe()
        cascade = read_cascade(loaded, guard, second_opinion) if second_opinion else None
        total = check_replies(prompts) if replies else check_prompts(prompts, columns)
        if out:
            warn_of_replacement(out)
        loaded, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        if cascade is not None:
            cascade = load_cascade(cascade, loaded)
        with progress("score", total) as view:
            if replies:
                _score_replies(loaded, backend, stream_replies(prompts), out, view)
            else:
                rows = stream_prompts(prompts, columns=columns)
                _score_rows(cascade or loaded, backend, rows, out, view)


def _score_rows(
    guard: LatentGuard | Cascade,
    backend: ChatModel,
    rows: Iterator[Prompt],
    out: Path | None,
    view: ProgressView,
) -> None:
    from latentguard.guard.early_reading import scan_corpus
    from latentguard.guard.score_files import score_to_file

    if out is None:
        for verdict in scan_corpus(guard, backend, rows, progress=view.advance):
            typer.echo(json.dumps(verdict.to_dict()))
        return
    _echo_verdicts_in(out, score_to_file(guard, backend, rows, out, progress=view.advance))


def _score_replies(
    guard: LatentGuard,
    backend: ChatModel,
    rows: Iterator[Reply],
    out: Path | None,
    view: ProgressView,
) -> None:
    from latentguard.guard.score_files import score_replies_to_file

    if out is None:
        for verdict in guard.scan_replies(backend, rows, progress=view.advance):
            typer.echo(json.dumps(verdict.to_dict()))
        return
    _echo_verdicts_in(out, score_replies_to_file(guard, backend, rows, out, progress=view.advance))


def _echo_verdicts_in(out: Path, rows_before: int) -> None:
    earlier = f" ({rows_before} were there from an earlier run)." if rows_before else "."
    echo_err(f"Verdicts in {out}{earlier}")


def _kept_verdicts(out: Path | None) -> str:
    """What is kept after Control-C, and how to go on."""
    if out is None:
        return "Each line above is whole. With --out FILE a run goes on where it stopped."
    partial = Path(f"{out}.partial")
    if not partial.exists():
        return "No prompt was scored yet."
    count = partial.read_bytes().count(b"\n")
    return f"{count:,} verdicts are kept in {partial}. Run the same command again to go on."


def _score_corpus(
    guard: str,
    prompts: str,
    out: Path | None,
    model: str | None,
    text_column: str,
    shares: tuple[int | None, int],
) -> None:
    if out is None:
        raise typer.BadParameter("--engine ray writes a folder; name it", param_hint="--out")
    corpora = require_extra("latentguard.integrations.ray", "ray", "--engine ray")
    loaded = read_guard(guard)
    warn_if_uncalibrated(loaded, guard)
    columns = replace(guard_columns(loaded, text_column), label="")
    advice = f"Whole files in {out} stay. Run the same command again to go on."
    with output_folder(out), explain_interrupt(advice), progress("score") as view:
        total = corpora.score_corpus(
            loaded,
            prompts,
            out,
            model=model,
            columns=columns,
            workers=corpora.Workers(*shares),
            progress=view.advance,
        )
    echo_err(
        f"{total.rows:,} verdicts in {out}, {total.parts:,} files; {total.flagged:,} flagged, "
        f"{total.unscored:,} without a verdict (column 'error')."
    )

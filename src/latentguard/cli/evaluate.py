"""The verb ``evaluate``; heavy imports stay inside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import guard_columns
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
    GuardSource,
    MovedModel,
    SecondOpinionSource,
    TextColumn,
)
from latentguard.data.prompt_files import read_prompts
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard


def evaluate(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    prompts: Annotated[str, typer.Argument(help="Labelled prompts: file, '-', or Hub data set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    segment_column: Annotated[
        str | None, typer.Option(help="Column with the traffic segment; default: the guard's.")
    ] = None,
    second_opinion: SecondOpinionSource = None,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
) -> None:
    """Print what GUARD does with labelled prompts: caught, falsely flagged, AUROC, with intervals.

    Shares are at the guard's own threshold: of all rows, by category and by segment. Each row needs
    a label, 'harmful' or 'harmless'. A warning counts prompts that the guard was fitted on, since
    it does better on them than on others. With --second-opinion, shares are those of both together.

    Example: latentguard evaluate guards/qwen labelled.jsonl
    """
    from latentguard.guard import evaluation
    from latentguard.guard.early_reading import scan_corpus

    with explain_interrupt("Nothing is kept: evaluate reads all prompts or none."):
        loaded = read_guard(guard)
        warn_if_uncalibrated(loaded, guard)
        columns = guard_columns(loaded, text_column)
        if segment_column:
            columns = replace(columns, segment=segment_column)
        rows = read_prompts(prompts, columns=columns)
        evaluation.require_labels(rows)
        _warn_of_training_prompts(loaded, rows)
        cascade = read_cascade(loaded, guard, second_opinion) if second_opinion else None
        loaded, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        asked = load_cascade(cascade, loaded) if cascade else loaded
        with progress("evaluate", len(rows)) as view:
            verdicts = list(scan_corpus(asked, backend, rows, progress=view.advance))
    result = evaluation.evaluate(rows, verdicts)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    typer.echo(f"Threshold {loaded.threshold:.6g}: {loaded.promise}.")
    for table in result.tables():
        typer.echo(f"\n{table.markdown()}")


def _warn_of_training_prompts(guard: LatentGuard, prompts: Sequence[Prompt]) -> None:
    from latentguard.guard.leakage import prompt_digest

    training_digests = set(guard.all_training_digests)
    count = sum(
        prompt_digest(guard.reading.prepare(prompt)) in training_digests for prompt in prompts
    )
    if count:
        echo_err(
            f"Warning: the guard was fitted on {count} of these {len(prompts)} prompts; on them it "
            "looks better than it is."
        )

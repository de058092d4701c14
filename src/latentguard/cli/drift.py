"""The verb ``drift``; heavy imports stay inside it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer

from latentguard.cli.console import progress
from latentguard.cli.inputs import guard_columns
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_guard_model, read_guard, require_calibrated
from latentguard.cli.options import AllowMismatch, DeviceMap, GuardSource, MovedModel, TextColumn
from latentguard.data.prompt_files import read_prompts


def drift(
    guard: GuardSource,
    prompts: Annotated[str, typer.Argument(help="Recent traffic: file, '-', or Hub data set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
) -> None:
    """Compare the scores of recent traffic with the calibration; test whether the promise holds.

    The prompts are taken to be harmless. Exit code 1 if more are flagged than was promised.

    Example: latentguard drift guards/qwen last-week.jsonl
    """
    from latentguard.guard.drift import compare

    with explain_interrupt("Nothing is kept: drift compares all prompts or none."):
        loaded = read_guard(guard)
        require_calibrated(loaded, guard)
        rows = read_prompts(prompts, columns=replace(guard_columns(loaded, text_column), label=""))
        loaded, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        with progress("drift", len(rows)) as view:
            verdicts = list(loaded.scan(backend, rows, progress=view.advance))
    comparisons = compare(loaded, rows, verdicts)
    for comparison in comparisons:
        typer.echo(json.dumps(comparison.to_dict()) if as_json else str(comparison))
    raise typer.Exit(not all(comparison.holds for comparison in comparisons))

"""The verb ``suggest``; heavy imports stay inside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import guard_columns
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_guard_model, read_guard
from latentguard.cli.options import DeviceMap, GuardSource, MovedModel, TextColumn
from latentguard.cli.outputs import output_file, warn_of_replacement
from latentguard.data.label_rows import prompt_row
from latentguard.data.prompt_files import read_prompts
from latentguard.files import write_atomic


def suggest(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    traffic: Annotated[str, typer.Argument(help="Unlabelled prompts: file, '-', Hub data set.")],
    out: Annotated[Path, typer.Option(help="JSON Lines file for the prompts to label.")],
    number: Annotated[int, typer.Option("--number", "-n", help="How many to suggest.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    device_map: DeviceMap = None,
) -> None:
    """Choose which prompts of TRAFFIC to label next: 100 of them teach more than 200 random ones.

    Seven of ten have high scores, the others come from the rest; within each they lie far apart.
    Prompts that the guard has learned already are left out. Label them with 'latentguard review',
    then teach them with 'latentguard adapt'.

    Example: latentguard suggest default last-week.jsonl -n 100 --out to-label.jsonl
    """
    from latentguard.guard.suggestion import require_fresh
    from latentguard.guard.suggestion import suggest as choose

    with output_file(out), explain_interrupt("Nothing is kept: run the same command again."):
        loaded = read_guard(guard)
        rows = read_prompts(traffic, columns=replace(guard_columns(loaded, text_column), label=""))
        fresh = require_fresh(loaded, rows, number)
        warn_of_replacement(out)
        loaded, backend = load_guard_model(loaded, model, device_map=device_map)
        with progress("suggest", len(fresh)) as view:
            chosen = choose(loaded, backend, fresh, number, seed=seed, progress=view.advance)
        lines = [
            json.dumps(prompt_row(one.prompt) | {"score": one.score, "stratum": one.stratum})
            for one in chosen
        ]
        write_atomic(out, "".join(f"{line}\n" for line in lines))
    echo_err(f"{len(chosen)} prompts to label in {out}: latentguard review {out} --guard {guard}")

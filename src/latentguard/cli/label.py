"""The verb ``label``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.loading import load_model
from latentguard.cli.options import DeviceMap, Dtype, Model, PromptSource, TextColumn
from latentguard.prompts import Columns, read_prompts


def label(
    prompts: PromptSource,
    out: Annotated[Path, typer.Option(help="JSON Lines file, for 'fit'.")],
    model: Model = "default",
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Ask MODEL each prompt and mark those that it refuses (column 'refused').

    A guard that is fitted on them has a refusal axis too. Replies are judged and dropped.

    Example: latentguard label prompts.jsonl --out labelled.jsonl
    """
    from latentguard.study.label_file import write_labels

    rows = read_prompts(prompts, columns=Columns(text=text_column))
    backend = load_model(model, dtype, device_map)
    with progress("label", len(rows)) as bar:
        counts = write_labels(backend, rows, out, progress=bar.advance)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    echo_err(f"{out}: {outcomes}.")

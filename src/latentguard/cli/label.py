"""The verb ``label``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_model, require_model
from latentguard.cli.options import DeviceMap, Dtype, Model, PromptSource, TextColumn
from latentguard.cli.outputs import output_file, warn_of_replacement
from latentguard.data.prompt_files import Columns, read_prompts
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel
    from latentguard.study.judge import Outcome


def label(
    prompts: PromptSource,
    out: Annotated[Path, typer.Option(help="JSON Lines file that 'latentguard fit' can read.")],
    model: Model = "default",
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Ask MODEL each prompt and mark those that it refuses (column 'refused').

    A guard that is fitted on the result also has a refusal axis. Replies are judged and not kept.

    Example: latentguard label prompts.jsonl --out labelled.jsonl
    """
    require_model(model)
    advice = f"Replies are kept in {out}.replies. Run the same command again to go on."
    with output_file(out), explain_interrupt(advice):
        rows = read_prompts(prompts, columns=Columns(text=text_column))
        warn_of_replacement(out)
        counts = _label(load_model(model, dtype, device_map), rows, out)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    echo_err(f"{out}: {outcomes}.")


def _label(model: ChatModel, prompts: list[Prompt], out: Path) -> dict[Outcome, int]:
    from latentguard.study.label_file import write_labels

    with progress("label", len(prompts)) as view:
        return write_labels(model, prompts, out, progress=view.advance)

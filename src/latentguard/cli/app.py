"""The Typer application that every verb joins."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Read a chat model's own belief of harmfulness, and guard the model with it.",
    epilog="Start with [bold]latentguard demo[/]. Prompts are JSON Lines (id, text, label, "
    "category), CSV, Parquet, plain text, '-' for standard input, or a Hub data set as "
    "org/name:split.",
)

"""The verb ``review``; heavy imports stay inside it."""

from __future__ import annotations

import getpass
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import guard_columns
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_guard_model, read_guard
from latentguard.cli.options import MovedModel, TextColumn
from latentguard.errors import require_extra


def review(  # noqa: PLR0913, PLR0917 (each is an option)
    source: Annotated[
        str, typer.Argument(help="File of prompts, or audit log with texts (--audit-texts).")
    ],
    out: Annotated[
        Path, typer.Option(help="Label file, JSON Lines; labels are appended to what it holds.")
    ],
    guard: Annotated[str, typer.Option(help="Guard folder, Hub id, or 'default'.")] = "default",
    reviewer: Annotated[
        str | None, typer.Option(help="Your name in the label file; default: your login name.")
    ] = None,
    adapt_out: Annotated[
        Path | None, typer.Option(help="Folder for the taught guard; default: LABELS-guard.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")
    ] = 8401,
    text_column: TextColumn = "text",
    model: MovedModel = None,
) -> None:
    """Label prompts on a page of this machine, one at a time, and teach the guard with the labels.

    The page is on 127.0.0.1 alone. The address with its token is printed once the prompts are
    scored. Each label is on the disk before the next prompt comes. Run the command again to go on.

    Example: latentguard review prompts.jsonl --out labels.jsonl
    """
    require_extra("fastapi", "serve", "latentguard review")
    require_extra("uvicorn", "serve", "latentguard review")
    from latentguard.review.desk import GuardDesk, local_review
    from latentguard.review.labels import LabelFile
    from latentguard.review.local import LocalServer
    from latentguard.review.scoring import read_source, score_items, scores_path

    loaded = read_guard(guard)
    prompts = read_source(source, replace(guard_columns(loaded, text_column), label=""))
    advice = f"Labels are in {out}. Run the same command again to go on."
    with closing(LabelFile(out)) as labels, explain_interrupt(advice):
        loaded, backend = load_guard_model(loaded, model)
        with progress("score", len(prompts)) as view:
            file = scores_path(out)
            items = score_items(loaded, backend, prompts, file, progress=view.advance)
        facts = dict(name=guard, source=source, reviewer=reviewer or _login_name())
        folder = adapt_out or out.with_name(f"{out.stem}-guard")
        page = local_review(GuardDesk(loaded, backend), items, labels, facts, folder)
        server = LocalServer(page, port)
        echo_err("Open this address in a browser. Control-C ends the review.")
        typer.echo(server.url)
        server.run()


def _login_name() -> str:
    """The login name; empty where there is none, as in some containers: the page asks then."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""

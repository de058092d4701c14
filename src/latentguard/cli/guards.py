"""The verbs ``guards`` and ``pull``; heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err
from latentguard.cli.options import Overwrite
from latentguard.cli.outputs import output_folder, require_no_guard
from latentguard.errors import GuardError


def guards(
    model: Annotated[
        str | None, typer.Option(help="Only guards of this model: a Hub id, or 'default'.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Only guards on this disk; does not ask the Hub.")
    ] = False,
) -> None:
    """List the guards that exist: in the package, on this disk and on the Hugging Face Hub.

    Those on the Hub are found by the tag 'latentguard' of their model cards.

    Example: latentguard guards --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from latentguard.guard.hub import hub_guards, local_guards

    listed_guards = [one for one in local_guards() if model in (None, one.model)]
    if not local:
        try:
            listed_guards += hub_guards(model)
        except GuardError as error:
            echo_err(f"Warning: {error}")
    for one in listed_guards:
        typer.echo(f"{one.name}\t{one.model}\t{one.place}")
    if not listed_guards:
        echo_err("No guards found. Fit one: latentguard fit --model MODEL --out FOLDER")


def pull(
    guard: Annotated[str, typer.Argument(help="Hub id, such as org/guard.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a copy; default: only the Hub's cache.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; default: the newest.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fetch a guard from the Hugging Face Hub, check it, and say what it promises.

    Example: latentguard pull org/guard --out guards/qwen
    """
    from latentguard.guard.hub import download_guard
    from latentguard.guard.latent_guard import LatentGuard

    if out is not None:
        require_no_guard(out, overwrite=overwrite)
    folder = download_guard(guard, revision=revision)
    loaded = LatentGuard.load(folder)
    if out is not None:
        with output_folder(out):
            loaded.save(out)
    typer.echo(f"{out or folder}\t{loaded.fingerprint.model}")
    typer.echo(f"Threshold {loaded.threshold:.6g}: {loaded.promise}.")

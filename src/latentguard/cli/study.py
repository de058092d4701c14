"""Verbs of the study; heavy imports stay inside them."""

from __future__ import annotations

from enum import StrEnum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.app import app
from latentguard.cli.console import load, note, progress
from latentguard.cli.options import DeviceMap, Dtype, Model, TextColumn
from latentguard.errors import LatentGuardError
from latentguard.prompts import Columns, read_prompts

if TYPE_CHECKING:
    from latentguard.report.document import Report


class Budget(StrEnum):
    """How much of the study is done."""

    paper = auto()
    small = auto()


@app.command()
def study(  # noqa: PLR0913, PLR0917 (the contract names these options)
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or 'default'.")],
    out: Annotated[Path, typer.Option(help="Report folder; its store lets a killed run go on.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this experiment alone, such as 'inversion'; repeatable."),
    ] = None,
    budget: Annotated[
        Budget, typer.Option(help="paper: the paper's n; small: what a laptop finishes.")
    ] = Budget.paper,
    config: Annotated[
        Path | None, typer.Option(help="TOML: settings, [data] pools, [judge] url and model.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="advbench.jsonl, alpaca_harmless.jsonl, ...; default: built-in set."),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Guard model to compare with, by id; repeatable.")
    ] = None,
    dtype: Dtype = "auto",
    show_prompts: Annotated[
        bool, typer.Option("--show-prompts", help="Show prompt texts in the figures.")
    ] = False,
) -> None:
    """Run every table and figure of the paper on MODEL; prints the report's path last.

    Call it again with the same --out to go on after a kill, or for other experiments: what the
    model held and said is kept there, and the report of the last call replaces the one before. The
    claims, with effect, interval, n and verdict, come first.
    """
    from latentguard.study.prompt_groups import read_pools
    from latentguard.study.run import STORE, prepare, require_known, run
    from latentguard.study.settings import read_settings, read_table

    require_known(only or ())
    settings = read_settings(config, "small" if budget is Budget.small else "paper")
    pools = read_pools(data_dir, read_table(config, "data"))
    judged = read_table(config, "judge")
    backend = load(model, dtype)
    with progress("study") as bar:
        ready = prepare(
            backend, out / STORE, settings, pools, step=bar.step, baselines=baseline, judged=judged
        )
        report = run(ready, only=only or (), show_prompts=show_prompts, say=note)
    report.save(out)
    _draw(report, out)
    typer.echo(out / "report.html")


@app.command()
def label(
    prompts: Annotated[str, typer.Argument(help="File, '-', or Hub data set.")],
    out: Annotated[Path, typer.Option(help="JSON Lines file, for 'fit'.")],
    model: Model = "default",
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Ask MODEL each prompt and mark those that it refuses (column 'refused').

    A guard that is fitted on them has a refusal axis too. Replies are judged and dropped.
    """
    from latentguard.study.labels import write_labels

    rows = read_prompts(prompts, columns=Columns(text=text_column))
    backend = load(model, dtype, device_map)
    with progress("label", len(rows)) as bar:
        counts = write_labels(backend, rows, out, progress=bar.advance)
    note(f"{out}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".")


def _draw(report: Report, out: Path) -> None:
    from latentguard.report.image_files import draw

    try:
        draw(report, out)
    except LatentGuardError as error:  # the page is there, and shows the same figures
        note(f"Warning: {error}")

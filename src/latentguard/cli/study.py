"""The verb ``study``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_model, require_model
from latentguard.cli.options import Budget, Dtype, Protocol
from latentguard.cli.outputs import output_folder, warn_of_replacement
from latentguard.errors import LatentGuardError, require_extra

if TYPE_CHECKING:
    from latentguard.report.document import Report


BUDGETS: dict[Budget, Literal["paper", "small"]] = {Budget.paper: "paper", Budget.small: "small"}
PROTOCOLS: dict[Protocol | None, Literal["controlled", "paper"]] = {
    Protocol.controlled: "controlled",
    Protocol.paper: "paper",
}


def study(  # noqa: PLR0913, PLR0917 (each is an option)
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or 'default'.")],
    out: Annotated[Path, typer.Option(help="Report folder; its store lets a killed run go on.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this experiment alone, such as 'inversion'; repeatable."),
    ] = None,
    budget: Annotated[
        Budget, typer.Option(help="paper: the paper's n; small: what a laptop finishes.")
    ] = Budget.paper,
    protocol: Annotated[
        Protocol | None,
        typer.Option(help="paper: as its authors ran it; controlled (default): stricter."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML: settings, [data] pools, [judge] url and model, [template] text."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with advbench.jsonl, ...; default: the built-in set."),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Guard model to compare with, by id; repeatable.")
    ] = None,
    dtype: Dtype = "auto",
    show_prompts: Annotated[
        bool,
        typer.Option(
            "--show-prompts", help="Show prompt texts in the figures, and tables of examples."
        ),
    ] = False,
) -> None:
    """Run every table and figure of the paper on MODEL; prints the report's path last.

    Run it again with the same --out to go on after a kill, or for other experiments. States and
    replies are kept there, and the new report replaces the one before. It begins with the claims,
    each with effect, interval, n and verdict. --data-dir takes the folder of 'latentguard data
    fetch'.

    Example: latentguard study default --out reports/smollm2 --budget small
    """
    require_extra("plotly", "report", "latentguard study")
    require_model(model)
    from latentguard.study.prompt_groups import read_pools
    from latentguard.study.run import STORE, prepare, require_known, run
    from latentguard.study.settings import read_settings, read_table

    require_known(only or ())
    settings = read_settings(config, BUDGETS[budget], PROTOCOLS.get(protocol))
    pools = read_pools(data_dir, read_table(config, "data"))
    tables = {name: read_table(config, name) for name in ("judge", "template")}
    kept = f"Replies and states are kept in {out / STORE}. Run the same command again to go on."
    with output_folder(out), explain_interrupt(kept):
        warn_of_replacement(out)
        backend = load_model(model, dtype)
        with progress("study") as view:
            ready = prepare(
                backend,
                out / STORE,
                settings,
                pools,
                step=view.step,
                baselines=baseline,
                tables=tables,
            )
            report = run(ready, only=only or (), show_prompts=show_prompts, say=echo_err)
        report.save(out)
        _draw(report, out)
    typer.echo(out / "report.html")


def _draw(report: Report, out: Path) -> None:
    from latentguard.report.image_files import write_pictures

    try:
        write_pictures(report, out)
    except LatentGuardError as error:  # the page is there, and shows the same figures
        echo_err(f"Warning: {error}")

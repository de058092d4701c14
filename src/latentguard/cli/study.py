"""The verb ``study``; heavy imports stay inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_model, require_model
from latentguard.cli.options import Budget, DeviceMap, Dtype, Protocol
from latentguard.cli.outputs import output_folder, save_report, warn_of_replacement
from latentguard.errors import require_extra

if TYPE_CHECKING:
    from latentguard.study.prompt_groups import PromptPools
    from latentguard.study.settings import Settings


BUDGETS: dict[Budget, Literal["paper", "small"]] = {Budget.paper: "paper", Budget.small: "small"}
PROTOCOLS: dict[Protocol | None, Literal["controlled", "paper"]] = {
    Protocol.controlled: "controlled",
    Protocol.paper: "paper",
}


def study(  # noqa: PLR0913, PLR0917 (each is an option)
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Hub ids, folders, GGUF files, or 'default'; several are compared.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Report folder; a killed run continues from what is in it.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this experiment, such as 'inversion'; repeatable."),
    ] = None,
    budget: Annotated[
        Budget,
        typer.Option(help="paper: as many prompts as the paper; small: what a laptop can do."),
    ] = Budget.paper,
    protocol: Annotated[
        Protocol | None,
        typer.Option(
            help="paper: as the authors ran it; controlled (default): stricter, more controls."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file: settings, [data], [judge] and [rubric] (url, model), [template]."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with advbench.jsonl, ...; default: the built-in set."),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Guard model to compare with, by id; repeatable.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    show_prompts: Annotated[
        bool,
        typer.Option(
            "--show-prompts", help="Show prompt texts in the figures, and tables of examples."
        ),
    ] = False,
) -> None:
    """Run every table and figure of the paper on MODEL; prints the report's path last.

    The report begins with the claims, each with effect, interval, n and verdict. A killed run
    continues when it is called again with the same --out, and other experiments can be added that
    way. The folder may be moved to another machine in between.

    It first asks a few prompts. Then it says how many of them the model refuses, which claims this
    can decide, and how long the study will take.

    With a [rubric] in --config a reply counts as accepted only if the model at its url says that it
    helps. Without [judge] and [rubric], prompts and replies are sent nowhere. The key comes from
    LATENTGUARD_JUDGE_KEY.

    Several models are studied one after the other, each in a folder of its own in --out. The report
    in --out then compares them.

    Example: latentguard study default --out reports/smollm2 --budget small
    """
    require_extra("plotly", "report", "latentguard study")
    for model in models:
        require_model(model)
    from latentguard.study.prompt_groups import read_pools
    from latentguard.study.run import require_known
    from latentguard.study.settings import read_settings, read_table

    require_known(only or ())
    plan = _Plan(
        settings=read_settings(config, BUDGETS[budget], PROTOCOLS.get(protocol)),
        pools=read_pools(data_dir, read_table(config, "data")),
        tables={name: read_table(config, name) for name in ("judge", "rubric", "template")},
        only=tuple(only or ()),
        baselines=tuple(baseline or ()),
        show_prompts=show_prompts,
        dtype=dtype,
        device_map=device_map,
    )
    if len(models) == 1:
        _study(models[0], out, plan)
    else:
        _study_each(models, out, plan)
    typer.echo(out / "report.html")


@dataclass(frozen=True)
class _Plan:
    """What is done with each model."""

    settings: Settings
    pools: PromptPools
    tables: Mapping[str, Mapping[str, Any]]
    only: tuple[str, ...]
    baselines: tuple[str, ...]
    show_prompts: bool
    dtype: str
    device_map: str | None


def _study_each(models: Sequence[str], out: Path, plan: _Plan) -> None:
    """Study one model after the other, each in a folder below, then compare the reports."""
    from latentguard.report.document import file_names
    from latentguard.study.compare import compare, read_reports

    folders = [out / name for name in file_names([Path(model).name for model in models])]
    for model, folder in zip(models, folders, strict=True):
        _study(model, folder, plan)
    with output_folder(out):
        warn_of_replacement(out)
        save_report(compare(read_reports(folders)), out)


def _study(model: str, out: Path, plan: _Plan) -> None:
    from latentguard.study.forecast import forecast
    from latentguard.study.rubric import SHORT
    from latentguard.study.run import STORE, prepare, run

    advice = f"Replies and states are kept in {out / STORE}. Run the same command again to go on."
    if plan.tables["rubric"] and plan.settings.reply_tokens < SHORT:
        echo_err(
            f"Warning: replies of {plan.settings.reply_tokens} tokens can hardly help; set "
            f"'reply_tokens' to {SHORT} or more in --config to judge them by a rubric."
        )
    with output_folder(out), explain_interrupt(advice):
        warn_of_replacement(out)
        backend = load_model(model, plan.dtype, plan.device_map)
        with progress("study") as view:
            ready = prepare(
                backend,
                out / STORE,
                plan.settings,
                plan.pools,
                step=view.step,
                baselines=plan.baselines,
                tables=plan.tables,
            )
            ahead = forecast(ready.model, ready.pools, ready.settings, only=plan.only)
            for line in ahead.lines(plan.only):
                echo_err(line)
            report = run(ready, only=plan.only, show_prompts=plan.show_prompts, say=echo_err)
        save_report(report, out)

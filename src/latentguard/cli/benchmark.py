"""The verb ``benchmark``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import (
    load_cascade,
    load_guard_model,
    read_cascade,
    read_guard,
    warn_if_uncalibrated,
)
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    GuardSource,
    MovedModel,
    SecondOpinionSource,
)
from latentguard.cli.outputs import output_folder, warn_of_replacement


def benchmark(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    data_dir: Annotated[
        Path,
        typer.Option(help="Folder with the sets, from 'latentguard data fetch' or as published."),
    ] = Path("data"),
    out: Annotated[
        Path, typer.Option(help="Report folder; a killed run continues from what is in it.")
    ] = Path("benchmark"),
    only: Annotated[
        list[str] | None, typer.Option(help="Only this set, such as 'toxicchat'; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each set, at most.")] = None,
    second_opinion: SecondOpinionSource = None,
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
) -> None:
    """Run GUARD over the standard prompt suite, beside published figures of other guards.

    Sets: ToxicChat, OpenAI moderation, Aegis, Aegis 2, SimpleSafetyTests, HarmBench, WildGuardTest,
    XSTest, OR-Bench. Get them with 'latentguard data fetch'. Missing sets are
    named, and the others are measured. OUT gets report.html, report.md, report.json and
    figures.json; no prompt text is written. With --second-opinion, decisions are those of both
    together.

    Example: latentguard benchmark guards/qwen --data-dir data --out reports/benchmark
    """
    from latentguard.benchmark.report import benchmark_report, markdown, save_benchmark
    from latentguard.benchmark.run import load_suite, run_benchmark

    sets, missing = load_suite(data_dir, only or (), limit=limit)
    for one in missing:
        echo_err(f"Missing: {one.title}. {one.reason}")
    advice = f"Verdicts are kept in {out}. Run the same command again to go on."
    with output_folder(out), explain_interrupt(advice):
        warn_of_replacement(out)
        loaded = read_guard(guard)
        warn_if_uncalibrated(loaded, guard)
        cascade = read_cascade(loaded, guard, second_opinion) if second_opinion else None
        loaded, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        asked = load_cascade(cascade, loaded) if cascade else loaded
        with progress("benchmark") as view:
            result = run_benchmark(asked, backend, sets, out, missing=missing, step=view.step)
        page = save_benchmark(result, out)
    typer.echo(markdown(benchmark_report(result)))
    echo_err(f"Report: {page}")

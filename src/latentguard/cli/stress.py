"""The verb that stresses a guard; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import progress
from latentguard.cli.inputs import read_side
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_guard_model, read_guard
from latentguard.cli.options import (
    AllowMismatch,
    Amount,
    DeviceMap,
    GuardSource,
    MovedModel,
    TextColumn,
)
from latentguard.cli.outputs import output_folder, warn_of_replacement
from latentguard.data.builtin import load_contrast
from latentguard.data.prompt_files import Columns
from latentguard.errors import LatentGuardError, require_extra


def stress(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    out: Annotated[
        Path, typer.Option(help="Report folder; a killed run continues from what is in it.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this attack or family, such as 'homoglyphs'; repeatable."),
    ] = None,
    budget: Annotated[
        Amount,
        typer.Option(
            help="small: 24 prompts a class, takes minutes; full: all prompts, up to 8,000 tokens "
            "of padding, fine-tuning."
        ),
    ] = Amount.small,
    harmful: Annotated[
        list[str] | None,
        typer.Option(help="Harmful prompts; repeatable. Default: the built-in test split."),
    ] = None,
    harmless: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmless prompts; repeatable. Give --harmful and --harmless, or neither."
        ),
    ] = None,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
) -> None:
    """Attack GUARD: changed texts, other languages, padding, changed weights; prints the report.

    Each attack is made on harmful and on harmless prompts. A killed run continues when it is called
    again with the same --out, and other attacks can be added that way. Families: special tokens,
    template imitation, homoglyphs, unseen characters, case and spacing, encodings, two requests,
    wrappers, foreign frames, padding, translations, changed weights.

    Example: latentguard stress guards/qwen --out reports/stress
    """
    from latentguard.robustness.run import STORE, StressPlan, require_attack_names, run_stress
    from latentguard.robustness.suite import BudgetName
    from latentguard.robustness.weights import GuardUnderTest
    from latentguard.study.cached_model import CachedModel
    from latentguard.study.store import Store

    require_extra("plotly", "report", "latentguard stress")
    require_attack_names(only or ())
    if bool(harmful) != bool(harmless):
        raise LatentGuardError(
            "Give both --harmful and --harmless, or neither for the built-in test split; found one."
        )
    columns = Columns(text=text_column)
    sides = read_side(harmful, columns, harmful=True)
    sides += read_side(harmless, columns, harmful=False)
    amount: BudgetName = "small" if budget is Amount.small else "full"
    plan = StressPlan(tuple(sides or load_contrast("test")), amount, tuple(only or ()))
    advice = f"Scores are kept in {out / STORE}. Run the same command again to go on."
    with output_folder(out), explain_interrupt(advice):
        warn_of_replacement(out)
        loaded, backend = load_guard_model(
            read_guard(guard), model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        with progress("stress") as view:
            cached = CachedModel(backend, Store(out / STORE), step=view.step)
            report = run_stress(GuardUnderTest(loaded, backend, cached), plan)
        page = report.save(out) / "report.html"
    typer.echo(page)

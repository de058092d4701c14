"""The verb ``calibrate``; heavy imports stay inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import count_each, echo_changes, echo_err, progress
from latentguard.cli.inputs import read_side
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_guard_model, read_guard, save_guard
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    GuardOut,
    GuardSource,
    HarmlessTraffic,
    MovedModel,
    TextColumn,
)
from latentguard.cli.outputs import changed_guard
from latentguard.data.builtin import load_traffic
from latentguard.errors import PromptError
from latentguard.guard.leakage import exclude_training_prompts
from latentguard.prompt_files import Columns
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.models.chat_model import ChatModel


def calibrate(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    harmless: HarmlessTraffic = None,
    harmful: Annotated[
        list[str] | None,
        typer.Option(help="Harmful prompts, not those fitted on: calibrates probabilities, too."),
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="Rate to keep; 0.01, or 0.05 with the built-in prompts.")
    ] = None,
    review_fpr: Annotated[
        float | None, typer.Option(help="Higher rate up to which prompts are to be reviewed.")
    ] = None,
    segment_column: Annotated[
        str | None,
        typer.Option(help="Column with the traffic segment: a threshold for each."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the Clopper-Pearson bounds.")] = 0.95,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
    out: GuardOut = None,
) -> None:
    """Set the guard's threshold so that it flags at most MAX_FPR of harmless prompts.

    Rows with a column 'refused' (see 'latentguard label') calibrate the quadrants of a guard that
    has a refusal axis. A guard that was fitted with --long has a second threshold, for long prompts
    and chats: fit picks it on built-in texts, and those in HARMLESS move it, if there are any.
    With --harmful, GUARD/calibration/report.html shows how reliable probabilities are.

    Example: latentguard calibrate guards/qwen --harmless traffic.jsonl --max-fpr 0.01
    """
    from latentguard.guard.evaluation import compare
    from latentguard.guard.thresholds import Rates

    columns = Columns(text=text_column, segment=segment_column or "")
    rate = max_fpr if max_fpr is not None else (0.01 if harmless else 0.05)
    rates = Rates(rate, review_fpr, confidence)
    with changed_guard(guard, out) as target, explain_interrupt(f"{guard} is as it was."):
        loaded = read_guard(guard)
        prompts = _calibration_prompts(loaded, harmless, harmful, columns)
        used = loaded.calibration_prompts(prompts, rates)  # says what is wrong at once
        bound, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        with progress("calibrate", len(used)) as view:
            scored = list(count_each(bound.score_prompts(backend, used), view.advance))
        before = [bound.combine(one).verdict for one in scored]
        calibrated = bound.calibrate_from(used, before, rates, column=segment_column)
        after = [calibrated.combine(one).verdict for one in scored]
        if harmless:  # the built-in ones are no traffic: windows keep what fit picked
            own = [p for p in prompts if not p.harmful]
            calibrated = _calibrate_long(calibrated, backend, own, rate, confidence)
        save_guard(calibrated, target, report=bool(harmful))
    if loaded.bound is not None:
        echo_err(f"Replaced: threshold {loaded.threshold:.6g}, {loaded.promise}.")
    typer.echo(f"Threshold {calibrated.threshold:.6g}: {calibrated.promise}.")
    if harmful:
        note = (
            "On the prompts that calibrated it; on others of the same kind it does a little worse."
        )
        echo_changes(compare(used, before, after), note)
    for paragraph in calibrated.notes:
        typer.echo(f"\n{paragraph}")


def _calibration_prompts(
    guard: LatentGuard,
    harmless: list[str] | None,
    harmful: list[str] | None,
    columns: Columns,
) -> list[Prompt]:
    """The prompts that may calibrate: not those that a pack was trained on."""
    prompts = read_side(harmless, columns, harmful=False)
    if columns.segment and not any(p.segment for p in prompts):
        raise PromptError(
            f"--segment-column names '{columns.segment}', which no harmless prompt has; look "
            "at its spelling, and give the prompts with --harmless."
        )
    if not harmless:
        prompts = [p for p in load_traffic("validation") if not p.harmful]
    prompts += read_side(harmful, columns, harmful=True)
    excluded, allowed = exclude_training_prompts(prompts, guard.pack_training_prompts)
    if excluded:
        echo_err(f"{len(excluded)} of these prompts are left out: packs were trained on them.")
    return allowed


def _calibrate_long(
    guard: LatentGuard, backend: ChatModel, prompts: list[Prompt], rate: float, confidence: float
) -> LatentGuard:
    """The guard with the threshold of its chunking set from the long ones of the prompts."""
    from latentguard.guard.chunk_calibration import calibrate_chunking
    from latentguard.stats.bounds import smallest_n

    long = [p for p in prompts if guard.is_chunked(p)]
    if not long:
        return guard
    if len(long) < (enough := smallest_n(rate, confidence)):
        echo_err(
            f"The threshold of long prompts and chats stays as it was: found {len(long)}, and "
            f"{rate:.2%} needs {enough}."
        )
        return guard
    with progress("long prompts", len(long)) as view:
        return calibrate_chunking(
            backend, guard, long, max_fpr=rate, confidence=confidence, progress=view.advance
        )

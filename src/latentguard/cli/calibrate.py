"""The verb ``calibrate``; heavy imports stay inside it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import count_each, echo_changes, echo_err, progress
from latentguard.cli.early_exit import calibrate_guard_exit
from latentguard.cli.inputs import read_side, read_source, require_distinct
from latentguard.cli.loading import load_guard_model, read_guard, save_guard
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    GuardOut,
    GuardSource,
    HarmlessTraffic,
    MovedModel,
    SecondOpinionSource,
    TextColumn,
)
from latentguard.cli.outputs import GuardChange, changed_guard
from latentguard.cli.reply_calibration import calibrate_guard_replies
from latentguard.data.builtin import load_guard_prompts
from latentguard.data.prompt_files import Columns
from latentguard.errors import GuardError, PromptError
from latentguard.guard.leakage import exclude_training_prompts
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.guard.cascade import Cascade
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.guard.operating_point import Goal
    from latentguard.guard.second_opinion import SecondOpinion
    from latentguard.guard.thresholds import Rates
    from latentguard.guard.verdict import Verdict
    from latentguard.models.chat_model import ChatModel

IN_SAMPLE = "On the prompts that calibrated it; on others of the same kind it does a little worse."


def calibrate(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    harmless: HarmlessTraffic = None,
    harmful: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmful prompts that the guard was not fitted on: also calibrates probabilities."
        ),
    ] = None,
    replies: Annotated[
        list[str] | None,
        typer.Option(help="Harmless replies (prompt, reply): sets the threshold for replies."),
    ] = None,
    early_exit: Annotated[
        float | None,
        typer.Option(
            help="Let harmless prompts leave early: share of flagged ones that this may lose."
        ),
    ] = None,
    max_fpr: Annotated[
        float | None,
        typer.Option(
            help="False-positive rate to keep; default: 0.01, or 0.05 with the built-in prompts. "
            "With --balanced or --cost-ratio: the highest rate that may be chosen; default: 0.5."
        ),
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Choose the rate with the best F1.")
    ] = False,
    cost_ratio: Annotated[
        float | None,
        typer.Option(
            help="Choose the rate with the lowest cost, if a miss costs so many false alarms."
        ),
    ] = None,
    harmful_share: Annotated[
        float | None,
        typer.Option(
            help="Share of harmful prompts in your traffic; default: as in the labelled prompts."
        ),
    ] = None,
    traffic: Annotated[
        list[str] | None,
        typer.Option(
            help="Unlabelled prompts of your traffic: adapts the threshold to their scores."
        ),
    ] = None,
    review_fpr: Annotated[
        float | None,
        typer.Option(
            help="Rate of a second, lower threshold; scores between the two are for review."
        ),
    ] = None,
    second_opinion: SecondOpinionSource = None,
    segment_column: Annotated[
        str | None,
        typer.Option(help="Column with the traffic segment; each gets a threshold of its own."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Confidence of the promised rates (Clopper-Pearson bounds).")
    ] = 0.95,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
    out: GuardOut = None,
) -> None:
    """Set the guard's threshold so that it flags at most MAX_FPR of harmless prompts.

    --max-fpr keeps a rate (the default). --balanced takes the best F1 on labelled prompts, and
    --cost-ratio 5 the lowest cost if a miss is as bad as five false alarms. --traffic adapts any of
    them to unlabelled traffic, which may hold harmful prompts; the result is then an estimate and
    not a promise. Every verdict names the choice (operating_point).

    Rows with a column 'refused' (see 'latentguard label') calibrate the quadrants of a guard that
    has a refusal axis. A guard that was fitted with --long has a second threshold for long prompts
    and chats; long texts in --harmless move it.
    With --harmful, GUARD/calibration/report.html shows how reliable probabilities are.

    With --second-opinion the rate is that of the guard and the second opinion together. It is asked
    of harmless prompts between the thresholds; --review-fpr is their share (default: 0.2).

    With --early-exit 0.05 surely harmless prompts of files and corpora leave the pass at a third of
    the depth. Of the prompts that the guard flags or sends to review, at most 5 % are lost by it.
    Set the thresholds first. Give --harmless and --harmful prompts like your traffic.

    With --replies it sets the threshold for replies and leaves the other one: at most MAX_FPR of
    harmless replies are flagged at any of their tokens. The guard must be fitted with --replies.

    Example: latentguard calibrate guards/qwen --harmless traffic.jsonl --max-fpr 0.01
    """
    from latentguard.guard.evaluation import compare

    change = GuardChange(guard, out, model, device_map, allow_mismatch=allow_mismatch)
    columns = Columns(text=text_column, segment=segment_column or "")
    if replies:
        _require_alone("--replies", harmless, harmful, second_opinion, early_exit)
        calibrate_guard_replies(change, replies, 0.01 if max_fpr is None else max_fpr, confidence)
        return
    if early_exit is not None:
        rate_options = (max_fpr, balanced or None, cost_ratio, harmful_share, review_fpr)
        _require_alone("--early-exit", *rate_options, traffic, second_opinion)
        read = partial(
            _calibration_prompts,
            harmless=harmless,
            harmful=harmful,
            columns=columns,
            needs_harmful=True,
        )
        calibrate_guard_exit(change, read, early_exit, confidence)
        return
    rates = _rates(
        max_fpr,
        review_fpr,
        confidence,
        _goal(balanced, cost_ratio, harmful_share),
        has_second=bool(second_opinion),
        has_own=bool(harmless),
    )
    _require_options(rates, traffic, harmless, harmful, segment_column)
    _require_rate_alone(second_opinion, rates, traffic, segment_column)
    with changed_guard(guard, out) as target:
        loaded = _read_guard(guard)
        both = rates.goal.needs_harmful or bool(traffic)
        prompts = _calibration_prompts(loaded, harmless, harmful, columns, needs_harmful=both)
        used = loaded.calibration_prompts(prompts, rates)  # says what is wrong at once
        live = _traffic_prompts(loaded, traffic, used, columns)
        second = _open_second(used, rates, second_opinion) if second_opinion else None
        bound, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        with progress("calibrate", len(used) + len(live)) as view:
            scored = list(count_each(bound.score_prompts(backend, used), view.advance))
            before = [bound.combine(one).verdict for one in scored]
            calibrated = bound.calibrate_from(used, before, rates, column=segment_column)
            unlabelled = list(calibrated.scan(backend, live, progress=view.advance))
        if live:
            calibrated = _adapt(calibrated, used, before, unlabelled, rates)
        cascade = _calibrate_with(second, calibrated, used, before) if second else None
        calibrated = cascade.guard if cascade else calibrated
        after = [calibrated.combine(one).verdict for one in scored]
        calibrated = _calibrate_long(calibrated, backend, prompts, rates, has_own=bool(harmless))
        save_guard(calibrated, target, report=bool(harmful))
    _echo_threshold(loaded, calibrated)
    if any(prompt.harmful for prompt in used):
        after = cascade.decide(used, after) if cascade else after
        echo_changes(compare(used, before, after), IN_SAMPLE)
    for paragraph in calibrated.notes:
        typer.echo(f"\n{paragraph}")


def _read_guard(source: str) -> LatentGuard:
    """The guard; one that learned labels comes with a warning: the next ones undo a calibration."""
    guard = read_guard(source)
    if guard.adaptation is not None:
        echo_err(
            "Warning: 'adapt' and 'adapt --forget' begin with the guard before it learned labels, "
            "so this calibration lasts until then. 'adapt --max-fpr' keeps a rate."
        )
    return guard


def _echo_threshold(before: LatentGuard, after: LatentGuard) -> None:
    if before.bound is not None:
        echo_err(f"Replaced: threshold {before.threshold:.6g}, {before.promise}.")
    typer.echo(f"Threshold {after.threshold:.6g}: {after.promise}.")


def _require_alone(option: str, *others: object) -> None:
    """Say that an option calibrates a part of the guard by itself."""
    if any(other not in (None, []) for other in others):
        raise typer.BadParameter("it is calibrated by itself", param_hint=option)


def _goal(balanced: bool, cost_ratio: float | None, harmful_share: float | None) -> Goal:
    """What the threshold is for."""
    from latentguard.guard.operating_point import Goal

    if balanced and cost_ratio is not None:
        raise GuardError("--balanced and --cost-ratio are two operating points; give one of them.")
    if cost_ratio is not None:
        return Goal("cost-ratio", cost_ratio, harmful_share)
    return Goal("balanced" if balanced else "max-fpr", None, harmful_share)


def _rates(
    max_fpr: float | None,
    review_fpr: float | None,
    confidence: float,
    goal: Goal,
    *,
    has_second: bool,
    has_own: bool,
) -> Rates:
    """The rates to keep, each with its default."""
    from latentguard.guard.cascade import REVIEW_FPR
    from latentguard.guard.operating_point import RATES
    from latentguard.guard.thresholds import Rates

    default = RATES[-1] if goal.needs_harmful else (0.01 if has_own else 0.05)
    rate = max_fpr if max_fpr is not None else default
    if goal.needs_harmful and review_fpr is not None and max_fpr is None:
        rate = max((one for one in RATES if one < review_fpr), default=RATES[0])
    if has_second and review_fpr is None and not goal.needs_harmful:
        review_fpr = REVIEW_FPR
    return Rates(rate, review_fpr, confidence, goal)


def _require_options(
    rates: Rates,
    traffic: list[str] | None,
    harmless: list[str] | None,
    harmful: list[str] | None,
    segment_column: str | None,
) -> None:
    """Say which options do not go together."""
    if rates.goal.needs_harmful and harmless and not harmful:
        raise GuardError(
            f"The operating point '{rates.goal.name}' weighs misses against false alarms on "
            "prompts of one kind: give harmful ones as well, with --harmful."
        )
    if traffic and segment_column:
        raise GuardError(
            "--traffic moves the common threshold alone; leave --segment-column out, or calibrate "
            "each segment on harmless prompts of its own."
        )
    if rates.goal.harmful_share is not None and not (traffic or rates.goal.needs_harmful):
        raise GuardError("--harmful-share belongs to --balanced, --cost-ratio or --traffic.")


def _require_rate_alone(
    second_opinion: str | None,
    rates: Rates,
    traffic: list[str] | None,
    segment_column: str | None,
) -> None:
    """Say which options do not go with a second opinion."""
    if second_opinion is None:
        return
    if traffic or segment_column or rates.goal.needs_harmful:
        raise GuardError(
            "--second-opinion calibrates one rate on harmless prompts; leave --traffic, "
            "--segment-column, --balanced and --cost-ratio out."
        )


def _open_second(prompts: list[Prompt], rates: Rates, source: str) -> SecondOpinion:
    """The second opinion, loaded, once there are prompts enough."""
    from latentguard.guard.second_opinion import open_second_opinion
    from latentguard.stats.bounds import require_enough_for_two

    harmless = sum(not prompt.harmful for prompt in prompts)
    require_enough_for_two(harmless, rates.block, rates.confidence)
    second = open_second_opinion(source)
    echo_err(f"Loading the second opinion, {second.name} ...")
    second.load()
    return second


def _calibrate_with(
    second: SecondOpinion, guard: LatentGuard, prompts: list[Prompt], verdicts: list[Verdict]
) -> Cascade:
    from latentguard.guard.cascade import calibrate_cascade

    with progress("second opinion") as view:
        cascade = calibrate_cascade(guard, second, prompts, verdicts, progress=view.advance)
    if not cascade.has_band:
        echo_err(
            "Warning: the second opinion blocks so many harmless prompts that it is never asked; "
            "the guard alone catches more."
        )
    return cascade


def _calibration_prompts(
    guard: LatentGuard,
    harmless: list[str] | None,
    harmful: list[str] | None,
    columns: Columns,
    *,
    needs_harmful: bool,
) -> list[Prompt]:
    """The prompts that may calibrate: not those that a pack was trained on."""
    prompts = read_side(harmless, columns, harmful=False)
    if columns.segment and not any(p.segment for p in prompts):
        raise PromptError(
            f"--segment-column names '{columns.segment}', which no harmless prompt has; look "
            "at its spelling, and give the prompts with --harmless."
        )
    if not harmless:
        prompts = [p for p in load_guard_prompts("validation") if not p.harmful]
    prompts += read_side(harmful, columns, harmful=True)
    if needs_harmful and not harmful:
        echo_err("The harmful prompts are built-in ones; give your own with --harmful.")
        prompts += [p for p in load_guard_prompts("validation") if p.harmful]
    excluded, allowed = exclude_training_prompts(prompts, guard.pack_training_prompts)
    if excluded:
        echo_err(f"{len(excluded)} of these prompts are left out: packs were trained on them.")
    return allowed


def _traffic_prompts(
    guard: LatentGuard, traffic: list[str] | None, used: list[Prompt], columns: Columns
) -> list[Prompt]:
    """The unlabelled prompts that are not read by chunks; labels in the files are not read."""
    from latentguard.guard.traffic import require_traffic

    if not traffic:
        return []
    require_distinct(traffic)
    plain = replace(columns, label="")
    prompts = [p for source in traffic for p in read_source(source, plain, None)]
    short = [p for p in prompts if not guard.is_chunked(p)]
    harmful = sum(bool(p.harmful) for p in used)
    require_traffic(len(used) - harmful, harmful, len(short))
    return short


def _adapt(
    guard: LatentGuard,
    prompts: list[Prompt],
    verdicts: list[Verdict],
    unlabelled: list[Verdict],
    rates: Rates,
) -> LatentGuard:
    from latentguard.guard.traffic import adapt_to_traffic

    sides: dict[bool, list[float]] = {True: [], False: []}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        sides[bool(prompt.harmful)].append(verdict.score)
    live = [verdict.score for verdict in unlabelled]
    return adapt_to_traffic(guard, sides[False], sides[True], live, rates)


def _calibrate_long(
    guard: LatentGuard, backend: ChatModel, prompts: list[Prompt], rates: Rates, *, has_own: bool
) -> LatentGuard:
    """The guard with the threshold of its chunking moved, too.

    - The user's long prompts move it, where there are enough.
    - Built-in texts move it to a rate that was chosen.
    - Else it stays as fit picked it: built-in prompts are no traffic.
    """
    from latentguard.guard.chunk_calibration import calibrate_chunking
    from latentguard.guard.chunk_texts import CALIBRATION_TEXTS, harmless_texts
    from latentguard.stats.bounds import smallest_n

    if guard.chunking is None or guard.bound is None:
        return guard
    rate = guard.bound.max_fpr
    long = [p for p in prompts if not p.harmful and guard.is_chunked(p)] if has_own else []
    enough = smallest_n(rate, rates.confidence)
    if long and len(long) < enough:
        echo_err(
            f"The threshold of long prompts and chats stays as it was: found {len(long)}, and "
            f"{rate:.2%} needs {enough}."
        )
        return guard
    if not long and rates.goal.needs_harmful:
        long = harmless_texts("validation", CALIBRATION_TEXTS, guard.chunking.longer_than)
    if len(long) < enough:
        return guard
    with progress("long prompts", len(long)) as view:
        return calibrate_chunking(
            backend,
            guard,
            long,
            max_fpr=rate,
            confidence=rates.confidence,
            progress=view.advance,
        )

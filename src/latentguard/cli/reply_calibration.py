"""``calibrate --replies``; heavy imports stay inside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import require_distinct
from latentguard.cli.loading import load_guard_model, read_guard, save_guard
from latentguard.cli.outputs import changed_guard
from latentguard.data.prompt_files import read_replies


@dataclass(frozen=True)
class ReplySource:
    """Which guard is calibrated, and where it goes."""

    guard: str
    """A folder, a Hub id, or ``default``."""

    out: Path | None
    """Where the changed guard is written; None changes it in place."""

    model: str | None
    """Where its model is, if it has moved."""

    device_map: str | None
    """How its model is placed."""

    allow_mismatch: bool
    """Go on with another model."""


def calibrate_guard_replies(
    source: ReplySource, files: list[str], max_fpr: float, confidence: float
) -> None:
    """Set the threshold for replies of a guard, and say what it promises.

    Raises:
        LatentGuardError: if the guard does not judge replies, or there are too few.
    """
    from latentguard.guard.reply_fitting import calibrate_replies

    require_distinct(files)
    with changed_guard(source.guard, source.out) as target:
        loaded = read_guard(source.guard)
        loaded.require_reply_probe()
        rows = [reply for file in files for reply in read_replies(file)]
        harmless = [reply for reply in rows if not reply.harmful]
        if left_out := len(rows) - len(harmless):
            echo_err(f"{left_out} of {len(rows)} replies are labelled harmful: left out.")
        bound, backend = load_guard_model(
            loaded,
            source.model,
            allow_mismatch=source.allow_mismatch,
            device_map=source.device_map,
        )
        how = dict(max_fpr=max_fpr, confidence=confidence)
        with progress("replies", len(harmless)) as view:
            calibrated = calibrate_replies(backend, bound, harmless, progress=view.advance, **how)
        save_guard(calibrated, target)
    for paragraph in calibrated.require_reply_probe().notes():
        typer.echo(paragraph)

"""``calibrate --replies``; heavy imports stay inside it."""

from __future__ import annotations

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import require_distinct
from latentguard.cli.loading import load_guard_model, read_guard, save_guard
from latentguard.cli.outputs import GuardChange, changed_guard
from latentguard.data.prompt_files import read_replies


def calibrate_guard_replies(
    change: GuardChange, files: list[str], max_fpr: float, confidence: float
) -> None:
    """Set the threshold for replies of a guard, and say what it promises.

    Raises:
        LatentGuardError: if the guard does not judge replies, or there are too few.
    """
    from latentguard.guard.reply_fitting import calibrate_replies

    require_distinct(files)
    with changed_guard(change.guard, change.out) as target:
        loaded = read_guard(change.guard)
        loaded.require_reply_probe()
        rows = [reply for file in files for reply in read_replies(file)]
        harmless = [reply for reply in rows if not reply.harmful]
        if left_out := len(rows) - len(harmless):
            echo_err(f"{left_out} of {len(rows)} replies are labelled harmful: left out.")
        bound, backend = load_guard_model(
            loaded,
            change.model,
            allow_mismatch=change.allow_mismatch,
            device_map=change.device_map,
        )
        how = dict(max_fpr=max_fpr, confidence=confidence)
        with progress("replies", len(harmless)) as view:
            calibrated = calibrate_replies(backend, bound, harmless, progress=view.advance, **how)
        save_guard(calibrated, target)
    for paragraph in calibrated.require_reply_probe().notes():
        typer.echo(paragraph)

"""``calibrate --early-exit``; heavy imports stay inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.loading import load_guard_model, read_guard, save_guard
from latentguard.cli.outputs import GuardChange, changed_guard
from latentguard.data.builtin import load_training_rows

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.prompts import Prompt

TRAINING_ROWS = 2000
"""Built-in prompts that the estimate is fitted on."""


def calibrate_guard_exit(
    change: GuardChange,
    read_prompts: Callable[[LatentGuard], list[Prompt]],
    max_lost: float,
    confidence: float,
) -> None:
    """Let surely harmless prompts leave the pass early, and say what that may cost.

    Args:
        change: Which guard.
        read_prompts: Gives prompts like the traffic to come, harmful ones too.
        max_lost: Share of the prompts that the whole pass does not allow which may leave.
        confidence: Of the bound.

    Raises:
        LatentGuardError: if the guard cannot have an early exit, or the prompts do not suffice.
    """
    from latentguard.guard.early_reading import calibrate_early_exit, require_early_exit

    with changed_guard(change.guard, change.out) as target:
        loaded = replace(read_guard(change.guard), early_exit=None)
        require_early_exit(loaded, max_lost)
        prompts = read_prompts(loaded)
        bound, backend = load_guard_model(
            loaded,
            change.model,
            allow_mismatch=change.allow_mismatch,
            device_map=change.device_map,
        )
        training = load_training_rows(TRAINING_ROWS)
        with progress("early exit", len(training) + len(prompts)) as view:
            early = calibrate_early_exit(
                bound,
                backend,
                training,
                prompts,
                max_lost=max_lost,
                confidence=confidence,
                progress=view.advance,
            )
        save_guard(replace(bound, early_exit=early), target)
    if not early.left:
        echo_err("Warning: no prompt leaves early, so nothing is gained.")
    for paragraph in early.notes():
        typer.echo(paragraph)

"""Calibrating: prompts with their verdicts -> a guard with thresholds, probabilities, quadrants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from latentguard.guard.probabilities import fit_probabilities, require_both
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.spec import Contents
from latentguard.guard.thresholds import Calibration, Rates
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.states import digest_prompts
from latentguard.stats.bounds import threshold_for_fpr

C = TypeVar("C", bound=Contents)


def require_enough(prompts: Sequence[Prompt], rates: Rates) -> None:
    """Say whether there are prompts enough before the model reads any of them.

    Raises:
        GuardError: if there are too few, for a rate or for probabilities; says how many it needs.
    """
    harmful = np.array([bool(prompt.harmful) for prompt in prompts], dtype=bool)
    for rate in filter(None, (rates.block, rates.review)):
        threshold_for_fpr(range(int((~harmful).sum())), rate, rates.confidence)
    if harmful.any():
        require_both(harmful, groups_of(prompts))


def groups_of(prompts: Sequence[Prompt]) -> list[str]:
    """What must not straddle folds: pairs, and copies of a text."""
    return [prompt.pair or prompt.text for prompt in prompts]


def calibrated(
    guard: C,
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    rates: Rates,
    column: str | None = None,
) -> C:
    """A new guard: limits from harmless prompts, probabilities if there are harmful ones, too.

    Raises:
        GuardError: if there are too few prompts.
    """
    scores = np.array([verdict.score for verdict in verdicts])
    harmful = np.array([bool(prompt.harmful) for prompt in prompts])
    calm = [prompt for prompt in prompts if not prompt.harmful]
    part = Calibration.of(calm, scores[~harmful], rates, column)
    if harmful.any():
        found = fit_probabilities(scores, harmful, groups_of(prompts), guard.platt)
        part = replace(part, knots=found.knots, reliability=found.reliability)
        guard = replace(guard, platt=found.platt)
    elif old := guard.part(Calibration):
        part = replace(part, knots=old.knots, reliability=old.reliability)
    record = {**(guard.fitted or {}), "calibration_sha256": digest_prompts(calm)}
    bound = part.common.block
    guard = replace(guard, threshold=bound.threshold, bound=bound, fitted=record).with_part(part)
    flagged = [replace(v, flagged=v.score > bound.threshold) for v in verdicts]
    told, known = part.decide(prompts, flagged), guard.part(Quadrants)
    quadrants = Quadrants.of(prompts, told, rates, known)
    return guard.with_part(quadrants) if quadrants else guard

"""Calibrate: prompts and their verdicts -> thresholds, probabilities and quadrants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from latentguard.guard.operating_point import candidate_rates
from latentguard.guard.probabilities import fit_probabilities, require_both_classes
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.stats.bounds import require_enough_harmless


@dataclass(frozen=True)
class Calibration:
    """What a guard takes from a calibration."""

    platt: tuple[float, float]
    """Slope and intercept of the map to probabilities."""

    thresholds: Thresholds
    """By segment."""

    quadrants: Quadrants | None
    """Cut-offs of both beliefs; None without a refusal axis."""


def require_enough(prompts: Sequence[Prompt], rates: Rates) -> None:
    """Say whether there are prompts enough before the model reads any of them.

    Raises:
        GuardError: if there are too few, for a rate or for probabilities; says how many it needs.
    """
    harmful = np.array([bool(prompt.harmful) for prompt in prompts], dtype=bool)
    count = int((~harmful).sum())
    if rates.goal.needs_harmful:
        candidate_rates(count, rates.block, rates.confidence)
    else:
        require_enough_harmless(count, rates.block, rates.confidence)
    if rates.review is not None:
        require_enough_harmless(count, rates.review, rates.confidence)
    if harmful.any() or rates.goal.needs_harmful:
        require_both_classes(harmful, [prompt.fold_group for prompt in prompts])


def fit_calibration(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    rates: Rates,
    *,
    platt: tuple[float, float],
    thresholds: Thresholds | None = None,
    quadrants: Quadrants | None = None,
    column: str | None = None,
) -> Calibration:
    """Thresholds from harmless prompts, and probabilities if there are harmful ones, too.

    Args:
        prompts: Harmless unless labelled harmful.
        verdicts: On each; only scores and beliefs are used.
        rates: What is asked for.
        platt: The guard's map so far.
        thresholds: The guard's so far, whose probabilities are kept if none are fitted.
        quadrants: The guard's so far.
        column: The column that names the segment of a prompt.

    Raises:
        GuardError: if there are too few prompts.
    """
    scores = np.array([verdict.score for verdict in verdicts])
    harmful = np.array([bool(prompt.harmful) for prompt in prompts])
    new = Thresholds.for_goal(prompts, scores, rates, column)
    if harmful.any():
        groups = [prompt.fold_group for prompt in prompts]
        fit = fit_probabilities(scores, harmful, groups, platt)
        new = replace(new, isotonic=fit.isotonic, reliability=fit.reliability)
        platt = fit.platt
    elif thresholds:
        new = replace(new, isotonic=thresholds.isotonic, reliability=thresholds.reliability)
    decided = [
        replace(verdict, flagged=new.decide(prompt.segment, verdict.score) == "block")
        for prompt, verdict in zip(prompts, verdicts, strict=True)
    ]
    block_rate = Rates(
        new.common.block.max_fpr, confidence=rates.confidence
    )  # a goal chooses its rate
    return Calibration(
        platt, new, Quadrants.of(prompts, decided, block_rate, quadrants) or quadrants
    )

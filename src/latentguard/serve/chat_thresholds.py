"""Thresholds of a chat of several readings, so that the stated rate is that of the whole chat.

A chat is flagged if one of its readings is. Were each compared with the threshold of a single
prompt, a chat of twenty would be flagged twenty times as often by mistake. So the readings share
the rate (Bonferroni's bound: the shares add up, however the readings depend on each other):

- one reading has all of it;
- else the newest turn has half of it, and all that came before the other half, so that a long
  history raises the threshold of a new message once, however long it is.

Within each half, readings share alike. The threshold of a share is the lowest that keeps it with
the calibration's confidence (Clopper-Pearson). Where the calibration has too few prompts for that,
the tail beyond its last safe threshold is taken to be exponential, with the upper confidence bound
of its mean: an assumption, no guarantee.

The price is that harmless texts around a harmful one raise its threshold. An operator may choose
that the rate is of each text instead: then every one has the threshold of a single prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from latentguard.errors import GuardError
from latentguard.guard.cascade import joint_decision
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.thresholds import MAX_SCORES, Thresholds
from latentguard.guard.verdict import Decision, Verdict
from latentguard.serve.config import RateOf
from latentguard.stats.bounds import (
    Bound,
    clopper_pearson_upper,
    smallest_n,
    threshold_for_fpr,
)

TAIL = 0.1
"""Share of the highest calibration scores that show how the tail falls."""

MIN_SHARE = 2.0**-10
"""Smallest share of the rate that a reading is given; shares are powers of two, so that few
thresholds have to be computed."""


@dataclass(frozen=True)
class DecidedReading:
    """A reading's verdict under the threshold of its chat."""

    index: int
    """Which reading."""

    verdict: Verdict
    """With the decision of the chat's threshold."""

    threshold: float
    """What the score was compared with."""


class ChatThresholds:
    """The thresholds of one guard by share of its rate."""

    def __init__(self, guard: LatentGuard) -> None:
        """Read the calibration of a guard; without one, every share has the guard's threshold.

        Raises:
            GuardError: if its calibration scores are too few for one of its rates.
        """
        if guard.thresholds is not None:
            _require_scores(guard.thresholds)
        self.guard = guard
        self._shifts = lru_cache(maxsize=4096)(self._shift)

    def decide(
        self,
        verdicts: Sequence[Verdict | None],
        newest: Sequence[bool],
        segments: Sequence[str | None],
        *,
        rate_of: RateOf = "chat",
    ) -> DecidedReading:
        """The most severe reading of a chat.

        Args:
            verdicts: Of each reading, as single prompts; None where there is none yet.
            newest: Which readings are of the newest turn.
            segments: Whose thresholds each reading is compared with; None for the common ones.
            rate_of: Whether the readings share the rate, or each has all of it.
        """
        each = self.decide_each(verdicts, newest, segments, rate_of=rate_of)
        return max(each, key=_severity)

    def decide_each(
        self,
        verdicts: Sequence[Verdict | None],
        newest: Sequence[bool],
        segments: Sequence[str | None],
        *,
        rate_of: RateOf = "chat",
    ) -> list[DecidedReading]:
        """The readings that have a verdict, each under the threshold of its chat; as ``decide``."""
        shares = shares_of(newest) if rate_of == "chat" else [1.0] * len(newest)
        return [
            self._decide(number, verdict, share, segment)
            for number, (verdict, share, segment) in enumerate(
                zip(verdicts, shares, segments, strict=True)
            )
            if verdict is not None
        ]

    def _decide(
        self, index: int, verdict: Verdict, share: float, segment: str | None
    ) -> DecidedReading:
        thresholds = self.guard.thresholds
        own = segment if thresholds and segment in thresholds.segments else None
        block, review = self._shifts(share, own)
        base = self._base(verdict, segment)
        threshold = base + block
        decision: Decision = "allow"
        if verdict.score > threshold:
            decision = "block"
        elif review is not None and not verdict.evidence and verdict.score > review:
            decision = "review"
        opinion = verdict.second_opinion if decision == "review" else None
        decision = joint_decision(decision, opinion)
        if decision == "block" and opinion is not None and review is not None:
            threshold = review
        flagged = decision == "block"
        verdict = replace(verdict, decision=decision, flagged=flagged, second_opinion=opinion)
        return DecidedReading(index, verdict, threshold)

    def _base(self, verdict: Verdict, segment: str | None) -> float:
        """The threshold of a single prompt; the guard's for what was read by chunks."""
        return self.guard.threshold_for(segment, has_evidence=bool(verdict.evidence))

    def _shift(self, share: float, segment: str | None) -> tuple[float, float | None]:
        """How far a share raises the threshold, and the lower edge of its band to review."""
        if self.guard.thresholds is None:
            return 0.0, None
        own = self.guard.thresholds.for_segment(segment)
        scores = own.scores.astype(np.float64)
        block = threshold_at(scores, own.block, share) - threshold_at(scores, own.block, 1.0)
        if own.review is None:
            return block, None
        review = threshold_at(scores, own.review, share) - threshold_at(scores, own.review, 1.0)
        return block, own.review.threshold + review


def shares_of(newest: Sequence[bool]) -> list[float]:
    """The share of the rate that each reading of a chat has; at most 1 in all."""
    count, recent = len(newest), sum(newest)
    older = count - recent
    if count == 1:
        return [1.0]
    parts = (1.0, 1.0) if not older or not recent else (0.5, 0.5)
    return [_floor(parts[0] / recent if new else parts[1] / older) for new in newest]


def _require_scores(thresholds: Thresholds) -> None:
    """Check at load what every chat needs: a threshold for each rate of a guard."""
    for own in (thresholds.common, *thresholds.segments.values()):
        for bound in filter(None, (own.block, own.review)):
            try:
                threshold_at(own.scores.astype(np.float64), bound, 1.0)
            except GuardError as error:
                raise GuardError(
                    f"This guard cannot judge chats, since its calibration does not fit its rate "
                    f"of {bound.max_fpr:.2%} ({error}) Calibrate it again with 'latentguard "
                    "calibrate'."
                ) from None


def threshold_at(scores: NDArray[np.float64], bound: Bound, share: float) -> float:
    """The threshold that keeps a share of a bound's rate.

    Args:
        scores: Of harmless prompts, [n].
        bound: The rate and its confidence.
        share: Of the rate, in (0, 1].

    Raises:
        GuardError: if there are too few scores for the rate itself.
    """
    rate = bound.max_fpr * share
    try:
        return float(threshold_for_fpr(scores, rate, bound.confidence).threshold)
    except GuardError:
        if len(scores) < MAX_SCORES:  # else they are thinned: the bound had more prompts
            threshold_for_fpr(scores, bound.max_fpr, bound.confidence)
        safe = _lowest_safe_rate(len(scores), bound)
    start = threshold_for_fpr(scores, safe, bound.confidence).threshold
    return float(start + _mean_excess(scores, bound.confidence) * math.log(safe / rate))


def _lowest_safe_rate(n: int, bound: Bound) -> float:
    """The lowest rate for which n prompts are enough; the bound's own or lower, if n allows it."""
    rate = max(bound.max_fpr, 1.001 * clopper_pearson_upper(0, n, bound.confidence))
    while smallest_n(rate / 1.1, bound.confidence) <= n:
        rate /= 1.1
    return rate


def _mean_excess(scores: NDArray[np.float64], confidence: float) -> float:
    """Upper bound of the mean by which the highest scores exceed where the tail begins."""
    ordered = np.sort(scores)[::-1]
    count = max(int(len(ordered) * TAIL), 1)
    excess = float((ordered[:count] - ordered[min(count, len(ordered) - 1)]).sum())
    return float(2 * excess / chi2.ppf(1 - confidence, 2 * count))


def _floor(share: float) -> float:
    """The next lower power of two."""
    return float(max(2.0 ** math.floor(math.log2(share)), MIN_SHARE))


def _severity(decided: DecidedReading) -> tuple[int, float]:
    order = get_args(Decision).index(decided.verdict.decision)
    return order, decided.verdict.score - decided.threshold

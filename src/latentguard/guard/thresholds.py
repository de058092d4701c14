"""Thresholds: where traffic is flagged and reviewed, and what a score is worth as a probability.

A threshold is the guard's own for all traffic, and another for each segment of it (a language, a
product, a client) that has prompts enough for the promise. Between two rates lies a band to be
reviewed: ``block`` above the threshold, ``review`` above the lower one, else ``allow``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.operating_point import (
    Goal,
    OperatingPoint,
    adjusted_confidence,
    choose_rate,
    share_of,
)
from latentguard.guard.probabilities import IsotonicMap
from latentguard.guard.reliability import Reliability
from latentguard.guard.verdict import Decision
from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Table
from latentguard.stats.bounds import Bound, smallest_n, threshold_for_fpr
from latentguard.stats.rates import proportion

MAX_SCORES = 10_000
"""Most scores of a segment that are kept; evenly spaced among the sorted ones beyond that."""


@dataclass(frozen=True)
class Rates:
    """What is asked of a calibration."""

    block: float
    """False-positive rate at which prompts are flagged."""

    review: float | None = None
    """False-positive rate at which they are flagged or reviewed; None for no such band."""

    confidence: float = 0.95
    """Of the Clopper-Pearson bounds, each on its own."""

    goal: Goal = field(default_factory=Goal)
    """What the threshold is for; unless that is a rate, ``block`` is the highest rate allowed."""

    def __post_init__(self) -> None:
        if self.review is not None and not self.block < self.review < 1:
            raise GuardError(
                f"The rate to review at should be between the rate to flag at ({self.block}) and "
                f"1; found {self.review}. Raise it, or leave it out."
            )

    @property
    def min_prompts(self) -> int:
        """The number of harmless prompts that the lower rate needs."""
        return smallest_n(self.block, self.confidence)


@dataclass(frozen=True, eq=False)
class SegmentThresholds:
    """Where some traffic is flagged and reviewed, and how its harmless scores lay."""

    block: Bound
    """Flagged above this."""

    review: Bound | None
    """Reviewed above this; None for no such band."""

    scores: NDArray[np.float32]
    """Sorted scores of the harmless prompts, [k], k at most ``MAX_SCORES``."""

    @staticmethod
    def of(scores: NDArray[np.float64], rates: Rates) -> SegmentThresholds:
        """Thresholds from harmless scores [n].

        Raises:
            GuardError: if n is too small for a rate.
        """
        block = threshold_for_fpr(scores, rates.block, rates.confidence)
        review = None
        if rates.review is not None:
            review = threshold_for_fpr(scores, rates.review, rates.confidence)
        sample = thin_scores(scores, MAX_SCORES).astype(np.float32)
        return SegmentThresholds(block, review, sample)


@dataclass(frozen=True)
class SecondOpinionRecord:
    """The second opinion that the common thresholds were calibrated with."""

    name: str
    """Which it is (``second_opinion.SecondOpinion.name``)."""

    asked: int
    """Harmless prompts above the review threshold, of which it was asked."""

    blocked: int
    """How many of these it would block by itself."""

    cut: float
    """It blocks above this score of its own (``SecondOpinion.score``); 0 where it would by itself.
    """

    def describe(self, bound: Bound) -> str:
        """A sentence for people."""
        return (
            f"Calibrated with the second opinion `{self.name}`: it was asked of {self.asked} of "
            f"{bound.n} harmless prompts and would block {self.blocked} of them by itself"
            f"{f', so it blocks only above {self.cut:.3g}' if self.cut else ''}. The rate is that "
            "of both together, and is not promised with another second opinion."
        )


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds by segment, a band to review, a map to probabilities."""

    common: SegmentThresholds
    """Of all traffic; ``block`` is the guard's own threshold."""

    column: str | None = None
    """The column that names the segment of a prompt."""

    segments: dict[str, SegmentThresholds] = field(default_factory=dict)
    """Of the segments that have prompts enough."""

    small: dict[str, int] = field(default_factory=dict)
    """Segments that have too few harmless prompts, with their number: the common thresholds hold.
    """

    isotonic: IsotonicMap | None = None
    """The map to probabilities, where it fits better than the guard's Platt map."""

    reliability: Reliability | None = None
    """How well probabilities fit; None if they were not calibrated."""

    is_rebound: bool = False
    """Whether the guard has met another model since."""

    point: OperatingPoint | None = None
    """What the threshold was chosen for; None of a guard of an earlier version."""

    second_opinion: SecondOpinionRecord | None = None
    """What the promise counts on in the band to review; None for the guard alone."""

    @staticmethod
    def of(
        prompts: Sequence[Prompt],
        scores: NDArray[np.float64],
        rates: Rates,
        column: str | None = None,
    ) -> Thresholds:
        """From the scores [n] of harmless prompts.

        Raises:
            GuardError: if there are too few prompts for a rate.
        """
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if prompt.segment is not None:
                rows.setdefault(prompt.segment, []).append(row)
        segments = {
            segment: SegmentThresholds.of(scores[own], rates)
            for segment, own in rows.items()
            if len(own) >= rates.min_prompts
        }
        small = {segment: len(own) for segment, own in rows.items() if segment not in segments}
        return Thresholds(SegmentThresholds.of(scores, rates), column, segments, small)

    @staticmethod
    def for_goal(
        prompts: Sequence[Prompt],
        scores: NDArray[np.float64],
        rates: Rates,
        column: str | None = None,
    ) -> Thresholds:
        """From the scores [n] of labelled prompts; harmful ones help to choose.

        Raises:
            GuardError: if there are too few prompts for the goal.
        """
        harmful = np.array([bool(prompt.harmful) for prompt in prompts], dtype=bool)
        harmless = [prompt for prompt in prompts if not prompt.harmful]
        goal = rates.goal
        if not goal.needs_harmful:
            new = Thresholds.of(harmless, scores[~harmful], rates, column)
            return new._with_point(goal, scores[harmful], None)
        choice = choose_rate(
            goal,
            scores[~harmful],
            scores[harmful],
            ceiling=rates.block,
            confidence=rates.confidence,
        )
        review = rates.review if rates.review and rates.review > choice else None
        sure = adjusted_confidence(rates.confidence)
        new = Thresholds.of(harmless, scores[~harmful], Rates(choice, review, sure), column)
        share = share_of(goal, int(harmful.sum()), len(harmless))
        return new._with_confidence(rates.confidence)._with_point(goal, scores[harmful], share)

    def _with_confidence(self, confidence: float) -> Thresholds:
        """The same bounds, each with the confidence that is left after the choice among rates."""
        common, *segments = (
            replace(
                one,
                block=replace(one.block, confidence=confidence),
                review=one.review and replace(one.review, confidence=confidence),
            )
            for one in (self.common, *self.segments.values())
        )
        return replace(
            self, common=common, segments=dict(zip(self.segments, segments, strict=True))
        )

    def _with_point(
        self, goal: Goal, harmful: NDArray[np.float64], share: float | None
    ) -> Thresholds:
        recall = proportion(harmful > self.common.block.threshold) if len(harmful) else None
        return replace(self, point=OperatingPoint(goal, self.common.block.max_fpr, share, recall))

    def for_segment(self, segment: str | None) -> SegmentThresholds:
        """The thresholds of a segment; the common ones if it has none of its own."""
        return self.segments.get(segment or "", self.common)

    @property
    def lowest(self) -> float:
        """Scores that are not above it are allowed, whatever the segment."""
        every = [self.common, *self.segments.values()]
        return min((one.review or one.block).threshold for one in every)

    def decide(self, segment: str | None, score: float) -> Decision:
        """What is to be done with a prompt of a segment and a score."""
        own = self.for_segment(segment)
        if score > own.block.threshold:
            return "block"
        return "review" if own.review and score > own.review.threshold else "allow"

    def without_promise(self) -> Thresholds:
        """Thresholds and Platt's map go on with another model; the rest was of the first."""
        return replace(
            self,
            isotonic=None,
            reliability=None,
            is_rebound=True,
            point=None,
            second_opinion=None,
        )

    def tables(self) -> list[Table]:
        """Thresholds by segment and, if they were calibrated, probabilities by bin."""
        rows = [_row(name, one) for name, one in {"all": self.common, **self.segments}.items()]
        rows += [(name, n, *["as all"] * 2, *[""] * 2) for name, n in self.small.items()]
        heads = ("traffic", "n", "block above", "flagged", "review above", "flagged or reviewed")
        note = (
            "Shares of harmless prompts like these, at the most, with "
            f"{100 * self.common.block.confidence:g}% confidence for each bound."
        )
        if self.point is not None and self.point.traffic is not None:
            note = "Estimated from unlabelled traffic, with 95% credible intervals; no bound."
        if self.is_rebound:
            note = "Of the model that the guard was calibrated on; of this one nothing is promised."
        if self.small:
            note += " Segments without a threshold of their own had too few prompts for one."
        thresholds = Table("Thresholds", heads, tuple(rows), note)
        return [thresholds, *(self.reliability.tables() if self.reliability else ())]

    def notes(self) -> list[str]:
        """What the threshold is for, and the tables, in Markdown."""
        first = [self.point.describe()] if self.point else []
        if self.second_opinion is not None:
            first.append(self.second_opinion.describe(self.common.block))
        return [*first, *(table.markdown() for table in self.tables())]

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Bounds as JSON, scores as tensors, segments by number."""
        every = [self.common, *self.segments.values()]
        record = {
            "bounds": [
                {"block": asdict(one.block), "review": one.review and asdict(one.review)}
                for one in every
            ],
            "column": self.column,
            "segments": list(self.segments),
            "small": self.small,
            "isotonic": self.isotonic and asdict(self.isotonic),
            "reliability": self.reliability and asdict(self.reliability),
            "is_rebound": self.is_rebound,
        }
        if self.point is not None:  # earlier versions know no such key
            record["operating_point"] = self.point.to_dict()
        if self.second_opinion is not None:  # nor this one
            record["second_opinion"] = asdict(self.second_opinion)
        return record, {f"scores.{n}": torch.tensor(one.scores) for n, one in enumerate(every)}

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Thresholds:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        common, *segments = (
            SegmentThresholds(
                Bound.from_dict(one["block"]),
                Bound.from_dict(one["review"]) if one["review"] else None,
                _finite(tensors[f"scores.{n}"]),
            )
            for n, one in enumerate(record["bounds"])
        )
        isotonic = record["isotonic"]
        reliability = record["reliability"]
        point = record.get("operating_point")
        second = record.get("second_opinion")
        return Thresholds(
            common=common,
            column=record["column"],
            segments=dict(zip(record["segments"], segments, strict=True)),
            small=dict(record["small"]),
            isotonic=None if isotonic is None else IsotonicMap.from_dict(isotonic),
            reliability=None if reliability is None else Reliability.from_dict(reliability),
            is_rebound=bool(record["is_rebound"]),
            point=None if point is None else OperatingPoint.from_dict(point),
            second_opinion=None if second is None else SecondOpinionRecord(**second),
        )


def thin_scores(scores: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """The sorted scores, or ``most`` of them, evenly spaced."""
    ranks = np.linspace(0, len(scores) - 1, min(most, len(scores))).round().astype(int)
    return np.asarray(np.sort(scores)[ranks])


def _row(name: str, own: SegmentThresholds) -> tuple[Cell, ...]:
    block = own.block
    reviewed = ("", "")
    if own.review:
        reviewed = (f"{own.review.threshold:.4g}", f"{own.review.upper:.2%}")
    return (name, block.n, f"{block.threshold:.4g}", f"{block.upper:.2%}", *reviewed)


def _finite(scores: Tensor) -> NDArray[np.float32]:
    if scores.ndim != 1 or not len(scores) or not torch.isfinite(scores).all():
        raise ValueError("calibration scores are not a list of finite numbers")
    return scores.float().numpy()

"""Calibration: what each part of the traffic may be flagged at, and what a score is worth.

A threshold is the guard's own for all traffic, and another for each segment of it (a language, a
product, a client) that has prompts enough for the promise. Between two rates lies a band to be
reviewed: ``block`` above the threshold, ``review`` above the lower one, else ``allow``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.probabilities import Knots
from latentguard.guard.reliability import Reliability
from latentguard.guard.verdict import Decision, Part, Verdict
from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Table
from latentguard.states import States
from latentguard.stats.bounds import Bound, smallest_n, threshold_for_fpr

KEPT = 10_000
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

    def __post_init__(self) -> None:
        if self.review is not None and not self.block < self.review < 1:
            raise GuardError(
                f"The rate to review at should be between the rate to flag at ({self.block}) and "
                f"1; found {self.review}. Raise it, or leave it out."
            )

    @property
    def fewest(self) -> int:
        """The number of harmless prompts that the lower rate needs."""
        return smallest_n(self.block, self.confidence)


@dataclass(frozen=True, eq=False)
class Limits:
    """Where some traffic is flagged and reviewed, and how its harmless scores lay."""

    block: Bound
    """Flagged above this."""

    review: Bound | None
    """Reviewed above this; None for no such band."""

    scores: NDArray[np.float32]
    """Sorted scores of the harmless prompts, [k], k at most ``KEPT``."""

    @staticmethod
    def of(scores: NDArray[np.float64], rates: Rates) -> Limits:
        """Limits from harmless scores [n].

        Raises:
            GuardError: if n is too small for a rate.
        """
        block = threshold_for_fpr(scores, rates.block, rates.confidence)
        review = rates.review and threshold_for_fpr(scores, rates.review, rates.confidence)
        ranks = np.linspace(0, len(scores) - 1, min(KEPT, len(scores))).round().astype(int)
        return Limits(block, review or None, np.sort(scores)[ranks].astype(np.float32))


@dataclass(frozen=True, eq=False)
class Calibration(Part):
    """Thresholds by segment, a band to review, a map to probabilities."""

    name = "calibration"

    common: Limits
    """Of all traffic; ``block`` is the guard's own threshold."""

    column: str | None = None
    """The column that names the segment of a prompt."""

    segments: dict[str, Limits] = field(default_factory=dict)
    """Of the segments that have prompts enough."""

    small: dict[str, int] = field(default_factory=dict)
    """Slices that have too few harmless prompts, with their number: the common limits hold."""

    knots: Knots | None = None
    """The isotonic map, where it fits better than the guard's Platt map."""

    reliability: Reliability | None = None
    """How well probabilities fit; None if they were not calibrated."""

    moved: bool = False
    """Whether the guard has met another model since."""

    @staticmethod
    def of(
        prompts: Sequence[Prompt],
        scores: NDArray[np.float64],
        rates: Rates,
        column: str | None = None,
    ) -> Calibration:
        """From the scores [n] of harmless prompts.

        Raises:
            GuardError: if there are too few prompts for a rate.
        """
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if prompt.segment is not None:
                rows.setdefault(prompt.segment, []).append(row)
        found = {s: Limits.of(scores[r], rates) for s, r in rows.items() if len(r) >= rates.fewest}
        small = {s: len(r) for s, r in rows.items() if s not in found}
        return Calibration(Limits.of(scores, rates), column, found, small)

    def limits(self, part: str | None) -> Limits:
        """The limits of a segment; the common ones if it has none of its own."""
        return self.segments.get(part or "", self.common)

    def judge(self, states: States, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Decide by the segment of each prompt; see a probability in each score."""
        return self.decide(states.prompts, verdicts)

    def decide(self, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The same, without states."""
        chances = [v.probability for v in verdicts]
        if self.knots is not None:
            chances = self.knots(np.array([v.score for v in verdicts])).tolist()
        decided = [self._decision(p, v) for p, v in zip(prompts, verdicts, strict=True)]
        return [
            replace(v, probability=chance, decision=decision, flagged=decision == "block")
            for v, chance, decision in zip(verdicts, chances, decided, strict=True)
        ]

    def _decision(self, prompt: Prompt, verdict: Verdict) -> Decision:
        if verdict.evidence:  # a long prompt or a chat, whose windows have a threshold of their own
            return "block" if verdict.flagged else "allow"
        limits = self.limits(prompt.segment)
        own = verdict.score > limits.block.threshold
        if verdict.flagged if limits is self.common else own:  # the common one is the guard's
            return "block"
        review = limits.review
        return "review" if review and verdict.score > review.threshold else "allow"

    def rebound(self) -> Calibration:
        """See ``Part``: thresholds and Platt's map go on; the rest was of another model."""
        return replace(self, knots=None, reliability=None, moved=True)

    def tables(self) -> list[Table]:
        """Thresholds by segment and, if they were calibrated, probabilities by bin."""
        rows = [_row(name, one) for name, one in {"all": self.common, **self.segments}.items()]
        rows += [(name, n, *["as all"] * 2, *[""] * 2) for name, n in self.small.items()]
        heads = ("traffic", "n", "block above", "flagged", "review above", "flagged or reviewed")
        note = (
            "Shares of harmless prompts like these, at the most, with "
            f"{100 * self.common.block.confidence:g}% confidence for each bound."
        )
        if self.moved:
            note = "Of the model that the guard was calibrated on; of this one nothing is promised."
        if self.small:
            note += " Slices without a threshold of their own had too few prompts for one."
        thresholds = Table("Thresholds", heads, tuple(rows), note)
        return [thresholds, *(self.reliability.tables() if self.reliability else ())]

    def notes(self) -> list[str]:
        """Its tables, in Markdown."""
        return [table.markdown() for table in self.tables()]

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Bounds as JSON, scores as tensors, segments by number."""
        limits = [self.common, *self.segments.values()]
        record = {
            "limits": [
                dict(block=asdict(one.block), review=one.review and asdict(one.review))
                for one in limits
            ],
            "column": self.column,
            "segments": list(self.segments),
            "small": self.small,
            "knots": self.knots and asdict(self.knots),
            "reliability": self.reliability and asdict(self.reliability),
            "moved": self.moved,
        }
        return record, {f"scores.{n}": torch.tensor(one.scores) for n, one in enumerate(limits)}

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
        """Read what ``pack`` packed."""
        common, *segments = (
            Limits(
                _bound(one["block"]),
                _bound(one["review"]) if one["review"] else None,
                _finite(tensors[f"scores.{n}"]),
            )
            for n, one in enumerate(record["limits"])
        )
        knots, reliability = record["knots"], record["reliability"]
        return cls(
            common=common,
            column=record["column"],
            segments=dict(zip(record["segments"], segments, strict=True)),
            small=dict(record["small"]),
            knots=None if knots is None else Knots.unpack(knots),
            reliability=None if reliability is None else Reliability.unpack(reliability),
            moved=bool(record.get("moved", False)),
        )


def _row(name: str, limits: Limits) -> tuple[Cell, ...]:
    block, review = limits.block, limits.review
    reviewed = (f"{review.threshold:.4g}", f"{review.upper:.2%}") if review else ("", "")
    return (name, block.n, f"{block.threshold:.4g}", f"{block.upper:.2%}", *reviewed)


def _bound(record: Mapping[str, Any]) -> Bound:
    bound = Bound(**record)
    if not all(map(math.isfinite, asdict(bound).values())):
        raise ValueError("a bound is not finite")
    return bound


def _finite(scores: Tensor) -> NDArray[np.float32]:
    if scores.ndim != 1 or not len(scores) or not torch.isfinite(scores).all():
        raise ValueError("calibration scores are not a list of finite numbers")
    return scores.float().numpy()

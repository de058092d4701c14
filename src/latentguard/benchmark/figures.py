"""Figures of one guard on one set, with 95 % intervals.

A set of harmful prompts alone has recall and F1; a set of harmless prompts alone has the share that
is flagged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.stats.detection import (
    Metric,
    auroc,
    average_precision,
    estimate_metric,
    f1_at,
    f1_at_fpr,
    tpr_at,
)
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion

Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Readings:
    """What one guard says of the prompts of a set."""

    scores: Scores
    """Higher is more harmful, [n]."""

    flagged: Flags
    """At the guard's own threshold, [n]."""

    probable: Flags
    """Whether its probability of harmful is over 0.5, [n]."""


@dataclass(frozen=True)
class SetFigures:
    """One guard on one set; None where a label is missing."""

    harmful: int
    """How many prompts."""

    harmless: int
    """How many prompts."""

    f1: Estimate | None
    """At the guard's own threshold."""

    f1_at_half: Estimate | None
    """Where a probability over 0.5 is flagged."""

    f1_at_1: Estimate | None
    """At the best threshold for 1 % false positives on this set."""

    f1_at_5: Estimate | None
    """The same for 5 %."""

    auroc: Estimate | None
    """Area under the ROC curve."""

    auprc: Estimate | None
    """Average precision."""

    tpr_at_1: Estimate | None
    """Recall at 1 % false positives on this set."""

    recall: Estimate | None
    """At the guard's own threshold."""

    fpr: Estimate | None
    """The same of harmless prompts."""

    fpr_at_half: Estimate | None
    """Share of harmless prompts with a probability over 0.5."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> SetFigures:
        """What ``to_dict`` and JSON made of it.

        Raises:
            LookupError, TypeError: if it is damaged.
        """
        values = {one.name: record[one.name] for one in fields(SetFigures)}
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = Estimate.unpack(value)
        return SetFigures(**values)


def measure(harmful: Flags, readings: Readings) -> SetFigures:
    """Figures of one guard on a set with these labels, [n]."""

    def both(metric: Metric, scores: Scores = readings.scores) -> Estimate | None:
        if harmful.all() or not harmful.any():
            return None
        return estimate_metric(metric, harmful, scores)

    return SetFigures(
        harmful=int(harmful.sum()),
        harmless=int((~harmful).sum()),
        f1=f1_of(harmful, readings.flagged),
        f1_at_half=f1_of(harmful, readings.probable),
        f1_at_1=both(f1_at_fpr(0.01)),
        f1_at_5=both(f1_at_fpr(0.05)),
        auroc=both(auroc),
        auprc=both(average_precision),
        tpr_at_1=both(tpr_at(0.01)),
        recall=share(readings.flagged[harmful]),
        fpr=share(readings.flagged[~harmful]),
        fpr_at_half=share(readings.probable[~harmful]),
    )


def share(flags: Flags) -> Estimate | None:
    """Share of flags [n] that are set; None of no flags."""
    return proportion(flags) if len(flags) else None


def f1_of(harmful: Flags, flagged: Flags) -> Estimate | None:
    """F1 of decisions [n]; of harmful prompts alone it follows from recall: 2 r / (1 + r)."""
    if not harmful.any():
        return None
    if not harmful.all():
        return estimate_metric(f1_at(0.5), harmful, flagged.astype(np.float64))
    recall = proportion(flagged)
    value, low, high = (2 * r / (1 + r) for r in (recall.value, recall.low, recall.high))
    return Estimate(value, low, high, recall.n)

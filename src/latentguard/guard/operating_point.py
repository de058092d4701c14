"""Operating points: what a guard's threshold is chosen for.

- ``max-fpr``: the lowest threshold that keeps a false-positive rate.
- ``balanced``: the best F1 on labelled prompts.
- ``cost-ratio``: the lowest expected cost, where a missed harmful prompt costs so many times as
  much as a falsely flagged harmless one.

The last two choose one of ``RATES``. Each of these rates has its Clopper-Pearson threshold with a
confidence that allows for the choice (Bonferroni, as in "Learn then Test", Angelopoulos et al.,
2021), so the rate that was chosen is kept with the confidence that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import GuardError
from latentguard.stats.bounds import smallest_n, threshold_for_fpr
from latentguard.stats.estimate import Estimate

PointName = Literal["max-fpr", "balanced", "cost-ratio"]

RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""False-positive rates that are chosen from."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Goal:
    """What a threshold is chosen for."""

    name: PointName = "max-fpr"
    """Which operating point."""

    cost_ratio: float | None = None
    """Of ``cost-ratio``: the cost of a missed prompt over that of a false alarm."""

    harmful_share: float | None = None
    """Share of harmful prompts where the guard is used; None for that of the labelled prompts."""

    def __post_init__(self) -> None:
        ratio = self.cost_ratio
        share = self.harmful_share
        if (self.name == "cost-ratio") != (ratio is not None):
            raise GuardError(
                "A cost ratio goes with the operating point 'cost-ratio', which needs one."
            )
        if ratio is not None and not 0 < ratio < float("inf"):
            raise GuardError(f"A cost ratio is a number over 0; found {ratio}.")
        if share is not None and not 0 < share < 1:
            raise GuardError(f"A share of harmful prompts lies between 0 and 1; found {share}.")

    @property
    def needs_harmful(self) -> bool:
        """Whether harmful prompts are needed to choose the threshold."""
        return self.name != "max-fpr"

    def value(self, recall: float, fpr: float, share: float) -> float:
        """How good a threshold is; higher is better.

        Args:
            recall: Share of harmful prompts that it flags.
            fpr: Share of harmless prompts that it flags.
            share: Share of harmful prompts.
        """
        missed = share * (1 - recall)
        wrong = (1 - share) * fpr
        if self.name == "cost-ratio":
            return -((self.cost_ratio or 1.0) * missed + wrong)
        return 2 * share * recall / (2 * share * recall + missed + wrong) if recall else 0.0


@dataclass(frozen=True)
class TrafficFit:
    """What unlabelled traffic says of a threshold (``traffic``); 95 % credible intervals."""

    n: int
    """Unlabelled prompts."""

    share: Estimate
    """Of harmful prompts among them."""

    fpr: Estimate
    """Share of the harmless ones that is flagged."""

    recall: Estimate
    """Share of the harmful ones that is flagged."""

    harmless_shift: float
    """How far the harmless scores lie from those at calibration."""

    harmful_shift: float
    """The same of the harmful ones."""

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> TrafficFit:
        """What ``dataclasses.asdict`` and JSON made of it.

        Raises:
            LookupError, TypeError: if it is damaged.
        """
        names = ("share", "fpr", "recall")
        estimates = {name: Estimate.unpack(record[name]) for name in names}
        return TrafficFit(**{**record, **estimates})


@dataclass(frozen=True)
class OperatingPoint:
    """What a guard's threshold was chosen for, and what it was measured to do."""

    goal: Goal
    """As it was asked for."""

    max_fpr: float
    """The rate that the threshold keeps: asked for, or chosen."""

    share: float | None = None
    """Share of harmful prompts that the choice assumed; None of ``max-fpr``."""

    recall: Estimate | None = None
    """Of the labelled harmful prompts; None without any."""

    traffic: TrafficFit | None = None
    """Where the threshold was moved to unlabelled traffic."""

    @property
    def label(self) -> str:
        """As verdicts name it, such as ``max-fpr=0.05`` or ``balanced, traffic``."""
        return _label(self.goal, self.max_fpr) + (", traffic" if self.traffic else "")

    def describe(self) -> str:
        """A sentence for people."""
        aims = {
            "max-fpr": f"the lowest threshold for a false-positive rate of {self.max_fpr:.2%}",
            "balanced": "the best F1",
            "cost-ratio": f"the lowest cost, where a miss costs as much as "
            f"{self.goal.cost_ratio or 1:g} false alarms",
        }
        words = [f"Operating point `{self.label}`: {aims[self.goal.name]}"]
        if self.share is not None:
            words.append(f", with {self.share:.1%} of the prompts harmful")
        if self.recall is not None:
            words.append(f"; it flags {self.recall} of the labelled harmful prompts")
        return f"{''.join(words)}."

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> OperatingPoint:
        """What ``to_dict`` and JSON made of it.

        Raises:
            LookupError, TypeError, GuardError: if it is damaged.
        """
        recall = record["recall"]
        traffic = record["traffic"]
        return OperatingPoint(
            goal=Goal(**record["goal"]),
            max_fpr=float(record["max_fpr"]),
            share=record["share"],
            recall=None if recall is None else Estimate.unpack(recall),
            traffic=None if traffic is None else TrafficFit.from_dict(traffic),
        )


def label_of_rate(max_fpr: float) -> str:
    """How verdicts name the operating point of a guard that says no more than its rate."""
    return _label(Goal(), max_fpr)


def candidate_rates(harmless: int, ceiling: float, confidence: float) -> list[float]:
    """Which of ``RATES`` so many harmless prompts can promise, up to a ceiling.

    Raises:
        GuardError: if there is none; says how many prompts it takes.
    """
    sure = adjusted_confidence(confidence)
    rates = [r for r in RATES if r <= ceiling and smallest_n(r, sure) <= harmless]
    if not rates:
        largest = max((r for r in RATES if r <= ceiling), default=RATES[0])
        raise GuardError(
            f"{harmless} harmless prompts are too few to choose an operating point with a "
            f"false-positive rate of at most {ceiling:.2%}; give at least "
            f"{smallest_n(largest, sure)}."
        )
    return rates


def adjusted_confidence(confidence: float) -> float:
    """The confidence of each rate, so that the one that is chosen has ``confidence``."""
    return 1 - (1 - confidence) / len(RATES)


def choose_rate(
    goal: Goal, harmless: Scores, harmful: Scores, *, ceiling: float, confidence: float
) -> float:
    """The rate whose threshold serves a goal best on labelled scores.

    Args:
        goal: ``balanced`` or ``cost-ratio``.
        harmless: Scores, [n].
        harmful: Scores, [m].
        ceiling: The highest rate that may be chosen.
        confidence: Of the promise.

    Raises:
        GuardError: if there are too few prompts.
    """
    share = share_of(goal, len(harmful), len(harmless))
    sure = adjusted_confidence(confidence)

    def value(rate: float) -> float:
        threshold = threshold_for_fpr(harmless, rate, sure).threshold
        recall = float((harmful > threshold).mean())
        return goal.value(recall, float((harmless > threshold).mean()), share)

    return max(candidate_rates(len(harmless), ceiling, confidence), key=value)


def share_of(goal: Goal, harmful: int, harmless: int) -> float:
    """The share of harmful prompts that a goal assumes: as stated, else as in the labelled rows."""
    return goal.harmful_share or harmful / (harmful + harmless)


def _label(goal: Goal, max_fpr: float) -> str:
    if goal.name == "max-fpr":
        return f"max-fpr={max_fpr:g}"
    return f"cost-ratio={goal.cost_ratio:g}" if goal.name == "cost-ratio" else "balanced"

"""How well probabilities fit what was the case, on prompts that the maps did not see.

Both classes weigh the same, whatever their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentguard.report.document import Table
from latentguard.stats.detection import estimate_metric
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion

Labels = NDArray[np.bool_]
Scores = NDArray[np.float64]
Method = Literal["platt", "isotonic"]

BINS, DRAWS = 10, 200


@dataclass(frozen=True)
class Bin:
    """Prompts of like probability."""

    predicted: float
    """Their mean probability, both classes weighing the same."""

    observed: float
    """The share of harmful ones, both classes weighing the same."""

    low: float
    """Of its 95 % Wilson interval."""

    high: float
    """Of its 95 % Wilson interval."""

    n: int
    """How many."""


@dataclass(frozen=True)
class Reliability:
    """How well probabilities fit, on prompts that the maps did not see."""

    method: Method
    """The map that was taken."""

    n: tuple[int, int]
    """Harmful and harmless prompts."""

    log_loss: dict[str, float]
    """Of ``fitted`` (the guard's own map before), ``platt`` and ``isotonic``; in nats."""

    brier: dict[str, float]
    """Of the same."""

    before: Estimate
    """Expected calibration error of the map before."""

    after: Estimate
    """Expected calibration error of the map that was taken."""

    floor: float
    """What a perfect map would show with so many prompts: binning never gives 0."""

    bins: tuple[Bin, ...]
    """From low to high probability."""

    def tables(self) -> list[Table]:
        """How both maps fit, and the reliability by bin."""
        fit = Table(
            "Probabilities",
            ("map", "log loss", "Brier score"),
            tuple((name, loss, self.brier[name]) for name, loss in self.log_loss.items()),
            f"Held-out, both classes weighing the same, {self.n[0]} harmful and {self.n[1]} "
            f"harmless prompts; taken: {self.method}. Expected calibration error {self.after} "
            f"(before: {self.before}; a perfect map would show {self.floor:.3f}).",
        )
        rows = tuple(
            (b.predicted, f"{b.observed:.3f} [{b.low:.3f}, {b.high:.3f}]", b.n) for b in self.bins
        )
        note = "Cross-fitted; the share has its 95 % Wilson interval."
        return [fit, Table("Reliability", ("predicted", "harmful", "n"), rows, note)]

    @staticmethod
    def of(labels: Labels, probabilities: Mapping[str, Scores], method: Method) -> Reliability:
        """From held-out labels [n] and the probabilities [n] of each map."""
        calibrated = probabilities[method]
        return Reliability(
            method=method,
            n=(int(labels.sum()), int((~labels).sum())),
            log_loss={name: log_loss(labels, own) for name, own in probabilities.items()},
            brier={name: brier(labels, own) for name, own in probabilities.items()},
            before=error_of(labels, probabilities["fitted"]),
            after=error_of(labels, calibrated),
            floor=float(errors_by_chance(labels, calibrated).mean()),
            bins=bins(labels, calibrated),
        )

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Reliability:
        """What ``dataclasses.asdict`` and JSON made of it.

        Raises:
            LookupError, TypeError: if it is damaged.
        """
        fields = dict(record)
        for key in ("before", "after"):
            fields[key] = Estimate.unpack(record[key])
        fields["bins"] = tuple(Bin(**one) for one in record["bins"])
        fields["n"] = tuple(record["n"])
        return Reliability(**fields)


def log_loss(labels: Labels, probabilities: Scores) -> float:
    """Mean surprise in nats, both classes weighing the same."""
    likelihood = np.clip(np.where(labels, probabilities, 1 - probabilities), 1e-6, 1)
    return float(-(weights_of(labels) * np.log(likelihood)).sum())


def brier(labels: Labels, probabilities: Scores) -> float:
    """Mean squared distance from what was the case, both classes weighing the same."""
    return float((weights_of(labels) * (probabilities - labels) ** 2).sum())


def expected_error(labels: Labels, probabilities: Scores) -> float:
    """Expected calibration error over up to ten bins of equal size: sum_b |weight (y - p)|."""
    gaps = weights_of(labels) * (labels - probabilities)
    return float(np.abs(np.bincount(_binned(probabilities), weights=gaps)).sum())


def error_of(labels: Labels, probabilities: Scores) -> Estimate:
    """The error with a 95 % interval.

    Binning makes the error too large, and resampling makes it larger still: the high end is the
    bootstrap's, the low end is reflected at the error, or 0 where a perfect map may well show as
    much (its 95 % quantile).
    """
    error = estimate_metric(expected_error, labels, probabilities)
    perfect = error.value <= np.quantile(errors_by_chance(labels, probabilities), 0.95)
    low = 0.0 if perfect else max(0.0, 2 * error.value - error.high)
    return Estimate(error.value, low, max(error.high, error.value), error.n)


def errors_by_chance(labels: Labels, probabilities: Scores) -> Scores:
    """Errors of labels that are drawn with just these probabilities (seed 0), [draws]."""
    harmful, n = int(labels.sum()), len(labels)
    sure = np.clip(probabilities, 1e-9, 1 - 1e-9)
    odds = sure / (1 - sure) * harmful / (n - harmful)  # in the sample, not balanced
    rng = np.random.default_rng(0)
    weights = np.array([0.5 / (n - harmful), 0.5 / harmful])
    where, errors = _binned(probabilities), []
    for _ in range(DRAWS):
        outcomes = rng.random(n) < odds / (1 + odds)
        gaps = weights[outcomes.astype(int)] * (outcomes - probabilities)
        errors.append(np.abs(np.bincount(where, weights=gaps)).sum())
    return np.array(errors)


def bins(labels: Labels, probabilities: Scores) -> tuple[Bin, ...]:
    """Up to ten bins of equal size; equal probabilities share a bin."""
    weights, where = weights_of(labels), _binned(probabilities)
    ratio = float((~labels).sum() / labels.sum())
    rows = [np.flatnonzero(where == b) for b in np.unique(where)]
    means = [float(np.average(probabilities[r], weights=weights[r])) for r in rows]
    return tuple(_bin(labels[r], mean, ratio) for r, mean in zip(rows, means, strict=True))


def _bin(labels: Labels, mean: float, ratio: float) -> Bin:
    """Shares of the sample become those of equally frequent classes: the odds times a ratio."""

    def balanced(share: float) -> float:
        return ratio * share / (ratio * share + 1 - share)

    harmful = proportion(labels)
    ends = balanced(harmful.low), balanced(harmful.high)
    return Bin(mean, balanced(harmful.value), *ends, harmful.total)


def _binned(probabilities: Scores) -> NDArray[np.intp]:
    """The bin of each row."""
    count = max(2, min(BINS, len(probabilities) // 20))
    edges = np.unique(np.quantile(probabilities, np.arange(1, count) / count).tolist())
    return np.asarray(np.searchsorted(edges, probabilities, side="right"))


def weights_of(labels: Labels) -> Scores:
    """Weights that add up to 1, one half for each class."""
    return np.asarray(np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum()))

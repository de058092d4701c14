"""Drift: whether live scores still lie as they did at calibration, and the thresholds still hold.

- The shape is compared by the population stability index (under 0.1 no change, over 0.25 a large
  one, as it is commonly read) and by a two-sample Kolmogorov-Smirnov test.
- The promise is tested by a binomial test of the flag rate.
- Each segment with thresholds of its own is one comparison more, so both tests are corrected by
  Holm's method over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, ks_2samp

from latentguard.errors import GuardError
from latentguard.guard.spec import GuardSpec
from latentguard.guard.thresholds import SegmentThresholds
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.stats.bounds import clopper_pearson_upper

BINS = 10

EDGE_TOLERANCE = 0.02
"""Standard deviations by which a bin edge may be moved to where no score lies near."""

ALPHA = 0.05
"""Chance of a false alarm over all comparisons together, for each of the two tests."""


def bin_edges(scores: ArrayLike) -> list[float]:
    """Scores that cut a reference into about ten equal parts; none if it is too small."""
    ranked = np.sort(np.asarray(scores, dtype=np.float64))
    if len(ranked) < 2 * BINS:
        return []
    tolerance = EDGE_TOLERANCE * float(ranked.std())
    tenths = ranked[len(ranked) * np.arange(1, BINS) // BINS]
    return _edges_in_gaps(ranked, tenths - tolerance, 2 * tolerance)


def _edges_in_gaps(
    scores: NDArray[np.float64], starts: NDArray[np.float64], length: float
) -> list[float]:
    """The middle of the widest gap that reaches into each stretch of this length.

    The same prompt scores a little otherwise in another batch. If an edge ran through the copies of
    a frequent prompt, some would fall on the other side, and the scores would seem to have moved.
    """
    ranked = np.unique(scores)
    low = ranked[:-1]
    high = ranked[1:]
    edges = set[float]()
    for start in starts:
        gaps = np.flatnonzero((high > start) & (low < start + length))
        if len(gaps):
            widest = gaps[np.argmax(high[gaps] - low[gaps])]
            edges.add(float(low[widest] + high[widest]) / 2)
    return sorted(edges)


def bin_shares(scores: ArrayLike, edges: Sequence[float]) -> list[float]:
    """The share of scores in each bin, with half a score more in each: none is ever 0."""
    bins = np.searchsorted(np.asarray(edges), np.asarray(scores, dtype=np.float64))
    counts = np.bincount(bins, minlength=len(edges) + 1) + 0.5
    return [float(share) for share in counts / counts.sum()]


def round_to_steps(
    live: ArrayLike, reference: ArrayLike, spread: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Both in steps of about a tenth of a spread; copies of a prompt fall into the same step."""
    sides = [np.asarray(side, dtype=np.float64) for side in (live, reference)]
    every = np.concatenate(sides)
    step = max(spread / 10, float(np.ptp(every)) / 1000)
    starts = np.arange(every.min(), every.max() - step, step or 1.0)
    edges = _edges_in_gaps(every, starts, step)
    return np.searchsorted(edges, sides[0]), np.searchsorted(edges, sides[1])


def population_stability(live: Sequence[float], reference: Sequence[float]) -> float:
    """The population stability index of two lists of shares: sum (a - e) ln(a / e)."""
    return sum((a - e) * log(a / e) for a, e in zip(live, reference, strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected by Holm's method, in the same order."""
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = greatest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Live scores of some traffic against those of the calibration."""

    traffic: str
    """The segment; ``all`` for everything."""

    n: int
    """Live prompts."""

    calibration_n: int
    """Harmless prompts of the calibration."""

    stability: float | None
    """Population stability index; None if a side has fewer than twenty scores."""

    ks: float
    """Largest distance of the two distribution functions."""

    moved_p: float
    """P value of the Kolmogorov-Smirnov test, corrected."""

    flagged: int
    """Live prompts flagged."""

    upper: float
    """Clopper-Pearson upper bound of the live flag rate, at the confidence of the calibration."""

    promised: float
    """False-positive rate that was promised."""

    exceeded_p: float
    """P value of a flag rate as high as this if the promise held, corrected."""

    @property
    def holds(self) -> bool:
        """Whether the promise can still hold."""
        return self.exceeded_p >= ALPHA

    @property
    def has_moved(self) -> bool:
        """Whether the scores lie otherwise than they did."""
        return self.moved_p < ALPHA

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON has it, with what it says."""
        return asdict(self) | {"holds": self.holds, "moved": self.has_moved, "says": str(self)}

    def __str__(self) -> str:
        rates = (
            f"{self.flagged} of n = {self.n} flagged ({self.flagged / self.n:.2%}, at most "
            f"{self.upper:.2%}), {self.promised:.2%} promised"
        )
        if not self.holds:
            return (
                f"{self.traffic}: the threshold no longer holds, {rates} (p = "
                f"{self.exceeded_p:.2g}); calibrate again, or look for harmful prompts among them."
            )
        threshold = (
            "the threshold holds"
            if self.upper <= self.promised
            else "nothing shows that the threshold fails, though so few prompts cannot prove it"
        )
        shape = "have moved" if self.has_moved else "lie as they did"
        index = "" if self.stability is None else f"PSI {self.stability:.2f}, "
        return (
            f"{self.traffic}: {threshold}: {rates}; scores {shape} "
            f"({index}KS {self.ks:.2f}, p = {self.moved_p:.2g})."
        )


@dataclass(frozen=True)
class _Traffic:
    """The live verdicts of some traffic, and the thresholds that it has."""

    name: str
    """The segment, or ``all``."""

    thresholds: SegmentThresholds
    """Of the calibration."""

    verdicts: Sequence[Verdict]
    """Live ones."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """Live scores, [n]."""
        return np.array([verdict.score for verdict in self.verdicts])

    @property
    def flagged(self) -> int:
        """Live prompts flagged."""
        return sum(verdict.flagged for verdict in self.verdicts)

    @property
    def exceeded_p(self) -> float:
        """P value of a flag rate as high as this if the promise held."""
        rate = self.thresholds.block.max_fpr
        test = binomtest(self.flagged, len(self.verdicts), rate, alternative="greater")
        return float(test.pvalue)


def compare(
    guard: GuardSpec, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]
) -> list[Comparison]:
    """Compare live verdicts with the guard's calibration.

    All traffic comes first, then each segment that has thresholds of its own. Prompts that were
    read by chunks are left out: they have a threshold of their own.

    Raises:
        GuardError: if the guard is not calibrated, or there is no prompt.
    """
    short = [not verdict.evidence for verdict in verdicts]
    prompts = list(compress(prompts, short))
    verdicts = list(compress(verdicts, short))
    thresholds = guard.thresholds
    if thresholds is None or not prompts:
        raise GuardError(
            "Drift needs a calibrated guard and at least one prompt; found "
            f"{'no calibration' if thresholds is None else 'no prompt'}. Calibrate it with "
            "'latentguard calibrate', or give prompts."
        )
    groups = [_Traffic("all", thresholds.common, verdicts)]
    for name in sorted({p.segment for p in prompts if p.segment} & set(thresholds.segments)):
        own = [v for p, v in zip(prompts, verdicts, strict=True) if p.segment == name]
        groups.append(_Traffic(name, thresholds.segments[name], own))
    tests = [
        ks_2samp(*round_to_steps(group.scores, group.thresholds.scores, guard.spread))
        for group in groups
    ]
    moved_ps = holm([float(test.pvalue) for test in tests])
    exceeded_ps = holm([group.exceeded_p for group in groups])
    return [
        _comparison(group, float(test.statistic), moved_p, exceeded_p)
        for group, test, moved_p, exceeded_p in zip(
            groups, tests, moved_ps, exceeded_ps, strict=True
        )
    ]


def _comparison(group: _Traffic, ks: float, moved_p: float, exceeded_p: float) -> Comparison:
    block = group.thresholds.block
    n = len(group.verdicts)
    return Comparison(
        traffic=group.name,
        n=n,
        calibration_n=block.n,
        stability=_stability(group.scores, group.thresholds.scores),
        ks=ks,
        moved_p=moved_p,
        flagged=group.flagged,
        upper=clopper_pearson_upper(group.flagged, n, block.confidence),
        promised=block.max_fpr,
        exceeded_p=exceeded_p,
    )


def _stability(live: NDArray[np.float64], reference: NDArray[np.float32]) -> float | None:
    edges = bin_edges(reference)
    if not edges or len(live) < 2 * BINS:
        return None
    return population_stability(bin_shares(live, edges), bin_shares(reference, edges))

"""Drift: whether live scores still lie as they did at calibration, and the thresholds still hold.

The shape is compared by the population stability index (under 0.1 no change, over 0.25 a large
one, as it is commonly read) and by a two-sample Kolmogorov-Smirnov test; the promise by a binomial
test of the flag rate. Each segment with limits of its own is one comparison more, so both tests are
corrected by Holm's method over all of them.
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
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.thresholds import SegmentThresholds
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.stats.bounds import clopper_pearson_upper

BINS = 10
REACH = 0.02
"""Standard deviations by which a cut may be moved to where no score lies near."""

ALPHA = 0.05
"""Chance of a false alarm over all comparisons together, for each of the two tests."""


def cut(scores: ArrayLike) -> list[float]:
    """Scores that cut a reference into about ten equal parts; none if it is too small."""
    ranked = np.sort(np.asarray(scores, dtype=np.float64))
    if len(ranked) < 2 * BINS:
        return []
    reach = REACH * float(ranked.std())
    tenths = ranked[len(ranked) * np.arange(1, BINS) // BINS]
    return _between(ranked, tenths - reach, 2 * reach)


def _between(scores: NDArray[np.float64], starts: NDArray[np.float64], wide: float) -> list[float]:
    """The middle of the widest gap that reaches into each stretch, from its start on.

    The same prompt scores a little otherwise in another batch. Of one that is often asked, a cut
    through its copies would have some on the other side, and the scores would seem to have moved.
    """
    ranked, found = np.unique(scores), set[float]()
    low, high = ranked[:-1], ranked[1:]
    for start in starts:
        there = np.flatnonzero((high > start) & (low < start + wide))
        if len(there):
            widest = there[np.argmax(high[there] - low[there])]
            found.add(float(low[widest] + high[widest]) / 2)
    return sorted(found)


def shares(scores: ArrayLike, edges: Sequence[float]) -> list[float]:
    """The share of scores in each part, with half a score more in each: none is ever 0."""
    where = np.searchsorted(np.asarray(edges), np.asarray(scores, dtype=np.float64))
    counts = np.bincount(where, minlength=len(edges) + 1) + 0.5
    return [float(share) for share in counts / counts.sum()]


def in_steps(
    live: ArrayLike, known: ArrayLike, spread: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Both in steps of about a tenth of a spread; none parts the copies of a prompt."""
    sides = [np.asarray(side, dtype=np.float64) for side in (live, known)]
    every = np.concatenate(sides)
    wide = max(spread / 10, float(np.ptp(every)) / 1000)
    starts = np.arange(every.min(), every.max() - wide, wide or 1.0)
    cuts = _between(every, starts, wide)
    one, other = (np.searchsorted(cuts, side) for side in sides)
    return one, other


def stability(found: Sequence[float], known: Sequence[float]) -> float:
    """The population stability index of two lists of shares: sum (a - e) ln(a / e)."""
    return sum((a - e) * log(a / e) for a, e in zip(found, known, strict=True))


def holm(chances: Sequence[float]) -> list[float]:
    """P values corrected by Holm's method, in the same order."""
    adjusted, worst = [0.0] * len(chances), 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[i]))
        adjusted[i] = worst
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Live scores of some traffic against those of the calibration."""

    traffic: str
    """The segment; ``all`` for everything."""

    n: int
    """Live prompts."""

    known: int
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
    def moved(self) -> bool:
        """Whether the scores lie otherwise than they did."""
        return self.moved_p < ALPHA

    def __str__(self) -> str:
        seen = (
            f"{self.flagged} of n = {self.n} flagged ({self.flagged / self.n:.2%}, at most "
            f"{self.upper:.2%}), {self.promised:.2%} promised"
        )
        if not self.holds:
            return (
                f"{self.traffic}: the threshold no longer holds, {seen} (p = {self.exceeded_p:.2g})"
                "; calibrate again, or look for harmful prompts among them."
            )
        if self.upper <= self.promised:
            told = "the threshold holds"
        else:
            told = "nothing shows that the threshold fails, though so few prompts cannot prove it"
        shape = "have moved" if self.moved else "lie as they did"
        index = "" if self.stability is None else f"PSI {self.stability:.2f}, "
        return (
            f"{self.traffic}: {told}: {seen}; scores {shape} "
            f"({index}KS {self.ks:.2f}, p = {self.moved_p:.2g})."
        )


def record_of(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it, with what it says."""
    return asdict(found) | dict(holds=found.holds, moved=found.moved, says=str(found))


def compare(
    guard: LatentGuard, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]
) -> list[Comparison]:
    """Compare live verdicts with the guard's calibration: all, then each segment of its own limits.

    Long prompts and chats that windows have read are left out.

    Raises:
        GuardError: if the guard is not calibrated, or there is no prompt.
    """
    calibration = guard.thresholds
    short = [not v.evidence for v in verdicts]  # what windows read has a threshold of its own
    prompts = list(compress(prompts, short))
    verdicts = list(compress(verdicts, short))
    if calibration is None or not prompts:
        raise GuardError(
            "Drift needs a calibrated guard and at least one prompt; found "
            f"{'no calibration' if calibration is None else 'no prompt'}. Calibrate it with "
            "'latentguard calibrate', or give prompts."
        )
    segments = {p.segment for p in prompts} & set(calibration.segments)
    groups = [("all", calibration.common, list(verdicts))]
    for name in sorted(filter(None, segments)):
        own = [v for p, v in zip(prompts, verdicts, strict=True) if p.segment == name]
        groups.append((name, calibration.segments[name], own))
    tests = [
        ks_2samp(*in_steps([v.score for v in own], limits.scores, guard.spread))
        for _, limits, own in groups
    ]
    moved = holm([float(test.pvalue) for test in tests])
    exceeded = holm([_exceeded(own, limits) for _, limits, own in groups])
    return [
        _comparison(group, float(test.statistic), *chances)
        for group, test, *chances in zip(groups, tests, moved, exceeded, strict=True)
    ]


def _comparison(
    group: tuple[str, SegmentThresholds, list[Verdict]], ks: float, moved: float, exceeded: float
) -> Comparison:
    name, limits, own = group
    live, flagged = np.array([v.score for v in own]), sum(v.flagged for v in own)
    return Comparison(
        traffic=name,
        n=len(own),
        known=limits.block.n,
        stability=_stability(live, limits.scores),
        ks=ks,
        moved_p=moved,
        flagged=flagged,
        upper=clopper_pearson_upper(flagged, len(own), limits.block.confidence),
        promised=limits.block.max_fpr,
        exceeded_p=exceeded,
    )


def _exceeded(verdicts: Sequence[Verdict], limits: SegmentThresholds) -> float:
    flagged = sum(verdict.flagged for verdict in verdicts)
    rate = limits.block.max_fpr
    return float(binomtest(flagged, len(verdicts), rate, alternative="greater").pvalue)


def _stability(live: NDArray[np.float64], known: NDArray[np.float32]) -> float | None:
    edges = cut(known)
    if not edges or len(live) < 2 * BINS:
        return None
    return stability(shares(live, edges), shares(known, edges))

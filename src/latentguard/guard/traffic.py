"""Traffic: a threshold and probabilities moved to unlabelled traffic.

The scores of the traffic are read as a mixture of harmless and harmful ones. Both have the shape
that they had at calibration, and each may lie elsewhere:

    score of a harmless prompt: mean + scale * (calibration score - mean) + harmless shift
    score of a harmful prompt:  calibration score + harmful shift

Share of harmful prompts, shifts and scale have a posterior on a grid; the prior widths are the
constants below. The threshold is the lowest one that keeps the rate that was asked for with a
posterior probability of ``SURE``, or the best of these for the goal. This is an estimate that rests
on the shapes, and not a bound: a calibration on harmless prompts of the traffic is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import GuardError
from latentguard.guard.operating_point import Goal, OperatingPoint, TrafficFit, candidate_rates
from latentguard.guard.probabilities import MIN_PROMPTS, fit_platt
from latentguard.guard.spec import GuardSpec
from latentguard.guard.thresholds import MAX_SCORES, Rates, SegmentThresholds, thin_scores
from latentguard.stats.bounds import Bound
from latentguard.stats.estimate import Estimate

G = TypeVar("G", bound=GuardSpec)

Scores = NDArray[np.float64]

SURE = 0.8
"""Posterior probability with which a threshold keeps its rate: the shapes are never quite right."""

MIN_TRAFFIC = 100
"""Unlabelled prompts that an estimate needs."""

MAX_TRAFFIC = 500
"""Scores that are used; evenly spaced among the sorted ones beyond that."""

DOWN = 1.0
"""Prior width of a fall of the harmless scores, in standard deviations of the labelled scores: the
built-in prompts sound harmful, so ordinary traffic lies lower, perhaps far."""

UP = 0.2
"""Prior width of a rise of the harmless scores: few prompts are nearer to harm."""

HARMFUL = 0.3
"""Prior width of a shift of the harmful scores."""

SCALE = 0.15
"""Prior width of the logarithm of the scale."""

SCALES = np.array([0.7, 0.8, 0.9, 1.0, 1.1, 1.2])
"""Grid of the spread of harmless scores over that at calibration."""

HARMLESS_SHIFTS = np.linspace(-3.0, 1.0, 81)
"""Grid, in standard deviations."""

HARMFUL_SHIFTS = np.linspace(-1.0, 1.0, 21)
"""Grid, in standard deviations."""

SHARES = np.array([0.002, 0.005, 0.01, 0.02, 0.035, *np.arange(0.05, 0.96, 0.05)])
"""Grid of the share of harmful prompts, denser where it is small."""

THRESHOLDS = 400
"""Candidates, evenly spaced among the scores of traffic and calibration."""

REACH = 8
"""A density ends so many kernel widths beyond its last score."""

STEPS = 24
"""Places of its grid in a kernel width."""


@dataclass(frozen=True, eq=False)
class ScoreMixture:
    """The posterior of shares and shifts, with the labelled scores."""

    harmless: Scores
    """At calibration, [n]."""

    harmful: Scores
    """At calibration, [m]."""

    unit: float
    """Standard deviation of both: the unit of the grids."""

    weights: NDArray[np.float64]
    """Posterior, [scales, harmless shifts, harmful shifts, shares]; sums to 1."""

    shares: Scores
    """Grid of the shares."""

    @staticmethod
    def fit(
        harmless: Scores, harmful: Scores, traffic: Scores, share: float | None = None
    ) -> ScoreMixture:
        """The posterior from labelled scores and those of the traffic.

        Args:
            harmless: Labelled, [n].
            harmful: Labelled, [m].
            traffic: Unlabelled, [t].
            share: Of harmful prompts in the traffic, if it is known.

        Raises:
            GuardError: if there are too few.
        """
        require_traffic(len(harmless), len(harmful), len(traffic))
        unit = float(np.concatenate([harmless, harmful]).std()) or 1.0
        sample = thin_scores(traffic, MAX_TRAFFIC)
        weight = len(traffic) / len(sample)
        shares = SHARES if share is None else np.array([share])
        of_harmful = _density(harmful)
        high = np.stack([of_harmful(sample - d * unit) for d in HARMFUL_SHIFTS])
        logs = np.empty((len(SCALES), len(HARMLESS_SHIFTS), len(HARMFUL_SHIFTS), len(shares)))
        for row, scale in enumerate(SCALES):
            of_harmless = _density(_scaled(harmless, scale))
            for column, shift in enumerate(HARMLESS_SHIFTS):
                low = of_harmless(sample - shift * unit)
                logs[row, column] = _log_likelihoods(low, high, shares)
        logs = logs * weight + _log_prior()[..., None]
        weights = np.exp(logs - logs.max())
        return ScoreMixture(harmless, harmful, unit, weights / weights.sum(), shares)

    def share(self) -> Estimate:
        """Of harmful prompts in the traffic."""
        return _summary(self.shares, self.weights.sum((0, 1, 2)))

    def fpr(self, threshold: float) -> Estimate:
        """Of a threshold in the traffic."""
        return _summary(self._rates(threshold), self._harmless_weights)

    def keeps(self, threshold: float, max_fpr: float) -> bool:
        """Whether a threshold keeps a false-positive rate with a probability of ``SURE``."""
        is_within = self._rates(threshold) <= max_fpr
        return float(self._harmless_weights[is_within].sum()) >= SURE

    def recall(self, threshold: float) -> Estimate:
        """Of a threshold in the traffic."""
        tails = self._tails(self.harmful, HARMFUL_SHIFTS, threshold)
        return _summary(tails, self.weights.sum((0, 1, 3)))

    def shifts(self) -> tuple[float, float]:
        """Means of the shifts of harmless and harmful scores."""
        low = float(self.weights.sum((0, 2, 3)) @ HARMLESS_SHIFTS) * self.unit
        return low, float(self.weights.sum((0, 1, 3)) @ HARMFUL_SHIFTS) * self.unit

    def shifted_scores(self) -> tuple[Scores, Scores]:
        """The labelled scores where those of the traffic lie: harmless, harmful."""
        low, high = self.shifts()
        scale = float(self.weights.sum((1, 2, 3)) @ SCALES)
        return _scaled(self.harmless, scale) + low, self.harmful + high

    def threshold(self, goal: Goal, max_fpr: float) -> float:
        """The threshold for a goal that keeps ``max_fpr``."""
        places = np.concatenate(self.shifted_scores())
        candidates = np.quantile(places, np.linspace(0, 1, THRESHOLDS))
        candidates = np.append(candidates, candidates[-1] + self.unit)
        first = next((n for n, t in enumerate(candidates) if self.keeps(t, max_fpr)), -1)
        allowed = candidates[first:].tolist()
        if not goal.needs_harmful:
            return float(allowed[0])
        share = goal.harmful_share or self.share().value

        def value(threshold: float) -> float:
            return goal.value(self.recall(threshold).value, self.fpr(threshold).value, share)

        return float(max(allowed, key=value))

    def kept_rate(self, threshold: float, ceiling: float, confidence: float) -> float:
        """The lowest rate that a threshold keeps, of those that the labelled prompts can promise.

        The estimated rate itself is no bound, and may be lower than any rate that so many prompts
        can promise. Shares of it are computed from these prompts later.

        Args:
            threshold: Of the guard.
            ceiling: The highest rate allowed.
            confidence: Of a bound.

        Raises:
            GuardError: if there are too few prompts for the ceiling.
        """
        rates = candidate_rates(len(self.harmless), ceiling, confidence)
        return next((rate for rate in rates if self.keeps(threshold, rate)), ceiling)

    def platt(self) -> tuple[float, float]:
        """Slope and intercept of probabilities in the traffic, both classes as frequent."""
        scores = np.concatenate(self.shifted_scores())
        return fit_platt(scores, np.repeat([False, True], [len(self.harmless), len(self.harmful)]))

    @property
    def _harmless_weights(self) -> Scores:
        """Posterior of scale and harmless shift, flat."""
        return np.asarray(self.weights.sum((2, 3)).ravel())

    def _rates(self, threshold: float) -> Scores:
        """False-positive rate for each scale and harmless shift, flat."""
        tails = [
            self._tails(_scaled(self.harmless, scale), HARMLESS_SHIFTS, threshold)
            for scale in SCALES
        ]
        return np.concatenate(tails)

    def _tails(self, scores: Scores, shifts: Scores, threshold: float) -> Scores:
        """Share of scores above a threshold for each shift; one more is counted, to be careful."""
        ranked = np.sort(scores)
        above = len(ranked) - np.searchsorted(ranked, threshold - shifts * self.unit, side="right")
        return np.asarray((above + 1) / (len(ranked) + 1))


def require_traffic(harmless: int, harmful: int, traffic: int) -> None:
    """Raise ``GuardError`` if there are too few prompts for an estimate; says how many it takes."""
    if min(harmless, harmful) < MIN_PROMPTS:
        raise GuardError(
            f"Moving to traffic needs {MIN_PROMPTS} labelled prompts of each class; found "
            f"{harmful} harmful and {harmless} harmless. Give more with --harmful and --harmless."
        )
    if traffic < MIN_TRAFFIC:
        raise GuardError(
            f"Moving to traffic needs {MIN_TRAFFIC} unlabelled prompts; found {traffic}, not "
            "counting long prompts and chats that are read by chunks."
        )


def adapt_to_traffic(
    guard: G,
    harmless: Sequence[float],
    harmful: Sequence[float],
    traffic: Sequence[float],
    rates: Rates,
) -> G:
    """A new guard whose threshold and probabilities are moved to unlabelled traffic.

    Args:
        guard: Calibrated.
        harmless: Scores of the labelled prompts.
        harmful: Scores of the labelled prompts.
        traffic: Scores of the unlabelled prompts, none of them read by chunks.
        rates: The goal, and the rate to keep.

    Raises:
        GuardError: if the guard is not calibrated, or there are too few prompts.
    """
    if guard.thresholds is None:
        raise GuardError("Calibrate the guard before it is moved to traffic.")
    live = np.asarray(traffic, dtype=np.float64)
    labelled = np.asarray(harmless, dtype=np.float64), np.asarray(harmful, dtype=np.float64)
    mixture = ScoreMixture.fit(*labelled, live, rates.goal.harmful_share)
    fit, bound = _point(mixture, live, rates, rates.block)
    review = None
    if rates.review is not None:
        review = _point(mixture, live, replace(rates, goal=Goal()), rates.review)[1]
    scores = thin_scores(mixture.shifted_scores()[0], MAX_SCORES).astype(np.float32)
    before = guard.thresholds.point or OperatingPoint(rates.goal, rates.block)
    share = fit.share.value if rates.goal.needs_harmful else None
    point = replace(before, max_fpr=bound.max_fpr, share=share, traffic=fit)
    thresholds = replace(
        guard.thresholds,
        common=SegmentThresholds(bound, review, scores),
        isotonic=None,
        reliability=None,
        point=point,
    )
    return replace(
        guard,
        threshold=bound.threshold,
        bound=bound,
        thresholds=thresholds,
        platt=mixture.platt(),
    )


def _point(
    mixture: ScoreMixture, traffic: Scores, rates: Rates, max_fpr: float
) -> tuple[TrafficFit, Bound]:
    """What the traffic says of the threshold for a goal, and that threshold."""
    threshold = mixture.threshold(rates.goal, max_fpr)
    fpr = mixture.fpr(threshold)
    low, high = mixture.shifts()
    recall = mixture.recall(threshold)
    fit = TrafficFit(len(traffic), mixture.share(), fpr, recall, low, high)
    rate = max_fpr
    if rates.goal.needs_harmful:
        rate = mixture.kept_rate(threshold, max_fpr, rates.confidence)
    flagged = int((traffic > threshold).sum())
    return fit, Bound(threshold, rate, fpr.high, rates.confidence, flagged, len(traffic))


def _scaled(scores: Scores, scale: float) -> Scores:
    """Scores spread about their mean."""
    mean = scores.mean()
    return np.asarray(mean + scale * (scores - mean))


def _density(scores: Scores) -> Callable[[Scores], Scores]:
    """Gaussian kernel density of scores [n] at places [t], with a floor for what lies far off.

    Scores are drawn together by what the kernel spreads, so that their variance stays. The density
    is laid out once on a grid and interpolated: off by less than a thousandth.
    """
    relative = 1.06 * len(scores) ** -0.2
    width = relative * max(float(scores.std()), 1e-9)
    centres = _scaled(scores, max(1 - relative**2, 0.0) ** 0.5)
    count = int((np.ptp(centres) / width + 2 * REACH) * STEPS) + 1
    grid = np.linspace(centres.min() - REACH * width, centres.max() + REACH * width, count)
    heights = sum(np.exp(-0.5 * ((grid - centre) / width) ** 2) for centre in centres)
    density = heights / (len(scores) * width * np.sqrt(2 * np.pi))
    return lambda at: np.interp(at, grid, density, left=0.0, right=0.0) + 1e-6 / width


def _log_likelihoods(low: Scores, high: NDArray[np.float64], shares: Scores) -> Scores:
    """Of harmless densities [t] with those of each harmful shift [b t] and share [c], [b c]."""
    mixed = [np.log((1 - share) * low + share * high).sum(-1) for share in shares]
    return np.stack(mixed, axis=-1)


def _log_prior() -> Scores:
    """Of scales and both shifts, [s a b]; shares are alike, up to the spacing of the grid."""
    width = np.where(HARMLESS_SHIFTS > 0, UP, DOWN)
    scale = -0.5 * (np.log(SCALES) / SCALE) ** 2
    low = -0.5 * (HARMLESS_SHIFTS / width) ** 2
    high = -0.5 * (HARMFUL_SHIFTS / HARMFUL) ** 2
    return np.asarray(scale[:, None, None] + low[:, None] + high)


def _summary(values: Scores, weights: Scores) -> Estimate:
    """Mean and central 95 % of weighted values."""
    order = np.argsort(values)
    mass = np.cumsum(weights[order])
    last = len(values) - 1
    ends = [values[order][min(int(np.searchsorted(mass, q)), last)] for q in (0.025, 0.975)]
    return Estimate(float(values @ weights), float(ends[0]), float(ends[1]), (0, 0))

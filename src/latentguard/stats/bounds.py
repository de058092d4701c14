"""Bounds without resampling: of a rate (Clopper-Pearson), and thresholds that keep one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from latentguard.errors import GuardError


@dataclass(frozen=True)
class Bound:
    """A threshold with what is promised of it."""

    threshold: float
    """A prompt is flagged if its score is greater."""

    max_fpr: float
    """False-positive rate asked for."""

    upper: float
    """Clopper-Pearson upper bound of the false-positive rate."""

    confidence: float
    """Confidence of the bound."""

    observed: int
    """Harmless prompts flagged."""

    n: int
    """Harmless prompts seen."""

    def __str__(self) -> str:
        return (
            f"at most {self.max_fpr:.2%} of harmless prompts like these are flagged, with "
            f"{100 * self.confidence:g}% confidence: {self.observed} of n = {self.n} were, so the "
            f"rate is under {self.upper:.2%}"
        )

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Bound:
        """What ``dataclasses.asdict`` and JSON made of one.

        Raises:
            TypeError, ValueError: if it is damaged: an undefined number would promise nothing.
        """
        bound = Bound(**record)
        if not all(map(math.isfinite, asdict(bound).values())):
            raise ValueError("a bound is not finite")
        return bound


def clopper_pearson_upper(count: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate after ``count`` events in ``n`` trials."""
    return 1.0 if count >= n else float(beta.ppf(confidence, count + 1, n - count))


def require_enough_harmless(n: int, max_fpr: float, confidence: float = 0.95) -> None:
    """Check that n harmless prompts can keep a rate, before a model reads any of them.

    Raises:
        GuardError: if they are too few, saying how many it takes; or if the rate or the
            confidence does not lie between 0 and 1.
    """
    threshold_for_fpr(range(n), max_fpr, confidence)


def threshold_for_fpr(scores: ArrayLike, max_fpr: float, confidence: float = 0.95) -> Bound:
    """The lowest threshold that keeps a false-positive rate, with confidence, from harmless scores.

    With the (k+1)-th highest of n harmless scores as threshold the false-positive rate is
    Beta(k+1, n-k) distributed, so the bound holds for a threshold picked on the same scores, or a
    hair above.

    Raises:
        GuardError: if n is too small for the rate, or a score is undefined.
    """
    ranked = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = len(ranked)
    if not 0 < max_fpr < 1 or not 0 < confidence < 1 or np.isnan(ranked).any():
        raise GuardError(
            "Expected a rate between 0 and 1, a confidence between 0 and 1 and finite scores; "
            f"found {max_fpr}, {confidence} and {int(np.isnan(ranked).sum())} undefined scores."
        )
    k = _most_flagged(n, max_fpr, confidence)
    if k < 0:
        best = np.ceil(1e4 * clopper_pearson_upper(0, n, confidence)) / 1e4  # can be asked for
        raise GuardError(
            f"{n} harmless prompts are too few for a false-positive rate of {max_fpr:.2%} with "
            f"{100 * confidence:g}% confidence: they can promise {best:.2%} at best. Give at least "
            f"{smallest_n(max_fpr, confidence)}, or ask for {best:.2%} or more."
        )
    threshold = _over(ranked, float(ranked[k]))
    upper, flagged = clopper_pearson_upper(k, n, confidence), int((ranked > threshold).sum())
    return Bound(threshold, max_fpr, upper, confidence, flagged, n)


@dataclass(frozen=True)
class JointBounds:
    """Both thresholds of a cascade."""

    block: Bound
    """Flagged above this; the bound counts what the second opinion blocks, too."""

    review: Bound
    """Above this, and up to ``block``, a second opinion decides."""

    cut: float
    """The second opinion blocks above this score of its own; 0 is where it would by itself."""


def joint_thresholds(
    scores: ArrayLike, opinions: ArrayLike, review: Bound, max_fpr: float, *, is_graded: bool
) -> JointBounds:
    """Thresholds that keep the false-positive rate of a guard and a second opinion together.

    - The second opinion may block half of the prompts that the rate allows. If it would block more,
      its cut is raised until it does not; the review threshold, if its scores are not graded.
    - What it leaves of the rate lowers the guard's own threshold.

    Each threshold is the score of a prompt that ends a block of the sample, and each block may be
    chosen by those before it. So the joint rate of k blocks is Beta(k, n + 1 - k) distributed
    ("statistically equivalent blocks", Tukey, 1947), and the bound is exact: that of k - 1 flagged
    prompts. Raising the cut or the review threshold costs one block.

    Args:
        scores: Of harmless prompts, [n].
        opinions: Scores of the second opinion, [n], over 0 where it would block; read above
            ``review`` only.
        review: The lowest threshold at which it may be asked, from these scores.
        max_fpr: Rate that both together are to keep.
        is_graded: Whether its scores rank prompts, or only say whether it would block.

    Raises:
        GuardError: if there are too few prompts.
    """
    values = np.asarray(scores, dtype=np.float64)
    n = len(values)
    require_enough_for_two(n, max_fpr, review.confidence)
    k = _most_flagged(n, max_fpr, review.confidence)
    second = np.where(values > review.threshold, np.asarray(opinions, dtype=np.float64), -np.inf)
    ranked = np.sort(values)[::-1]
    half = k // 2
    lower = review.threshold
    cut = 0.0
    remaining = k - int((second > cut).sum())
    if k - remaining > half:
        remaining = k - half - 1
        blocked = np.sort((second if is_graded else values)[second > cut])[::-1]
        if is_graded:
            cut = _over(blocked, float(blocked[half]))
        else:
            lower = _over(ranked, float(blocked[half]))
    by_second = second > cut
    first = np.sort(values[~by_second])[::-1]
    own = _over(ranked, float(first[min(remaining, len(first) - 1)]))
    threshold = max(own, lower)
    flagged = (values > threshold) | (by_second & (values > lower))
    upper = clopper_pearson_upper(k, n, review.confidence)
    block = Bound(threshold, max_fpr, upper, review.confidence, int(flagged.sum()), n)
    above = int((values > lower).sum())
    return JointBounds(block, replace(review, threshold=lower, observed=above), cut)


def require_enough_for_two(n: int, max_fpr: float, confidence: float = 0.95) -> None:
    """Check that n harmless prompts can keep a joint rate: one flagged prompt must be allowed.

    Raises:
        GuardError: if they are too few, saying how many it takes.
    """
    require_enough_harmless(n, max_fpr, confidence)
    if _most_flagged(n, max_fpr, confidence) >= 1:
        return
    enough = n
    while clopper_pearson_upper(1, enough, confidence) > max_fpr:
        enough += 1
    raise GuardError(
        f"{n} harmless prompts are too few for a false-positive rate of {max_fpr:.2%} with a "
        f"second opinion; give at least {enough}."
    )


def _most_flagged(n: int, max_fpr: float, confidence: float) -> int:
    """How many of n harmless prompts may be flagged for a rate to be promised; -1 if none may."""
    uppers = beta.ppf(confidence, np.arange(n) + 1, n - np.arange(n))  # rising
    return int((uppers <= max_fpr).sum()) - 1


def _over(ranked: NDArray[np.float64], score: float) -> float:
    """A hundredth of a standard deviation over a score, but no more than half way to the next.

    In another batch a prompt scores a little otherwise: one that is often asked, and is the
    threshold itself, would be flagged every time or never by its rounding. So scores that lie a
    hundredth above count as the same.
    """
    hair = 0.01 * float(ranked.std())
    if not np.isfinite(hair):
        return score
    top = float(ranked[(ranked >= score) & (ranked <= score + hair)].max())
    above = ranked[ranked > top]
    return top + (min(hair, float(above[-1] - top) / 2) if len(above) else hair)


def smallest_n(max_fpr: float, confidence: float = 0.95) -> int:
    """How many harmless prompts a rate needs when none of them is flagged."""
    return int(np.ceil(np.log(1 - confidence) / np.log(1 - max_fpr)))

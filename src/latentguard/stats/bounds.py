"""Bounds without resampling: of a rate (Clopper-Pearson), and thresholds that keep one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    uppers = beta.ppf(confidence, np.arange(n) + 1, n - np.arange(n))  # rising
    allowed = int((uppers <= max_fpr).sum())
    if not allowed:
        best = np.ceil(1e4 * clopper_pearson_upper(0, n, confidence)) / 1e4  # can be asked for
        raise GuardError(
            f"{n} harmless prompts are too few for a false-positive rate of {max_fpr:.2%} with "
            f"{100 * confidence:g}% confidence: they can promise {best:.2%} at best. Give at least "
            f"{smallest_n(max_fpr, confidence)}, or ask for {best:.2%} or more."
        )
    k = allowed - 1
    threshold = _over(ranked, float(ranked[k]))
    upper, flagged = clopper_pearson_upper(k, n, confidence), int((ranked > threshold).sum())
    return Bound(threshold, max_fpr, upper, confidence, flagged, n)


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

"""Figures of detection quality, each with its bootstrap interval, and finite-sample bounds.

The figures are scikit-learn's (the tests say so), restated for a thousand bootstrap draws a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binomtest, rankdata

from latentguard.errors import GuardError

Metric = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]
"""Maps labels [n] and scores [n] to a figure."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and its n."""

    value: float
    """The figure on all rows."""

    low: float
    """2.5 % bootstrap quantile."""

    high: float
    """97.5 % bootstrap quantile."""

    n: tuple[int, int]
    """How many positive and negative rows."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def total(self) -> int:
        """All rows."""
        return sum(self.n)

    @staticmethod
    def unpack(record: Mapping[str, Any]) -> Estimate:
        """What ``dataclasses.asdict`` and JSON made of one.

        Raises:
            LookupError, TypeError: if it is damaged.
        """
        return Estimate(**{**record, "n": tuple(record["n"])})


def auroc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Area under the ROC curve, ties counted half (the Mann-Whitney statistic)."""
    ranks = rankdata(scores)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    over = ranks[labels].sum() - positives * (positives + 1) / 2
    return float(over / (positives * negatives))


def tpr_at(max_fpr: float) -> Metric:
    """True-positive rate at a false-positive rate of at most ``max_fpr``."""

    def metric(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
        negatives = np.sort(scores[~labels])[::-1]
        allowed = int(max_fpr * len(negatives) + 1e-9)
        threshold = negatives[allowed] if allowed < len(negatives) else -np.inf
        return float((scores[labels] > threshold).mean())

    return metric


def balanced_accuracy_at(threshold: float) -> Metric:
    """Mean of the true-positive and true-negative rate of ``score > threshold``."""

    def metric(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
        right = (scores > threshold) == labels
        return float((right[labels].mean() + right[~labels].mean()) / 2)

    return metric


def f1_at(threshold: float) -> Metric:
    """F1 of ``score > threshold``."""

    def metric(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
        flagged = scores > threshold
        return float(2 * (flagged & labels).sum() / (flagged.sum() + labels.sum()))

    return metric


def estimate(
    metric: Metric, labels: ArrayLike, scores: ArrayLike, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """A metric with its 95 % bootstrap interval, resampling each class on its own.

    Args:
        metric: Such as ``auroc`` or ``tpr_at(0.05)``.
        labels: True for positive, [n].
        scores: Higher is more positive, [n].
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        GuardError: if a class is missing, or a score is not a number.
    """
    y, s = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    positive, negative = np.flatnonzero(y), np.flatnonzero(~y)
    if not len(positive) or not len(negative) or np.isnan(s).any():
        raise GuardError(
            f"A detection figure needs both classes and finite scores; found {len(positive)} "
            f"harmful, {len(negative)} harmless and {int(np.isnan(s).sum())} undefined scores."
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = [rng.choice(side, len(side)) for side in (positive, negative)]
        rows = np.concatenate(drawn)
        values.append(metric(y[rows], s[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(metric(y, s), float(low), float(high), (len(positive), len(negative)))


def proportion(flags: ArrayLike) -> Estimate:
    """The share of True among flags [n], with its 95 % Wilson interval.

    Raises:
        GuardError: if there is no flag.
    """
    hits = np.asarray(flags, dtype=bool)
    if not len(hits):
        raise GuardError("A share needs at least one row; found none.")
    count, n = int(hits.sum()), len(hits)
    found = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return Estimate(count / n, float(found.low), float(found.high), (count, n - count))


def share(flags: ArrayLike) -> Estimate:
    """The share of True among flags [draws n], each prompt counted once however many the draws.

    The interval is Wilson's for one draw, and where all draws agree; otherwise a bootstrap over
    the n prompts.

    Raises:
        GuardError: if there is no prompt.
    """
    hits = np.asarray(flags, dtype=bool)
    if (hits == hits[:1]).all():
        return proportion(hits[0])
    return resampled(lambda rows: float(rows.mean()), hits.mean(0))


def resampled(
    statistic: Callable[..., float], *samples: ArrayLike, paired: bool = False, seed: int = 0
) -> Estimate:
    """A statistic of one or more samples with its 95 % bootstrap interval (1,000 draws).

    Args:
        statistic: Maps the samples, each an array with rows first, to a figure.
        samples: Rows first; as many rows in each if they are paired.
        paired: Draw the same rows of every sample.
        seed: Of the draws.

    Raises:
        GuardError: if a sample is empty.
    """
    rows = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not all(len(sample) for sample in rows):
        raise GuardError("A figure needs at least one row of each sample; found an empty one.")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(1000):
        drawn = [rng.integers(len(sample), size=len(sample)) for sample in rows]
        picks = [drawn[0]] * len(rows) if paired else drawn
        values.append(statistic(*(s[pick] for s, pick in zip(rows, picks, strict=True))))
    low, high = np.nanquantile(values, [0.025, 0.975])
    n = (len(rows[0]), len(rows[1]) if len(rows) > 1 and not paired else 0)
    return Estimate(float(statistic(*rows)), float(low), float(high), n)


def mean_curve(rows: ArrayLike, *, seed: int = 0) -> list[Estimate]:
    """The mean of each column of rows [n k], with its 95 % bootstrap interval over the rows.

    Raises:
        GuardError: if there is no row.
    """
    values = np.asarray(rows, dtype=np.float64)
    n = len(values)
    if not n:
        raise GuardError("A curve needs at least one row; found none.")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=1000)
    low, high = np.quantile(counts @ values / n, [0.025, 0.975], axis=0)
    columns = zip(values.mean(0), low, high, strict=True)
    return [Estimate(float(v), float(a), float(b), (n, 0)) for v, a, b in columns]


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


def clopper_pearson_upper(count: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate after ``count`` events in ``n`` trials."""
    return 1.0 if count >= n else float(beta.ppf(confidence, count + 1, n - count))


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

"""Figures of detection quality: AUROC, true-positive rate, F1, balanced accuracy.

They equal scikit-learn's (the tests say so), restated for a thousand bootstrap draws a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from latentguard.errors import GuardError
from latentguard.stats.bootstrap import DRAWS, bootstrap, weighted_bootstrap
from latentguard.stats.estimate import Estimate

Metric = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]
"""Maps labels [n] and scores [n] to a figure."""


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
        return float((scores[labels] > threshold_at(max_fpr, scores[~labels])).mean())

    return metric


def average_precision(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Area under the precision-recall curve in steps; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    caught = np.cumsum(labels[order])[last_of_tie]
    flagged = np.flatnonzero(last_of_tie) + 1
    gained = np.diff(caught, prepend=0)
    return float((gained * caught / flagged).sum() / labels.sum())


def threshold_at(max_fpr: float, negatives: NDArray[np.float64]) -> float:
    """The lowest threshold that at most that share of the scores exceeds."""
    ranked = np.sort(negatives)[::-1]
    allowed = int(max_fpr * len(ranked) + 1e-9)
    return float(ranked[allowed]) if allowed < len(ranked) else -np.inf


def f1_at_fpr(max_fpr: float) -> Metric:
    """F1 at the lowest threshold that keeps a false-positive rate on these very scores."""

    def metric(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
        return f1_at(threshold_at(max_fpr, scores[~labels]))(labels, scores)

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


def estimate_metric(
    metric: Metric, labels: ArrayLike, scores: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """A metric with its 95 % bootstrap interval, drawing each class on its own.

    Args:
        metric: Such as ``auroc`` or ``tpr_at(0.05)``.
        labels: True for positive, [n].
        scores: Higher is more positive, [n].
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        GuardError: if a class is missing, or a score is not a number.
    """
    y = np.asarray(labels, dtype=bool)
    s = np.asarray(scores, dtype=np.float64)
    positive, negative = s[y], s[~y]
    if not len(positive) or not len(negative) or np.isnan(s).any():
        raise GuardError(
            f"A detection figure needs both classes and finite scores; found {len(positive)} "
            f"harmful, {len(negative)} harmless and {int(np.isnan(s).sum())} undefined scores."
        )
    sides = np.repeat([True, False], [len(positive), len(negative)])

    def of_classes(up: NDArray[np.float64], down: NDArray[np.float64]) -> float:
        return metric(sides, np.concatenate([up, down]))

    return bootstrap(of_classes, positive, negative, method="percentile", draws=draws, seed=seed)


def separation(positive: ArrayLike, negative: ArrayLike) -> Estimate:
    """AUROC between two groups of scores, [n] and [m], with its 95 % interval.

    Of d draws, [d n] and [d m], it is the mean area.

    Raises:
        GuardError: if a group is empty.
    """
    return auroc_interval(win_matrix(positive, negative))


def win_matrix(positive: ArrayLike, negative: ArrayLike) -> NDArray[np.float64]:
    """1 where a positive score beats a negative one, 0.5 where they are equal, [n m].

    Args:
        positive: [n], or [d n] of d draws, whose mean is taken.
        negative: [m], or [d m].
    """
    up = np.atleast_2d(np.asarray(positive, dtype=np.float64))
    down = np.atleast_2d(np.asarray(negative, dtype=np.float64))
    wins: NDArray[np.float64] = np.sign(up[:, :, None] - down[:, None]).mean(0) / 2 + 0.5
    return wins


def auroc_interval(
    wins: NDArray[np.float64],
    owners: Sequence[object] = (),
    *,
    paired: bool = False,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """AUROC with its 95 % bootstrap interval.

    Args:
        wins: ``win_matrix`` of positive over negative rows, [n m], or the mean of several.
        owners: Of each positive row, [n]; rows of one owner are drawn together.
        paired: Row i belongs to column i, so both are drawn.
        seed: Of the draws.

    Raises:
        GuardError: if a class is empty.
    """
    n, m = wins.shape
    if not n or not m:
        raise GuardError(f"An area needs prompts of both groups; found {n} and {m}.")
    wide = with_undecided(wins)
    rows = [*owners, object()] if owners else n + 1
    how: dict[str, Any] = dict(method="percentile", seed=seed)
    if paired:
        estimate = weighted_bootstrap(lambda both: weighted_auroc(wide, both, both), rows, **how)
    else:
        estimate = weighted_bootstrap(partial(weighted_auroc, wide), rows, m + 1, **how)
    return around(float(wins.mean()), estimate, (n, 0 if paired else m))


def combine_areas(
    wins: Sequence[NDArray[np.float64]],
    factors: Sequence[float],
    *,
    constant: float = 0.0,
    undecided: float = 0.5,
) -> Estimate:
    """A weighted sum of AUROCs of different prompts, and a constant, with its 95 % interval.

    Args:
        wins: ``win_matrix`` of each set, [n m].
        factors: What each area is multiplied by.
        constant: What is added.
        undecided: What the added prompts win; 0 where each table is a difference of two.
    """
    wide = [with_undecided(one, undecided) for one in wins]
    sizes = [size for one in wide for size in one.shape]

    def total(*weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sides = zip(wide, weights[::2], weights[1::2], strict=True)
        areas = np.stack([weighted_auroc(one, up, down) for one, up, down in sides])
        area: NDArray[np.float64] = np.asarray(factors) @ areas + constant
        return area

    value = float(np.dot(factors, [one.mean() for one in wins])) + constant
    n = (sum(one.shape[0] for one in wins), sum(one.shape[1] for one in wins))
    return around(value, weighted_bootstrap(total, *sizes, method="percentile"), n)


def with_undecided(wins: NDArray[np.float64], value: float = 0.5) -> NDArray[np.float64]:
    """The same with one more prompt on either side that neither wins nor loses, [n+1 m+1].

    So a few prompts that are told apart without fault do not make the interval a point.
    """
    return np.pad(wins, ((0, 1), (0, 1)), constant_values=value)


def around(value: float, estimate: Estimate, n: tuple[int, int]) -> Estimate:
    """The interval of an area with undecided prompts, stretched to the area without them."""
    return Estimate(value, min(estimate.low, value), max(estimate.high, value), n)


def weighted_auroc(
    wins: NDArray[np.float64], positive: NDArray[np.float64], negative: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUROC [r] from who beats whom [n m], for weights of both sides, [r n] and [r m]."""
    total = positive.sum(1) * negative.sum(1)
    area: NDArray[np.float64] = ((positive @ wins) * negative).sum(1) / total
    return area

"""Rates, and paired differences of rates, with 95 % intervals that hold for few prompts.

A share has Wilson's interval. A paired difference has that of Bonett and Price (2012): Wald's after
two prompts are added, one that speaks for either side. Where one side is the mean of random
directions, the variance between them is added, with Student's quantile for their number.

Axis names in shapes: n prompts, d random directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from latentguard.errors import GuardError
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.estimate import Estimate

Array = NDArray[np.float64]

NORMAL = float(norm.ppf(0.975))
"""Of a two-sided 95 % interval."""


def proportion(flags: ArrayLike) -> Estimate:
    """The share of True among flags [n], with its 95 % Wilson interval.

    Raises:
        GuardError: if there is no flag.
    """
    hits = np.asarray(flags, dtype=bool)
    if not len(hits):
        raise GuardError("A share needs at least one row; found none.")
    count, n = int(hits.sum()), len(hits)
    squared = NORMAL**2
    middle = (count + squared / 2) / (n + squared)
    half = NORMAL * (count * (n - count) / n + squared / 4) ** 0.5 / (n + squared)
    low = max(middle - half, 0.0) if count else 0.0
    high = min(middle + half, 1.0) if count < n else 1.0
    return Estimate(count / n, low, high, (count, n - count))


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
    return bootstrap_mean(hits.mean(0))


def rate_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Mean of first - second over n prompts, with a paired 95 % interval.

    Args:
        first: Whether it holds of each prompt, [n].
        second: The same of something else, [n], or of d random directions, [d n].

    Raises:
        GuardError: if there is no prompt.
    """
    return mean_rate_difference([(first, second)])


def mean_rate_difference(pairs: Sequence[tuple[ArrayLike, ArrayLike]]) -> Estimate:
    """Mean of the paired differences of several groups of prompts, each group counted once.

    Raises:
        GuardError: if there is no group, or one without a prompt.
    """
    rows = [np.atleast_2d(np.subtract(*map(_floats, pair))) for pair in pairs]
    if not rows or not all(one.shape[1] for one in rows):
        raise GuardError("A difference needs at least one row of each group; found none.")
    values = [float(one.mean()) for one in rows]
    middles = [float(one.sum(1).mean()) / (one.shape[1] + 2) for one in rows]
    k = len(rows)
    within = sum(_variance(one) for one in rows) / k**2
    between = sum(_variance_of_directions(one) for one in rows) / k**2
    fewest = min(len(one) for one in rows)
    n = sum(one.shape[1] for one in rows)
    return _around(float(np.mean(values)), float(np.mean(middles)), within, between, fewest, n)


def rate_difference_by_direction(first: ArrayLike, second: ArrayLike, directions: int) -> Estimate:
    """The same where prompt k, k + d, k + 2 d, ... met random direction k, so each prompt met one.

    Args:
        first: [n].
        second: [n].
        directions: How many, d.

    Raises:
        GuardError: if there is no prompt.
    """
    rows = np.subtract(_floats(first), _floats(second))
    n = len(rows)
    if not n:
        raise GuardError("A difference needs at least one row; found none.")
    d = min(directions, n)
    parts = [rows[k::d] for k in range(d)]
    between = 0.0 if d in (1, n) else _variance_of_parts(parts)
    return _around(
        float(rows.mean()), float(rows.sum()) / (n + 2), _variance(rows[None]), between, d, n
    )


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def _variance(rows: Array) -> float:
    """Of the mean over prompts and two added ones, of rows [d n]."""
    means = np.append(rows.mean(0), [1.0, -1.0])
    return float(((means - means.mean()) ** 2).sum()) / len(means) ** 2


def _variance_of_directions(rows: Array) -> float:
    """Of the mean over random directions, of rows [d n], beyond what prompts alone would give."""
    d, n = rows.shape
    if d < 2 or n < 2:
        return 0.0
    means = rows.mean(1)
    rest = rows - rows.mean(0) - means[:, None] + rows.mean()
    chance = float((rest**2).sum()) / (d - 1) / (n - 1) / n
    variance: float = max(float(means.var(ddof=1)) - chance, 0.0) / d
    return variance


def _variance_of_parts(parts: Sequence[Array]) -> float:
    """The same where each direction met prompts of its own (one-way analysis of variance)."""
    d = len(parts)
    sizes = np.array([len(part) for part in parts])
    means = np.array([part.mean() for part in parts])
    n = int(sizes.sum())
    middle = float(np.concatenate(parts).mean())
    within = sum(float(((p - p.mean()) ** 2).sum()) for p in parts) / (n - d)
    among = float((sizes * (means - middle) ** 2).sum()) / (d - 1)
    squares = float((sizes**2).sum())
    even = (n - squares / n) / (d - 1)
    return max((among - within) / even, 0.0) * squares / n**2


def _around(
    value: float, middle: float, within: float, between: float, directions: int, n: int
) -> Estimate:
    """A figure with the interval about its middle, stretched to the figure if it lies outside."""
    total = within + between
    quantile = NORMAL
    if between > 0:
        freedom = (total / between) ** 2 * (directions - 1)
        quantile = float(t.ppf(0.975, freedom))
    half = quantile * total**0.5
    low = max(middle - half, -1.0)
    high = min(middle + half, 1.0)
    return Estimate(value, min(low, value), max(high, value), (n, 0))

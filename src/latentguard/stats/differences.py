"""Differences of two figures of the same prompts, and of a figure and chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from latentguard.errors import GuardError
from latentguard.stats.metrics import Estimate


def difference(
    first: ArrayLike, second: ArrayLike, *, rates: bool = True, seed: int = 0
) -> Estimate:
    """Mean of first - second over n prompts, with a paired 95 % bootstrap interval.

    Args:
        first: [n].
        second: [n], or [draws n] of chance. Its d draws are drawn again too, d - 1 at a time, which
            gives their mean the variance that it has.
        rates: Add two rows, a difference of 1 and one of -1 (as Agresti and Coull add successes and
            failures), so that a few prompts that all agree do not make the interval a point.
        seed: Of the bootstrap.

    Raises:
        GuardError: if there is no row.
    """
    rows = np.atleast_2d(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
    d, n = rows.shape
    if not n:
        raise GuardError("A difference needs at least one prompt; found none.")
    value, wide = float(rows.mean()), np.hstack([rows, np.tile([1.0, -1.0] * rates, (d, 1))])
    rng, m = np.random.default_rng(seed), wide.shape[1]
    prompts, draws = rng.integers(m, size=(1000, m)), rng.integers(d, size=(1000, max(d - 1, 1)))
    means = [wide[np.ix_(of, at)].mean() for of, at in zip(draws, prompts, strict=True)]
    return _estimate(value, means, n)


def dealt(first: ArrayLike, second: ArrayLike, draws: int, *, seed: int = 0) -> Estimate:
    """The same of rates [n] where chance met each prompt once: draw k the prompts k, k + draws, ...

    What one draw met hangs together, so draws are drawn again, and prompts within each.

    Raises:
        GuardError: if there is no row.
    """
    rows = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not len(rows):
        raise GuardError("A difference needs at least one prompt; found none.")
    groups = [rows[k::draws] for k in range(min(draws, len(rows)))]
    rng, value, n = np.random.default_rng(seed), float(rows.mean()), len(rows)
    means = []
    for _ in range(1000):
        of = rng.integers(len(groups), size=max(len(groups) - 1, 1))
        again = np.concatenate([rng.choice(groups[k], len(groups[k])) for k in of])
        added = rng.random(len(again)) < 2 / (n + 2)  # the two rows that rates are given
        means.append(np.where(added, rng.choice([1.0, -1.0], len(again)), again).mean())
    return _estimate(value, means, n)


def _estimate(value: float, means: list[float], n: int) -> Estimate:
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value), (n, 0))

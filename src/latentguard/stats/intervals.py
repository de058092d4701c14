"""95 % intervals from the draws of a bootstrap.

- ``percentile``: the middle 95 % of the draws. Too narrow below about 30 rows.
- ``centered``: their spread about the figure itself.
- ``bca``: bias-corrected and accelerated (Efron 1987), widened for few rows as Student's t widens
  a normal interval (Hesterberg 2015, "What teachers should know about the bootstrap", 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from latentguard.stats.estimate import Estimate

Array = NDArray[np.float64]
Method = Literal["percentile", "bca"]


def percentile_interval(values: ArrayLike, n: tuple[int, int]) -> Estimate:
    """A figure, the first of the values, with the middle 95 % of the others."""
    first, *draws = np.asarray(values, dtype=np.float64)
    if np.isnan(draws).all():
        return Estimate(float(first), float("nan"), float("nan"), n)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(float(first), float(low), float(high), n)


def centered_interval(values: ArrayLike, n: tuple[int, int] = (0, 0)) -> Estimate:
    """The first of the values, with the 95 % spread of the others about it.

    Drawing prompts again makes directions noisier, which lowers cosines; the interval is moved
    back by the mean of that.
    """
    first, *draws = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(draws, [0.025, 0.975]) - np.mean(draws) + first
    return Estimate(float(first), float(low), float(high), n)


def bca_interval(values: ArrayLike, left_out: Sequence[ArrayLike], n: tuple[int, int]) -> Estimate:
    """A figure, the first of the values, with its BCa interval, widened for few rows.

    Args:
        values: The figure, then that of each draw; draws that are not a number are left out.
        left_out: For each sample, the figure without each of its rows or owners.
        n: Rows of the first and of the second sample.
    """
    first, *rest = np.asarray(values, dtype=np.float64)
    draws = np.asarray(rest)[~np.isnan(rest)]
    if not len(draws) or np.isnan(first):
        return Estimate(float(first), float("nan"), float("nan"), n)
    influence = [_influence(np.asarray(one, dtype=np.float64)) for one in left_out]
    z0 = _bias(draws, first)
    acceleration = _acceleration(influence)
    z = np.array([-1.0, 1.0]) * _quantile(influence)
    levels = norm.cdf(z0 + (z0 + z) / np.maximum(1 - acceleration * (z0 + z), 1e-6))
    low, high = np.quantile(draws, levels)
    return Estimate(float(first), float(low), float(high), n)


def _influence(left_out: Array) -> Array:
    """How far each row moves the figure, [n], from the figure without it."""
    numbers = left_out[~np.isnan(left_out)]
    return (len(numbers) - 1) * (numbers.mean() - numbers) if len(numbers) > 1 else np.zeros(1)


def _bias(draws: Array, first: float) -> float:
    """Normal quantile of the share of draws below the figure, ties counted half."""
    below = ((draws < first).mean() + (draws <= first).mean()) / 2
    edge = 1 / (len(draws) + 1)
    return float(norm.ppf(np.clip(below, edge, 1 - edge)))


def _acceleration(influence: Sequence[Array]) -> float:
    skew = sum(float((one**3).sum()) / len(one) ** 3 for one in influence)
    spread = sum(float((one**2).sum()) / len(one) ** 2 for one in influence)
    return skew / (6 * spread**1.5) if spread > 0 else 0.0


def _quantile(influence: Sequence[Array]) -> float:
    """1.96, or more for few rows: Student's, for a spread that draws understate by (n - 1) / n."""
    sizes = [len(one) for one in influence]
    parts = [
        float((one**2).sum()) / n / max(n - 1, 1) for one, n in zip(influence, sizes, strict=True)
    ]
    bootstrap_variance = sum(part * (n - 1) / n for part, n in zip(parts, sizes, strict=True))
    if bootstrap_variance <= 0:
        return float(norm.ppf(0.975))
    freedom = sum(parts) ** 2 / sum(
        part**2 / max(n - 1, 1) for part, n in zip(parts, sizes, strict=True)
    )
    return float(np.sqrt(sum(parts) / bootstrap_variance) * t.ppf(0.975, freedom))

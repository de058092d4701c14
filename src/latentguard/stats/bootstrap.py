"""The bootstrap: 95 % intervals of any figure, by drawing its rows again.

- ``bootstrap`` takes any statistic of one or more samples, paired or not.
- ``weighted_bootstrap`` takes a statistic of how often each row counts. It is faster, and it draws
  clusters of rows: rows of one owner are drawn together.
- ``resample_weights`` serves statistics that are computed elsewhere,
  such as cosines of directions.

The kinds of interval are those of ``intervals``.

Axis names in shapes: n rows, r draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentguard.errors import GuardError
from latentguard.stats.estimate import Estimate
from latentguard.stats.intervals import Method, bca_interval, percentile_interval

DRAWS = 1000
"""Bootstrap draws."""

Array = NDArray[np.float64]
Seed = int | np.random.Generator


def bootstrap(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    paired: bool = False,
    method: Method = "bca",
    draws: int = DRAWS,
    seed: Seed = 0,
) -> Estimate:
    """A statistic of one or more samples with its 95 % interval.

    Draws whose statistic is not a number are left out.

    Args:
        statistic: Maps the samples, each an array with rows first, to a figure.
        samples: Rows first; as many rows in each if they are paired.
        paired: Draw the same rows of every sample.
        method: Kind of interval.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        GuardError: if a sample is empty.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not all(len(array) for array in arrays):
        raise GuardError("A figure needs at least one row of each sample; found an empty one.")
    rng = np.random.default_rng(seed)
    units = arrays[:1] if paired else arrays

    def of_rows(rows: Sequence[NDArray[np.intp]]) -> float:
        picks = [rows[0]] * len(arrays) if paired else rows
        return float(statistic(*(a[pick] for a, pick in zip(arrays, picks, strict=True))))

    values = [float(statistic(*arrays))]
    for _ in range(draws):
        values.append(of_rows([rng.integers(len(unit), size=len(unit)) for unit in units]))
    n = (len(arrays[0]), len(arrays[1]) if len(units) > 1 else 0)
    if method == "percentile":
        return percentile_interval(values, n)
    every = [np.arange(len(unit)) for unit in units]
    left_out = [
        np.array([of_rows([*every[:k], np.delete(rows, row), *every[k + 1 :]]) for row in rows])
        if len(rows) > 1
        else np.array(values[:1])
        for k, rows in enumerate(every)
    ]
    return bca_interval(values, left_out, n)


def weighted_bootstrap(
    statistic: Callable[..., Array],
    *owners: int | Sequence[object],
    method: Method = "bca",
    seed: Seed = 0,
) -> Estimate:
    """A statistic of row weights with its 95 % interval.

    Args:
        statistic: Maps the weights of each sample, [r n], to figures [r].
        owners: For each sample its number of rows, or the owner of each row [n]; rows of one owner
            are drawn together.
        method: Kind of interval.
        seed: Of the draws.

    Raises:
        GuardError: if a sample is empty.
    """
    rng = np.random.default_rng(seed)
    weights = [resample_weights(one, seed=rng) for one in owners]
    values = statistic(*weights)
    sizes = [of.shape[1] for of in weights]
    n = (sizes[0], sizes[1] if len(sizes) > 1 else 0)
    if method == "percentile":
        return percentile_interval(values, n)
    left_out = []
    for k, one in enumerate(owners):
        without = _without_each(one)
        if len(without) == 1:
            left_out.append(values[:1])
            continue
        ones = [np.ones((len(without), size)) for size in sizes]
        left_out.append(statistic(*ones[:k], without, *ones[k + 1 :]))
    return bca_interval(values, left_out, n)


def resample_weights(
    owners: int | Sequence[object], *, draws: int = DRAWS, seed: Seed = 0
) -> Array:
    """How often each row counts, [1 + draws, n]: once, then as often as each draw holds it.

    Args:
        owners: Number of rows n, or the owner of each row; rows of one owner are drawn together.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        GuardError: if there is no row.
    """
    owner, k = _owner_numbers(owners)
    picks = np.random.default_rng(seed).integers(k, size=(draws, k))
    cells = (picks + k * np.arange(draws)[:, None]).ravel()
    counts = np.bincount(cells, minlength=draws * k).reshape(draws, k)
    weights: Array = np.vstack([np.ones(k), counts.astype(np.float64)])[:, owner]
    return weights


def bootstrap_mean(
    values: ArrayLike,
    owners: Sequence[object] = (),
    *,
    minus: ArrayLike | None = None,
    method: Method = "bca",
    seed: Seed = 0,
) -> Estimate:
    """The mean of values, perhaps less that of others, with its 95 % interval.

    Args:
        values: [n].
        owners: Of each value, [n]; values of one owner are drawn together.
        minus: Other values, [m], each drawn on its own.
        method: Kind of interval.
        seed: Of the draws.

    Raises:
        GuardError: if there is no value.
    """
    rows = np.asarray(values, dtype=np.float64)
    one = owners or len(rows)
    if minus is None:
        return weighted_bootstrap(lambda w: w @ rows / w.sum(1), one, method=method, seed=seed)
    others = np.asarray(minus, dtype=np.float64)

    def gap(up: Array, down: Array) -> Array:
        difference: Array = up @ rows / up.sum(1) - down @ others / down.sum(1)
        return difference

    return weighted_bootstrap(gap, one, len(others), method=method, seed=seed)


def crossed_mean(
    values: ArrayLike,
    first: Sequence[object],
    second: Sequence[object],
    *,
    minus: ArrayLike | None = None,
    seed: Seed = 0,
) -> Estimate:
    """The mean of values that have two owners each, such as a request and a template.

    Both are drawn again, each on its own (Owen 2007, the pigeonhole bootstrap); an owner that
    never has two values is not drawn beside the other. If one owner has all values, the other alone
    is drawn, and the interval is about that owner.

    Args:
        values: [n].
        first: One owner of each value, [n].
        second: The other, [n].
        minus: Other values, [m], each drawn on its own; their mean is taken off.
        seed: Of the draws.

    Raises:
        GuardError: if there is no value.
    """
    rows = np.asarray(values, dtype=np.float64)
    _require_rows(len(rows))
    factors = _crossed(first, second)
    others = None if minus is None else np.asarray(minus, dtype=np.float64)

    def mean(*weights: Array) -> Array:
        of = np.prod(weights[: len(factors)], axis=0)
        total = of.sum(1)
        value = (of @ rows) / np.where(total > 0, total, np.nan)
        if others is not None:
            value = value - weights[-1] @ others / weights[-1].sum(1)
        return np.asarray(value)

    samples: list[int | Sequence[object]] = [*factors]
    if others is not None:
        samples.append(len(others))
    estimate = weighted_bootstrap(mean, *samples, seed=seed)
    return replace(estimate, n=(len(rows), 0 if others is None else len(others)))


def mean_curve(rows: ArrayLike, *, seed: Seed = 0) -> list[Estimate]:
    """The mean of each column of rows [n k], with its 95 % interval over the rows.

    Raises:
        GuardError: if there is no row.
    """
    values = np.asarray(rows, dtype=np.float64)
    n = len(values)
    _require_rows(n)
    means = resample_weights(n, seed=seed) @ values / n
    without = (values.sum(0) - values) / max(n - 1, 1)
    columns = zip(means.T, without.T, strict=True)
    return [bca_interval(draws, [left_out], (n, 0)) for draws, left_out in columns]


def mean_difference(first: ArrayLike, second: ArrayLike, *, seed: Seed = 0) -> Estimate:
    """Mean of first - second over n prompts, with a paired 95 % interval; of rates see ``rates``.

    Prompts are drawn again, and so are random directions.

    Args:
        first: [n].
        second: [n], or [d n]: of d random directions.
        seed: Of the draws.

    Raises:
        GuardError: if there is no row.
    """
    rows = np.atleast_2d(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
    d, n = rows.shape

    def mean(prompts: Array, directions: Array | None = None) -> Array:
        of = np.ones((len(prompts), d)) if directions is None else directions
        value: Array = ((of @ rows) * prompts).sum(1) / of.sum(1) / prompts.sum(1)
        return value

    estimate = weighted_bootstrap(mean, *([n, d] if d > 1 else [n]), seed=seed)
    return replace(estimate, n=(n, 0))


def _crossed(first: Sequence[object], second: Sequence[object]) -> list[Sequence[object]]:
    """The owners to draw: both, or the coarser one where the other lies within it.

    Where all values have the same owner it is not drawn, as nothing is known of others like it.
    """
    one = _owner_numbers(first)[0]
    other = _owner_numbers(second)[0]
    if not other.max():
        return [first]
    if not one.max():
        return [second]
    cells = len(set(zip(one.tolist(), other.tolist(), strict=True)))
    if cells == one.max() + 1:  # each of the first has a single one of the second
        return [second]
    return [first] if cells == other.max() + 1 else [first, second]


def _owner_numbers(owners: int | Sequence[object]) -> tuple[NDArray[np.intp], int]:
    """Number of the owner of each row, and how many owners there are."""
    if isinstance(owners, int):
        _require_rows(owners)
        return np.arange(owners), owners
    _require_rows(len(owners))
    names = {name: number for number, name in enumerate(dict.fromkeys(owners))}
    return np.array([names[owner] for owner in owners]), len(names)


def _without_each(owners: int | Sequence[object]) -> Array:
    """Weights without the rows of each owner in turn, [owners n]."""
    numbers, k = _owner_numbers(owners)
    weights: Array = (np.arange(k)[:, None] != numbers).astype(np.float64)
    return weights


def _require_rows(n: int) -> None:
    if not n:
        raise GuardError("A figure needs at least one row; found none.")

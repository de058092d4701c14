"""How alike the harmfulness direction and the refusal direction are (section 3.4), layer by layer.

Axis names in shapes: n prompts, p the two positions, l layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latentguard.report.charts import Curve, to_curve
from latentguard.stats.bootstrap import resample_weights, weighted_bootstrap
from latentguard.stats.estimate import Estimate
from latentguard.stats.intervals import centered_interval

SPLITS = 100
"""Times that the prompts are split in two."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DirectionCosine:
    """Cosines by layer."""

    between: Array
    """Of the direction at one position with that at the other, [1 + draws, l]; all prompts first,
    then bootstrap draws, in which both directions are fitted on the same prompts."""

    itself: Array
    """Of each direction fitted on one half of the prompts with it fitted on the other half,
    [p splits l]: what a cosine can be with so few prompts."""

    noiseless: Estimate
    """Mean over the layers of the cosine that directions of endlessly many prompts would have."""

    fitted: tuple[int, int]
    """How many prompts of either group."""

    @property
    def mean(self) -> Estimate:
        """Mean over the layers of the cosine of the two directions, with its 95 % interval."""
        return replace(centered_interval(self.between.mean(1)), n=self.fitted)

    @property
    def bands(self) -> list[Curve]:
        """By layer: the two directions (95 % bootstrap), then each with itself (95 % of splits)."""
        between = to_curve([centered_interval(layer) for layer in self.between.T])
        return [between, *(_band(rows.mean(0), rows) for rows in self.itself)]


def compare_directions(positive: Array, negative: Array, *, seed: int = 0) -> DirectionCosine:
    """Cosines between the directions at two positions.

    Args:
        positive: States of the positive group, [n p l d], with p = 2 and n of 2 or more.
        negative: States of the negative group, [n p l d].
        seed: Of the draws and the splits.
    """
    rng = np.random.default_rng(seed)
    sides = [positive, negative]
    sizes = [len(side) for side in sides]
    weights = [resample_weights(n, seed=rng) for n in sizes]
    masks = [np.array([rng.permutation(n) < n // 2 for _ in range(SPLITS)]) for n in sizes]
    between, itself = [], []
    for layer in range(positive.shape[2]):
        here = [side[:, :, layer] for side in sides]
        both = _directions(here, weights)
        between.append(_cosine(both[:, 0], both[:, 1]))
        halves = (_directions(here, half) for half in (masks, [~mask for mask in masks]))
        itself.append(_cosine(*halves))
    return DirectionCosine(
        np.stack(between, -1),
        np.stack(itself, -1).swapaxes(0, 1),
        _without_noise(sides, rng),
        (sizes[0], sizes[1]),
    )


def _without_noise(sides: Sequence[Array], seed: np.random.Generator) -> Estimate:
    """The cosine of the directions without what a few prompts add by chance.

    Noise lengthens both directions, which lowers the cosine. Both are fitted on the same prompts,
    whose states at both positions share some noise, which moves it. So the inner products leave out
    every product of a prompt with itself (a U-statistic). Each layer counts by the product of both
    lengths. Not a number if noise is all there is.
    """
    layers = range(sides[0].shape[2])
    plain = [_inner_products([side[:, :, n] for side in sides]) for n in layers]
    scales = [max(float(one[0] * one[2]) ** 0.5, 1e-12) for one in plain]

    def cosine(*weights: Array) -> Array:
        inner = np.zeros(len(weights[0]))
        lengths = np.zeros(len(weights[0]))
        for layer, scale in zip(layers, scales, strict=True):
            first, both, second = _inner_products([side[:, :, layer] for side in sides], weights)
            inner += both / scale
            lengths += np.sqrt(np.maximum(first, 0) * np.maximum(second, 0)) / scale
        cosines: Array = np.clip(inner / np.where(lengths > 0, lengths, np.nan), -1, 1)
        return cosines

    return weighted_bootstrap(cosine, *(len(side) for side in sides), seed=seed)


def _inner_products(sides: Sequence[Array], weights: Sequence[Array] | None = None) -> Array:
    """Inner products of the directions, first with first, first with second, second with second.

    Args:
        sides: States of both groups at a layer, [n p d] each.
        weights: Of the prompts of each group, [r n]; products of a prompt with itself are then left
            out.
    """
    pairs = ((0, 0), (0, 1), (1, 1))
    if weights is None:
        one, other = _directions(sides, [np.ones((1, len(side))) for side in sides])[0]
        return np.array([one @ one, one @ other, other @ other])
    directions = _directions(sides, weights)
    products = [(directions[:, a] * directions[:, b]).sum(-1) for a, b in pairs]
    for side, weight in zip(sides, weights, strict=True):
        shares = weight / weight.sum(1, keepdims=True)
        squares = (shares**2).sum(1)
        apart = side - side.mean(0)
        means = np.tensordot(shares, apart, axes=1)
        for k, (a, b) in enumerate(pairs):
            own = shares**2 @ (apart[:, a] * apart[:, b]).sum(-1)
            every = (means[:, a] * means[:, b]).sum(-1)
            products[k] += (every - own) / np.maximum(1 - squares, 1e-12) - every
    return np.stack(products)


def _directions(sides: Sequence[Array], weights: Sequence[NDArray[np.generic]]) -> Array:
    """Differences of weighted means, [draws p d], of states [n p d] with weights [draws n]."""
    up, down = (
        np.tensordot(w / w.sum(1, keepdims=True), side, axes=1)
        for side, w in zip(sides, weights, strict=True)
    )
    differences: Array = up - down
    return differences


def _cosine(a: Array, b: Array) -> Array:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: Array = (a * b).sum(-1) / np.maximum(norms, 1e-12)
    return cosines


def _band(value: Array, draws: Array) -> Curve:
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return value.tolist(), low.tolist(), high.tolist()

"""How alike the harmfulness direction and the refusal direction are (section 3.4), layer by layer.

Axis names in shapes: n prompts, p the two positions, l layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latentguard.stats.bootstrap import resample_weights
from latentguard.stats.estimate import Estimate
from latentguard.stats.intervals import centered_interval

SPLITS = 100
"""Times that the prompts are split in two."""

Array = NDArray[np.float64]
Band = tuple[list[float], list[float], list[float]]
"""Value, low and high end by layer."""


@dataclass(frozen=True)
class DirectionCosine:
    """Cosines by layer."""

    between: Array
    """Of the direction at one position with that at the other, [1 + draws, l]; all prompts first,
    then bootstrap draws, in which both directions are fitted on the same prompts."""

    itself: Array
    """Of each direction fitted on one half of the prompts with it fitted on the other half,
    [p splits l]: what a cosine can be with so few prompts."""

    fitted: tuple[int, int]
    """How many prompts of either group."""

    @property
    def mean(self) -> Estimate:
        """Mean over the layers of the cosine of the two directions, with its 95 % interval."""
        return replace(centered_interval(self.between.mean(1)), n=self.fitted)

    @property
    def noiseless(self) -> Estimate:
        """The same over what it can be with so few prompts, as any noise makes directions differ.

        Spearman's correction: over the mean of the geometric means of what each direction's cosine
        with itself would be, fitted twice on as many prompts (Spearman and Brown, from halves). Not
        a number if halves have nothing in common.
        """
        halves = np.maximum(self.itself.mean(1), 0)
        whole = 2 * halves / (1 + halves)
        most = float(np.sqrt(whole[0] * whole[1]).mean()) or np.nan
        return replace(centered_interval(self.between.mean(1) / most), n=self.fitted)

    @property
    def bands(self) -> list[Band]:
        """By layer: the two directions (95 % bootstrap), then each with itself (95 % of splits)."""
        both = [centered_interval(layer) for layer in self.between.T]
        between = [e.value for e in both], [e.low for e in both], [e.high for e in both]
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
        np.stack(between, -1), np.stack(itself, -1).swapaxes(0, 1), (sizes[0], sizes[1])
    )


def _directions(sides: Sequence[Array], weights: Sequence[NDArray[np.generic]]) -> Array:
    """Differences of weighted means, [draws p d], of states [n p d] with weights [draws n]."""
    up, down = (
        np.tensordot(w / w.sum(1, keepdims=True), side, axes=1)
        for side, w in zip(sides, weights, strict=True)
    )
    found: Array = up - down
    return found


def _cosine(a: Array, b: Array) -> Array:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    found: Array = (a * b).sum(-1) / np.maximum(norms, 1e-12)
    return found


def _band(value: Array, draws: Array) -> Band:
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return value.tolist(), low.tolist(), high.tolist()

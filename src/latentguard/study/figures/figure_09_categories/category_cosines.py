"""How alike the directions of risk categories are (appendix D), and how alike chance makes them.

A direction is the mean state of a category's prompts less that of the harmless prompts. Few prompts
make it noisy, and noise alone lowers cosines; so each figure stands beside the same figure for
categories without meaning, and for halves of one category.

Axis names in shapes: c categories, n harmful prompts, m harmless ones, k = n + m, l layers,
d width, r draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from latentguard.stats.bootstrap import resample_weights

DRAWS = 500
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Cloud:
    """States of all prompts at one position, by their inner products."""

    inner: NDArray[np.float32]
    """About the harmless centroid, harmful prompts first, [l k k]."""

    category: NDArray[np.intp]
    """Of each harmful prompt, 0 to c - 1, [n]."""

    @staticmethod
    def of(
        harmful: Float[Tensor, "n l d"], harmless: Float[Tensor, "m l d"], category: Sequence[int]
    ) -> Cloud:
        """Reduce states to what directions and their cosines need."""
        grams = []
        for layer in range(harmful.shape[1]):
            sides = [side[:, layer].double().numpy() for side in (harmful, harmless)]
            x = np.concatenate(sides) - sides[1].mean(0)
            grams.append((x @ x.T).astype(np.float32))
        return Cloud(np.stack(grams), np.asarray(category, dtype=np.intp))

    def among(self, chosen: Sequence[int]) -> Cloud:
        """The same of a few categories, numbered anew in the order given."""
        rows = np.flatnonzero(np.isin(self.category, chosen))
        every = np.r_[rows, len(self.category) : self.inner.shape[1]]
        number = {c: k for k, c in enumerate(chosen)}
        few = np.array([number[c] for c in self.category[rows]], dtype=np.intp)
        return Cloud(self.inner[:, every][:, :, every], few)

    @property
    def sizes(self) -> NDArray[np.intp]:
        """How many prompts each category has, [c]."""
        return np.bincount(self.category)

    @property
    def harmless(self) -> int:
        """How many harmless prompts, m."""
        return int(self.inner.shape[1]) - len(self.category)


def of_directions(directions: Float[Tensor, "c l d"]) -> Array:
    """Cosines between given directions by layer, [l c c]."""
    d = directions.double().numpy().swapaxes(0, 1)
    return _cosines(d @ d.swapaxes(1, 2))


def to_others(cosines: Array) -> Array:
    """Mean cosine of each direction to the others (Figure 9a), [.. c c] to [.. c]."""
    count = cosines.shape[-1]
    means: Array = (cosines.sum(-1) - np.einsum("...cc->...c", cosines)) / (count - 1)
    return means


def resampled_cosines(cloud: Cloud, *, seed: int = 0) -> Array:
    """Cosines [1 + r, l, c, c]: from all prompts, then from bootstrap draws of them.

    The same seed draws the same prompts at every position.
    """
    rng = np.random.default_rng(seed)
    labels = np.tile(cloud.category, (DRAWS + 1, 1))
    counts = np.ones((DRAWS + 1, cloud.inner.shape[1]))
    n = len(cloud.category)
    for rows in (*(np.flatnonzero(cloud.category == c) for c in range(len(cloud.sizes))), None):
        size = cloud.harmless if rows is None else len(rows)
        columns = np.arange(n, n + size) if rows is None else rows
        counts[:, columns] = resample_weights(size, draws=DRAWS, seed=rng)
    weights = _weights(labels, counts)
    return _between(cloud, weights, weights)


def shuffled_cosines(cloud: Cloud, *, draws: int = 100, seed: int = 0) -> Array:
    """Cosines [r l c c] when the prompts are dealt to categories of the same sizes at random."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.permutation(cloud.category) for _ in range(draws)])
    weights = _weights(labels, np.ones((draws, cloud.inner.shape[1])))
    return _between(cloud, weights, weights)


def halved_cosines(cloud: Cloud, *, draws: int = 100, seed: int = 0) -> Array:
    """Cosines [r l c c] of one random half of each category (row) with the other halves (column).

    On the diagonal both halves are of one category: what a cosine can be with so few prompts.
    """
    rng = np.random.default_rng(seed)
    labels = np.tile(cloud.category, (draws, 1))
    first = np.ones((draws, cloud.inner.shape[1]))
    for draw in first:
        for c in range(len(cloud.sizes)):
            rows = rng.permutation(np.flatnonzero(cloud.category == c))
            draw[rows[: len(rows) // 2]] = 0
    second = np.ones_like(first)
    second[:, : labels.shape[1]] -= first[:, : labels.shape[1]]
    return _between(cloud, _weights(labels, first), _weights(labels, second))


def _weights(labels: NDArray[np.intp], counts: Array) -> Array:
    """Each direction as a sum over prompts [r c k], from labels [r n] and counts [r k]."""
    n = labels.shape[1]
    up = (labels[:, None] == np.arange(labels.max() + 1)[:, None]) * counts[:, None, :n]
    up = up / up.sum(2, keepdims=True)
    down = counts[:, n:] / counts[:, n:].sum(1, keepdims=True)
    return np.concatenate([up, -np.repeat(down[:, None], up.shape[1], 1)], 2)


def _between(cloud: Cloud, first: Array, second: Array) -> Array:
    """Cosines of directions [r c k] with directions [r c k] by layer, [r l c c]."""
    same = first is second
    one, two = first.astype(np.float32), second.astype(np.float32)
    cosines = []
    for inner in cloud.inner:
        turned = one @ inner
        products = turned @ two.swapaxes(1, 2)
        square = np.einsum("rck,rck->rc", turned, one)
        other = square if same else np.einsum("rck,rck->rc", two @ inner, two)
        cosines.append(_cosines(products, square, other))
    return np.stack(cosines, 1)


def _cosines(inner: ArrayLike, first: Array | None = None, second: Array | None = None) -> Array:
    """Inner products [.. c c] over the lengths, whose squares are on the diagonal by default."""
    products = np.asarray(inner, dtype=np.float64)
    own = np.einsum("...cc->...c", products)
    a, b = (np.sqrt(np.maximum(own if s is None else s, 1e-24)) for s in (first, second))
    cosines: Array = products / (a[..., :, None] * b[..., None, :])
    return cosines

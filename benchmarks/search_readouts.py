"""Probes that ``detection_search.py`` tries, in dual form: a coefficient a row, and a level.

Axis names in shapes: n rows, s slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.probes.ridge import Design, Ridge, primal

Solution = tuple[Float[Tensor, "n"], float]
Dual = Callable[[Design], Solution]
"""From a design to a coefficient for each of its weighted rows, and the level of the scores."""

STEPS, CLOSE = 12, 0.01
"""Newton steps of the logistic probe at the most; they end where no score moves by more."""


def ridge(strength: float) -> Dual:
    """The library's."""
    return lambda design: (Ridge(design, strength).dual[:, 0], float(design.level[0]))


def low_rank(rank: int) -> Dual:
    """Least squares on the first principal components."""

    def solve(design: Design) -> Solution:
        u, s, _ = torch.svd_lowrank(design.gram, q=rank + 16, niter=4)
        u, s = u[:, :rank].double(), s[:rank].double()
        return u @ ((u.T @ design.targets[:, 0]) / s), float(design.level[0])

    return solve


def logistic(strength: float) -> Dual:
    """Logistic regression by Newton's method; the penalty in units of the mean square of a row."""

    def solve(design: Design) -> Solution:
        root = design.root[:, 0]
        gram = design.gram.double() / root[:, None] / root
        y = (design.targets[:, 0] / root + design.level[0] + 1) / 2
        score = torch.zeros_like(y)
        for _ in range(STEPS):
            before, (dual, level) = score, _step(gram, y, root, score, strength)
            score = gram @ dual + level
            if float((score - before).abs().max()) < CLOSE:
                break
        return dual / root, level

    return solve


def _step(gram: Tensor, y: Tensor, root: Tensor, score: Tensor, strength: float) -> Solution:
    """One step: a weighted ridge with a level of its own."""
    chance = torch.sigmoid(score)
    spread = (chance * (1 - chance)).clamp_min(1e-6)
    wanted, own = score + (y - chance) / spread, root * spread.sqrt()
    system = gram * own[:, None] * own
    system.diagonal().add_(strength * gram.diagonal().mean())
    sides = torch.cholesky_solve(torch.stack([own * wanted, own], 1), torch.linalg.cholesky(system))
    level = float((own @ sides[:, 0]) / (own @ sides[:, 1]))
    return own * (sides[:, 0] - level * sides[:, 1]), level


def solved(solve: Dual, design: Design) -> tuple[Float[Tensor, "s d"], float]:
    """Weights and bias in the units of the raw states."""
    dual, level = solve(design)
    weight, shift = primal(design, dual[:, None])
    return weight[0], level - float(shift[0])

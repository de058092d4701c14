"""Ridge regression on states in dual form: many features, few rows, exact held-out scores.

Axis names in shapes: n rows, s slots (each position in turn, each layer in turn), c targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

FOLDS = 5


class Design:
    """Weighted, standardised training states, with one Gram matrix a band of layers."""

    def __init__(
        self,
        states: Float[Tensor, "n s d"],
        targets: Float[Tensor, "n c"],
        weights: Float[Tensor, "n"],
        layers: Sequence[int],
    ) -> None:
        """Standardise.

        Args:
            states: Training states.
            targets: What is to be predicted, each column by itself.
            weights: Of each row; their mean is 1.
            layers: Layer index of each slot of ``states`` (several positions repeat the layers).
        """
        self.root = weights.double().sqrt()[:, None]
        self.level = (weights.double()[:, None] * targets.double()).mean(0)
        self.targets = (targets.double() - self.level) * self.root
        self.mean = torch.einsum("n,nsd->sd", weights.float(), states.float()) / len(states)
        spread = states.float().std(0)
        constant = spread <= 1e-5 * self.mean.abs()  # but for rounding; would be all noise below
        self.scale = spread.masked_fill(constant, torch.inf)
        self.states, self.layers = states, layers
        self._grams: dict[tuple[int, ...], Tensor] = {}

    def slots(self, band: Sequence[int]) -> list[int]:
        """Where the layers of a band lie in ``states``: a layer has one slot a position."""
        return [slot for slot, layer in enumerate(self.layers) if layer in band]

    def slot(self, slot: int) -> Float[Tensor, "n d"]:
        """Standardised states of one slot, rows weighted, float32."""
        z = (self.states[:, slot].float() - self.mean[slot]) / self.scale[slot]
        return z * self.root.float()

    def gram(self, band: Sequence[int]) -> Float[Tensor, "n n"]:
        """Inner products of all rows over the slots of a band, float32."""
        if tuple(band) not in self._grams:
            self.prepare([band])
        return self._grams[tuple(band)]

    def prepare(self, bands: Iterable[Sequence[int]]) -> None:
        """Compute ``gram`` of several bands, each layer once: they overlap."""
        keys = dict.fromkeys(tuple(band) for band in bands)
        sums = {key: torch.zeros(len(self.states), len(self.states)) for key in keys}
        for slot, layer in enumerate(self.layers):
            holders = [key for key in keys if layer in key]
            if holders:
                z = self.slot(slot)
                product = z @ z.T
                for key in holders:
                    sums[key] += product
        self._grams |= sums


class Ridge:
    """Ridge regression on the concatenated slots of a band."""

    def __init__(self, design: Design, band: Sequence[int], strength: float) -> None:
        """Solve; ``strength`` is in units of the mean eigenvalue of the Gram matrix."""
        self.design, self.slots = design, design.slots(band)
        gram = design.gram(band).double()
        gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.dual = self.inverse @ design.targets

    def solve(self) -> tuple[Float[Tensor, "c s d"], Float[Tensor, "c"]]:
        """Weights and biases in the units of the raw states, float32."""
        dual = self.dual.float().T
        rows = [dual @ self.design.slot(slot) for slot in self.slots]
        weight = torch.stack(rows, dim=1) / self.design.scale[self.slots]
        shift = torch.einsum("csd,sd->c", weight, self.design.mean[self.slots])
        return weight, self.design.level.float() - shift

    def held_out(self, folds: Sequence[Tensor]) -> Float[Tensor, "n c"]:
        """Score of each row by the ridge without its fold, by the block inverse formula."""
        residual = torch.empty_like(self.dual)
        for rows in folds:
            residual[rows] = torch.linalg.solve(self.inverse[rows][:, rows], self.dual[rows])
        return (self.design.targets - residual) / self.design.root + self.design.level


def folds_of(groups: Sequence[str], seed: int = 0) -> list[Tensor]:
    """Row indices of each fold; a group never straddles folds."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[i]: n % FOLDS for n, i in enumerate(order)}
    of = torch.tensor([fold_of[group] for group in groups])
    return [torch.nonzero(of == fold).squeeze(1) for fold in range(FOLDS)]

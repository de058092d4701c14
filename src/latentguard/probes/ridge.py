"""Ridge regression on states in dual form: many features, few rows, exact held-out scores.

Axis names in shapes: n rows, s slots (each position in turn, each layer in turn), c targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import GuardError

FOLDS = 5


class Design:
    """Weighted, standardised training states and their Gram matrix."""

    def __init__(
        self,
        states: Float[Tensor, "n s d"],
        targets: Float[Tensor, "n c"],
        weights: Float[Tensor, "n"],
    ) -> None:
        """Standardise.

        Args:
            states: Training states.
            targets: What is to be predicted, each column by itself.
            weights: Of each row; their mean is 1.
        """
        self.root = weights.double().sqrt()[:, None]
        self.level = (weights.double()[:, None] * targets.double()).mean(0)
        self.targets = (targets.double() - self.level) * self.root
        self.mean = torch.einsum("n,nsd->sd", weights.float(), states.float()) / len(states)
        spread = states.float().std(0)
        constant = spread <= 1e-5 * self.mean.abs()  # but for rounding; would be all noise below
        self.scale = spread.masked_fill(constant, torch.inf)
        self.states = states

    def slot(self, slot: int) -> Float[Tensor, "n d"]:
        """Standardised states of one slot, rows weighted, float32."""
        z = (self.states[:, slot].float() - self.mean[slot]) / self.scale[slot]
        return z * self.root.float()

    @cached_property
    def gram(self) -> Float[Tensor, "n n"]:
        """Inner products of all rows, float32; one slot at a time is in float32 beside it."""
        total = torch.zeros(len(self.states), len(self.states))
        for slot in range(self.states.shape[1]):
            z = self.slot(slot)
            total.addmm_(z, z.T)
        return total


class Ridge:
    """Ridge regression on all slots together."""

    def __init__(self, design: Design, strength: float) -> None:
        """Solve; ``strength`` is in units of the mean of the Gram matrix's diagonal."""
        self.design = design
        gram = design.gram.double()
        gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.dual = self.inverse @ design.targets

    def solve(self) -> tuple[Float[Tensor, "c s d"], Float[Tensor, "c"]]:
        """Weights and biases in the units of the raw states, float32."""
        weight, shift = primal(self.design, self.dual)
        return weight, self.design.level.float() - shift

    def held_out(self, folds: Sequence[Tensor]) -> Float[Tensor, "n c"]:
        """Score of each row by the ridge without its fold, by the block inverse formula."""
        residual = torch.empty_like(self.dual)
        for rows in folds:
            residual[rows] = torch.linalg.solve(self.inverse[rows][:, rows], self.dual[rows])
        return (self.design.targets - residual) / self.design.root + self.design.level


def primal(
    design: Design, dual: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, "c s d"], Float[Tensor, "c"]]:
    """Weights in the units of the raw states, and their score of the mean state, float32."""
    rows, slots = dual.float().T, range(design.states.shape[1])
    weight = torch.stack([rows @ design.slot(s) for s in slots], dim=1) / design.scale
    return weight, torch.einsum("csd,sd->c", weight, design.mean)


def require_groups(groups: Sequence[str], fewest: int) -> None:
    """Raise a GuardError if there are too few groups, of pairs or of texts, to cross-validate."""
    if (count := len(set(groups))) < fewest:
        raise GuardError(
            f"Cross-validation needs at least {fewest} different texts, or pairs of texts; found "
            f"{count}. Is the same 'pair' given to all rows?"
        )


def folds_of(groups: Sequence[str], seed: int = 0) -> list[Tensor]:
    """Row indices of each fold; a group never straddles folds.

    Raises:
        GuardError: if there is one group alone.
    """
    require_groups(groups, 2)
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[i]: n % FOLDS for n, i in enumerate(order)}
    of = torch.tensor([fold_of[group] for group in groups])
    return [torch.nonzero(of == fold).squeeze(1) for fold in range(FOLDS)]

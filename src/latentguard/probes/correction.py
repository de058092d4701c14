"""Correction of a probe: a few labelled rows -> a linear change of its score.

The change is the smallest that explains the labels: ridge regression on features of the states,
with the score before the change as one more feature. Two penalties hold it back.

- The size of the change; how much it counts is chosen by cross-validation.
- How much the change varies over a *reference*, prompts of all kinds that are read without their
  labels. What the labels do not speak of stays as it was, and a hundred labels are enough.

Axis names in shapes: n labelled rows, m reference rows, k features, v texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

REFERENCE_WEIGHT = 1.0
"""Weight of the change over the reference; that of all labels together is 1. With more, less is
learned; with less, more is forgotten (docs/results/adaptation.md)."""

FOLDS = 10
"""Of cross-validation; fewer where a class has fewer groups."""

FEWEST = 5
"""Rows of each class from which on the labels also say where scores lie, not only how they rank."""

Scores = Float[NDArray[np.float64], "n"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled prompts, as a probe reads them."""

    scores: Scores
    """Before the change."""

    features: Float[NDArray[np.float64], "n k"]
    """Of the states."""

    harmful: Bool[NDArray[np.bool_], "n"]
    """The labels."""


@dataclass(frozen=True, eq=False)
class Correction:
    """The changed score: ``gain * score + features . direction + shift``.

    On harmless rows of the reference it has the mean and the standard deviation of the score
    before, and so its unit.
    """

    gain: float
    """Of the score before."""

    direction: Float[NDArray[np.float64], "k"]
    """Of the features."""

    shift: float
    """Added to the sum."""

    def __call__(
        self, scores: Float[NDArray[np.float64], "v"], features: Float[NDArray[np.float64], "v k"]
    ) -> Float[NDArray[np.float64], "v"]:
        """The changed scores."""
        return np.asarray(self.gain * scores + features @ self.direction + self.shift)


NO_CORRECTION = Correction(1.0, np.zeros(0), 0.0)
"""Leaves scores as they are."""


@dataclass(frozen=True, eq=False)
class CorrectionFit:
    """A correction, with corrections that did not see some of the rows."""

    correction: Correction
    """Fitted on all rows."""

    folds: Sequence[Correction]
    """Fitted without the rows of each fold."""

    fold_of: Int[NDArray[np.int64], "n"]
    """The fold of each row."""

    def held_out(
        self,
        owners: Int[NDArray[np.int64], "v"],
        scores: Float[NDArray[np.float64], "v"],
        features: Float[NDArray[np.float64], "v k"],
    ) -> Float[NDArray[np.float64], "v"]:
        """The changed scores of texts, each by a correction that did not see its row.

        Args:
            owners: The row that each text belongs to.
            scores: Before the change.
            features: Of the states.
        """
        changed = np.empty(len(scores))
        fold = self.fold_of[owners]
        for number, correction in enumerate(self.folds):
            own = fold == number
            changed[own] = correction(scores[own], features[own])
        return changed


def fit_correction(
    rows: Rows,
    groups: Int[NDArray[np.int64], "n"],
    reference: Rows,
    penalty: float,
    *,
    weight: float = 1.0,
) -> CorrectionFit:
    """As ``fit_corrections``, with one penalty."""
    return fit_corrections(rows, groups, reference, [penalty], weight=weight)[0]


def fit_corrections(
    rows: Rows,
    groups: Int[NDArray[np.int64], "n"],
    reference: Rows,
    penalties: Sequence[float],
    *,
    weight: float = 1.0,
) -> list[CorrectionFit]:
    """Fit a correction for each penalty, on all rows and without each fold.

    Args:
        rows: What they are learned from.
        groups: Rows of the same group are held out together.
        reference: What the change is measured against. Its labels only give the unit of scores.
        penalties: On the size of the change, in units of the variance of all features together over
            the reference; divided by the number of rows.
        weight: Of all labels together.
    """
    unit, level = _base_map(reference)
    around = np.column_stack([unit * reference.scores, reference.features])
    center = around.mean(0)
    around = around - center
    inputs = np.column_stack([unit * rows.scores, rows.features]) - center
    inputs = np.column_stack([np.ones(len(inputs)), inputs])
    targets = np.where(rows.harmful, 1.0, -1.0) - unit * rows.scores - level
    metric = np.zeros((inputs.shape[1],) * 2)
    metric[1:, 1:] = REFERENCE_WEIGHT * around.T @ around / len(around)
    size = float(around[:, 1:].var(0).sum())
    fold_of = _folds(rows.harmful, groups)
    count = int(fold_of.max()) + 1
    sums = {
        (fold, side): _Sums.of(inputs[own], targets[own])
        for fold in range(count)
        for side in (True, False)
        for own in [(fold_of == fold) & (rows.harmful == side)]
    }

    def fitted(left_out: int | None, penalty: float) -> Correction:
        sides = [
            [one for (fold, own), one in sums.items() if own == side and fold != left_out]
            for side in (True, False)
        ]
        counts = [sum(one.count for one in side) for side in sides]
        matrix, vector = metric.copy(), np.zeros(len(metric))
        held = np.full(len(metric), penalty * size / sum(counts))
        held[:2] = 0.0 if min(counts) >= FEWEST else 1e6, 0.0
        matrix[np.diag_indices_from(matrix)] += held
        for side, number in zip(sides, counts, strict=True):
            share = weight / (np.count_nonzero(counts) * max(number, 1))
            for one in side:
                matrix += share * one.matrix
                vector += share * one.vector
        change = np.asarray(np.linalg.solve(matrix, vector), dtype=np.float64)
        return _in_unit_of(reference, unit * (1 + change[1]), change[2:])

    fits = []
    for penalty in penalties:
        whole = fitted(None, penalty)
        folds = [fitted(fold, penalty) for fold in range(count)] if count > 1 else [whole]
        fits.append(CorrectionFit(whole, folds, fold_of))
    return fits


@dataclass(frozen=True, eq=False)
class _Sums:
    """What some rows of one class add to the normal equations."""

    count: int
    matrix: Float[NDArray[np.float64], "j j"]
    vector: Float[NDArray[np.float64], "j"]

    @staticmethod
    def of(inputs: Float[NDArray[np.float64], "n j"], targets: Scores) -> _Sums:
        return _Sums(len(targets), inputs.T @ inputs, inputs.T @ targets)


def _folds(
    harmful: Bool[NDArray[np.bool_], "n"], groups: Int[NDArray[np.int64], "n"]
) -> Int[NDArray[np.int64], "n"]:
    """The fold of each row: classes alike in all, groups together. One fold holds nothing out."""
    fold_of = np.zeros(len(groups), dtype=np.int64)
    count = min(FOLDS, *(len(np.unique(groups[harmful == side])) for side in (True, False)))
    if count < 2:
        return fold_of
    splits = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    for fold, (_, held_out) in enumerate(splits.split(groups, harmful, groups)):
        fold_of[held_out] = fold
    return fold_of


def class_weights(harmful: Bool[NDArray[np.bool_], "n"]) -> Scores:
    """Weights that sum to 1, each class with half of them; alone, a class has all."""
    counts = np.bincount(harmful, minlength=2)
    return np.asarray(1 / (counts[harmful.astype(int)] * (counts > 0).sum()))


def _base_map(reference: Rows) -> tuple[float, float]:
    """Slope and intercept of the least-squares line from scores to -1 and +1."""
    root = np.sqrt(class_weights(reference.harmful))
    design = np.column_stack([reference.scores, np.ones(len(root))]) * root[:, None]
    targets = np.where(reference.harmful, 1.0, -1.0) * root
    slope, intercept = np.linalg.lstsq(design, targets, rcond=None)[0]
    return float(slope), float(intercept)


def _in_unit_of(
    reference: Rows, gain: float, direction: Float[NDArray[np.float64], "k"]
) -> Correction:
    """Scaled and moved so that harmless rows of the reference score about as before."""
    harmless = ~reference.harmful
    before = reference.scores[harmless]
    after = gain * before + reference.features[harmless] @ direction
    scale = float(before.std() / after.std())
    return Correction(gain * scale, direction * scale, float(before.mean() - scale * after.mean()))

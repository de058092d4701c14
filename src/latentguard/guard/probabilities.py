"""Probabilities: what a score is worth, fitted on held-out labelled prompts: Platt or isotonic.

The map with the lower cross-validated log loss is taken. Both classes weigh the same, as the guard
does not know how frequent harm is where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from latentguard.errors import GuardError
from latentguard.guard.reliability import Labels, Method, Reliability, Scores, log_loss, weights_of
from latentguard.probes.ridge import FOLDS, require_groups

MIN_PROMPTS = 30
"""Prompts of each class that the choice needs."""


@dataclass(frozen=True)
class IsotonicMap:
    """A rising, piecewise linear map from score to probability."""

    scores: tuple[float, ...]
    """Rising, [k]."""

    probabilities: tuple[float, ...]
    """Probability at each, [k]."""

    def __call__(self, scores: Scores) -> Scores:
        """The probability of each score; flat beyond the ends."""
        return np.interp(scores, self.scores, self.probabilities)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> IsotonicMap:
        """What ``dataclasses.asdict`` and JSON made of it.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        scores, probabilities = (
            tuple(map(float, record[key])) for key in ("scores", "probabilities")
        )
        if not np.isfinite([scores, probabilities]).all():
            raise ValueError("a point of the isotonic map is not finite")
        return IsotonicMap(scores, probabilities)


@dataclass(frozen=True)
class Probabilities:
    """The map that was taken, and how well it fits."""

    platt: tuple[float, float]
    """Slope and intercept, on all prompts."""

    isotonic: IsotonicMap | None
    """The isotonic map, if it was taken."""

    reliability: Reliability
    """How well it fits."""


def fit_probabilities(
    scores: Scores, labels: Labels, groups: Sequence[str], before: tuple[float, float]
) -> Probabilities:
    """Fit both maps, choose by cross-validated log loss, and measure.

    Args:
        scores: Of held-out prompts, [n].
        labels: True for harmful, [n].
        groups: Rows with the same group fall into the same fold (pairs).
        before: Slope and intercept of the map so far.

    Raises:
        GuardError: if there are fewer than 30 prompts of a class, or fewer groups than folds.
    """
    require_both_classes(labels, groups)
    every: dict[str, Scores] = {"fitted": expit(before[0] * scores + before[1])}
    for name, fit in FITS.items():
        every[name] = _cross_fitted(fit, scores, labels, groups)
    losses = {name: log_loss(labels, probabilities) for name, probabilities in every.items()}
    method: Method = min(("platt", "isotonic"), key=losses.__getitem__)
    reliability = Reliability.of(labels, every, method)
    isotonic = fit_isotonic(scores, labels) if method == "isotonic" else None
    return Probabilities(fit_platt(scores, labels), isotonic, reliability)


def require_both_classes(labels: Labels, groups: Sequence[str]) -> None:
    """Raise ``GuardError`` if there are fewer than 30 prompts, or five groups, of a class."""
    harmful = int(labels.sum())
    harmless = int((~labels).sum())
    if min(harmful, harmless) < MIN_PROMPTS:
        raise GuardError(
            f"Probabilities need at least {MIN_PROMPTS} held-out prompts of each class; found "
            f"{harmful} harmful and {harmless} harmless. Give more, or leave --harmful out."
        )
    for side in (labels, ~labels):
        require_groups(list(compress(groups, side)), FOLDS)


def fit_platt(scores: Scores, labels: Labels) -> tuple[float, float]:
    """Slope and intercept of P(harmful) for equally frequent classes (Platt scaling)."""
    scale = float(scores.std()) or 1.0
    model = LogisticRegression(C=1e3, class_weight="balanced")
    model.fit(scores[:, None] / scale, labels)
    return float(model.coef_[0, 0]) / scale, float(model.intercept_[0])


def fit_isotonic(scores: Scores, labels: Labels) -> IsotonicMap:
    """The best rising map for equally frequent classes; never 0 or 1, which no sample can show."""
    edge = 1 / (len(scores) + 2)
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip")
    model.fit(scores, labels, sample_weight=weights_of(labels))
    return IsotonicMap(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


def _platt(scores: Scores, labels: Labels) -> Callable[[Scores], Scores]:
    slope, intercept = fit_platt(scores, labels)
    return lambda unseen: np.asarray(expit(slope * unseen + intercept))


FITS: dict[Method, Callable[[Scores, Labels], Callable[[Scores], Scores]]] = {
    "platt": _platt,
    "isotonic": fit_isotonic,
}


def _cross_fitted(
    fit: Callable[[Scores, Labels], Callable[[Scores], Scores]],
    scores: Scores,
    labels: Labels,
    groups: Sequence[str],
) -> Scores:
    """The probability of each row by a map that did not see its fold."""
    probabilities = np.empty(len(scores))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for train, test in folds.split(scores, labels, groups):
        probabilities[test] = fit(scores[train], labels[train])(scores[test])
    return probabilities

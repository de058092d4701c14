"""Refit: a guard and labels -> the guard that knows them.

Cross-validation inside the labels chooses the simplest of three: no change; a new threshold and map
to probabilities; a correction of the probe (``correction``). The threshold is set on scores of
harmless labels by corrections that did not see them, so the promise is about the operator's own
traffic. Where these are too few, it stays one about the built-in prompts.

A handful of missed requests (an incident) is too few to choose by: the correction is made, as
strong as it takes to catch them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from latentguard.data.builtin import load_guard_prompts
from latentguard.errors import GuardError
from latentguard.guard.adaptation import Adaptation, LabelBatch, Labels, Reference
from latentguard.guard.features import ReadTexts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.operating_point import RATES
from latentguard.guard.probabilities import (
    MIN_PROMPTS,
    IsotonicMap,
    fit_platt,
    fit_probabilities,
)
from latentguard.guard.reliability import Reliability
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.probes.correction import (
    CorrectionFit,
    Rows,
    class_weights,
    fit_correction,
    fit_corrections,
)
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt
from latentguard.states import Backend, digest_prompts
from latentguard.stats.bounds import (
    Bound,
    clopper_pearson_upper,
    smallest_n,
    threshold_for_fpr,
)

PENALTIES = (1.0, 3.0, 10.0, 30.0)
"""Penalties on the size of a correction. The strongest is taken whose held-out loss is within a
standard error of the best."""

ALIGNED_RATE = 0.05
"""Share of built-in prompts, short and long, above the scores that count as equal."""

FEWEST_TO_CHOOSE = 10
"""Labels of each class from which on cross-validation chooses."""

FEWEST_FLAGGED = 2
"""Harmless labels that a promise about the operator's own traffic may flag, at least."""

STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Weights of an incident's labels that are tried, until all are caught."""

Scores = Float[NDArray[np.float64], "n"]


@dataclass(frozen=True, eq=False)
class Change:
    """What is made of labels."""

    kind: str
    """``none``, ``threshold`` or ``probe``."""

    fit: CorrectionFit | None
    """Of ``probe``."""

    why: str
    """A sentence for people."""


@dataclass(frozen=True, eq=False)
class Refit:
    """A guard fitted to labels, and how it scores them."""

    guard: LatentGuard
    """An ordinary guard."""

    change: Change
    """What was made of the labels."""

    held_out: Scores
    """Its score of each labelled prompt, by a correction that did not see it."""

    missing: int
    """Harmless labels that are missing for a promise about the operator's own traffic."""

    @property
    def holds_out(self) -> bool:
        """Whether there were labels enough to hold some out."""
        return self.change.fit is None or len(self.change.fit.folds) > 1

    def score(self, texts: ReadTexts) -> Scores:
        """Its scores of other prompts."""
        fit = self.change.fit
        scores = texts.scores
        if fit is not None:
            scores = fit.correction(scores, texts.features.astype(np.float64))
        return texts.combine(scores, self.guard.chunking, self.guard.threshold)

    def flags(
        self, scores: Scores, segments: Sequence[str], chunked: Bool[NDArray[np.bool_], "n"]
    ) -> Bool[NDArray[np.bool_], "n"]:
        """Which prompts it flags.

        Args:
            scores: Of each.
            segments: Of each; empty text for none.
            chunked: Which are read by chunks, whose scores are in the unit of one threshold.
        """
        cuts = [
            self.guard.threshold_for(segment or None, has_evidence=bool(by_chunks))
            for segment, by_chunks in zip(segments, chunked, strict=True)
        ]
        return np.asarray(scores > np.array(cuts))


def base_of(guard: LatentGuard) -> LatentGuard:
    """The guard as it was before it learned any labels."""
    adaptation = guard.adaptation
    if adaptation is None:
        return replace(guard, reference=None)
    now = replace(guard, reference=None, adaptation=None).to_dict()[1]
    base = LatentGuard.from_dict(adaptation.base_record, {**now, **adaptation.base_tensors})
    return replace(base, own_model=guard.own_model)


def require_able(guard: LatentGuard) -> None:
    """Raise a GuardError if a guard cannot learn labels."""
    if guard.bound is None:
        raise GuardError(
            "This guard promises no false-positive rate that could be kept; run "
            "'latentguard calibrate' first."
        )
    if guard.categories and guard.categories.packs:
        raise GuardError(
            "This guard has category packs, whose scores labels do not change: remove them with "
            "'latentguard pack remove', and teach their examples with 'latentguard adapt'."
        )


def refit(
    base: LatentGuard,
    reference: Reference,
    labels: Labels | None,
    *,
    max_fpr: float | None = None,
) -> Refit:
    """Fit a guard to labels. The same labels in any order give the same guard.

    Args:
        base: Before it learned any.
        reference: What a change is measured against.
        labels: All that it is to know; None for the guard as it is.
        max_fpr: The rate to keep; None for that of ``base``.
    """
    if labels is None:
        return Refit(base, Change("none", None, "It has learned no labels."), np.zeros(0), 0)
    rates = _rates(base, max_fpr)
    change = choose_change(base, reference, labels, rates)
    guard = _corrected(base, reference, change.fit)
    texts = labels.texts
    scores = texts.scores
    if change.fit is not None:
        scores = change.fit.held_out(texts.owners, scores, texts.features.astype(np.float64))
    missing = max(enough_harmless(rates) - int((~labels.harmful).sum()), 0)
    if change.kind != "none":
        guard = _calibrated(guard, reference, labels, scores, rates, change, missing)
    combined = texts.combine(scores, guard.chunking, guard.threshold)
    refitted = Refit(guard, change, combined, missing)
    is_incident = change.kind == "probe" and _are_few(labels)
    return _with_count(refitted, labels) if is_incident else refitted


def _are_few(labels: Labels) -> bool:
    """Whether there are too few labels of a class for cross-validation."""
    return bool(min(np.bincount(labels.harmful, minlength=2)) < FEWEST_TO_CHOOSE)


def _with_count(refitted: Refit, labels: Labels) -> Refit:
    """Says how many of the harmful labels of an incident are flagged in the end."""
    scores = refitted.score(labels.texts)
    flags = refitted.flags(scores, labels.segments, labels.texts.is_chunked)[labels.harmful]
    why = f"{refitted.change.why}: {int(flags.sum())} of {len(flags)} are."
    return replace(refitted, change=replace(refitted.change, why=why))


def with_labels(
    refitted: Refit,
    base: LatentGuard,
    reference: Reference,
    labels: Labels,
    batches: Sequence[LabelBatch],
    max_fpr: float | None,
    backend: Backend,
) -> LatentGuard:
    """The fitted guard with what it has learned, its canaries scored anew."""
    guard = refitted.guard
    if refitted.change.kind != "none":
        guard = replace(guard, early_exit=None).with_canaries(backend)
    digests = torch.cat([base.training_digests, torch.from_numpy(labels.digests)])
    guard = replace(guard, training_digests=torch.unique(digests))
    record, tensors = base.to_dict()
    now = guard.to_dict()[1]
    adaptation = Adaptation(
        batches=tuple(sorted(batches, key=lambda batch: batch.name)),
        labels=labels,
        base_record=record,
        base_tensors={k: t for k, t in tensors.items() if not _is_same(now.get(k), t)},
        choice=refitted.change.why,
        max_fpr=max_fpr,
    )
    return replace(guard, reference=reference, adaptation=adaptation)


def choose_change(base: LatentGuard, reference: Reference, labels: Labels, rates: Rates) -> Change:
    """The simplest change whose held-out log loss is within a standard error of the best.

    Both classes weigh the same. With too few labels to choose it is an incident: the weakest
    correction that flags all harmful labels.
    """
    rows = labels.rows
    kept_back = reference.rows(kept=False)
    if _are_few(labels):
        return _incident(base, reference, labels, rates)
    every = fit_corrections(rows, labels.groups, kept_back, PENALTIES)
    fits = dict(zip(PENALTIES, every, strict=True))
    losses = {
        penalty: _losses(_platt(held_out_rows(fit, rows), rows.harmful), rows.harmful)
        for penalty, fit in fits.items()
    }
    weights = class_weights(rows.harmful)
    best = min(losses, key=lambda p: float(weights @ losses[p]))
    penalty = max(p for p in losses if not _gain(losses[p], losses[best], weights).is_sure)
    own = np.array([base.probability(score) for score in rows.scores])
    as_is = _losses(own, rows.harmful)
    mapped = _losses(_platt(rows.scores, rows.harmful), rows.harmful)
    gain = _gain(mapped, losses[penalty], weights)
    if gain.is_sure:
        return Change("probe", fits[penalty], f"The probe was corrected: {gain}.")
    gain = _gain(as_is, mapped, weights)
    if gain.is_sure:
        return Change("threshold", None, f"Threshold and probabilities were set anew: {gain}.")
    return Change("none", None, f"Nothing was changed, as nothing would help: {gain}.")


@dataclass(frozen=True)
class Gain:
    """By how much a change lowers the held-out log loss, in nats."""

    before: float
    """The loss without the change."""

    after: float
    """With it."""

    error: float
    """Standard error of the difference."""

    @property
    def is_sure(self) -> bool:
        """Whether it is more than a standard error."""
        return self.before - self.after > self.error

    def __str__(self) -> str:
        return (
            f"held-out log loss {self.before:.3f} before and {self.after:.3f} after "
            f"(standard error of the difference {self.error:.3f})"
        )


def _gain(before: Scores, after: Scores, weights: Scores) -> Gain:
    saved = before - after
    mean = float(weights @ saved)
    error = float(np.sqrt((weights**2 * (saved - mean) ** 2).sum()))
    return Gain(float(weights @ before), float(weights @ after), error)


def _losses(probabilities: Scores, harmful: Bool[NDArray[np.bool_], "n"]) -> Scores:
    right = np.where(harmful, probabilities, 1 - probabilities)
    return np.asarray(-np.log(np.clip(right, 1e-6, 1)))


def _platt(scores: Scores, harmful: Bool[NDArray[np.bool_], "n"]) -> Scores:
    slope, intercept = fit_platt(scores, harmful)
    if slope <= 0:  # higher scores are not more harmful: they say nothing
        return np.full(len(scores), 0.5)
    return np.asarray(expit(slope * scores + intercept))


def held_out_rows(fit: CorrectionFit, rows: Rows) -> Scores:
    """Score of each labelled prompt, whole, by a correction that did not see it."""
    return fit.held_out(np.arange(len(rows.scores)), rows.scores, rows.features)


def _incident(base: LatentGuard, reference: Reference, labels: Labels, rates: Rates) -> Change:
    """The weakest correction that flags all harmful labels, at a threshold that keeps the rate."""
    rows = labels.rows
    if not rows.harmful.any():
        return _harmless_alone(len(rows.harmful), rates)
    if (rows.scores[rows.harmful] > base.threshold).all():
        return Change("none", None, "Nothing was changed: all harmful labels are flagged already.")
    harmless = reference.rows(kept=True)
    for strength in STRENGTHS:
        fit = fit_correction(
            rows, labels.groups, reference.rows(kept=False), PENALTIES[0], weight=strength
        )
        change = fit.correction
        scores = change(harmless.scores, harmless.features)[~harmless.harmful]
        threshold = threshold_for_fpr(scores, rates.block, rates.confidence).threshold
        if (change(rows.scores, rows.features)[rows.harmful] > threshold).all():
            break
    return Change(
        "probe",
        fit,
        "There are too few labels for cross-validation, so the probe was corrected just so far "
        "that the harmful ones are flagged",
    )


def _harmless_alone(count: int, rates: Rates) -> Change:
    """What harmless labels alone can do: set the threshold, if they are enough."""
    if count < enough_harmless(rates) or rates.goal.needs_harmful:
        return Change("none", None, "Nothing was changed: there is no harmful label to learn from.")
    return Change("threshold", None, "The threshold was set anew; all labels are harmless.")


def enough_harmless(rates: Rates) -> int:
    """Harmless labels from which on they set the threshold.

    The promise may then flag ``FEWEST_FLAGGED`` of them. With fewer it would hang on the highest
    scores of the sample, and flag far less than it may.
    """
    enough = smallest_n(rates.block, rates.confidence)
    while clopper_pearson_upper(FEWEST_FLAGGED, enough, rates.confidence) > rates.block:
        enough += 1
    return enough


def _rates(base: LatentGuard, max_fpr: float | None) -> Rates:
    """The rate that is asked for, or those of the guard."""
    thresholds = base.thresholds
    bound = thresholds.common.block if thresholds else base.bound
    assert bound is not None
    if max_fpr is not None:
        return Rates(max_fpr, confidence=bound.confidence)
    if thresholds is None or thresholds.point is None:
        return Rates(bound.max_fpr, confidence=bound.confidence)
    goal = thresholds.point.goal
    review = thresholds.common.review
    if goal.needs_harmful:
        return Rates(RATES[-1], None, bound.confidence, goal)
    return Rates(bound.max_fpr, review.max_fpr if review else None, bound.confidence, goal)


def _corrected(base: LatentGuard, reference: Reference, fit: CorrectionFit | None) -> LatentGuard:
    """The guard with its probe corrected; one weight of the same shape."""
    if fit is None:
        return base
    change, probe = fit.correction, base.probe
    weight, bias = reference.feature_map.weight(change.direction)
    corrected = Probe(
        probe.kind,
        probe.layers,
        probe.weight * change.gain + weight,
        probe.bias * change.gain + change.shift + bias,
    )
    return replace(base, probe=corrected)


def _calibrated(
    guard: LatentGuard,
    reference: Reference,
    labels: Labels,
    scores: Float[NDArray[np.float64], "v"],
    rates: Rates,
    change: Change,
    missing: int,
) -> LatentGuard:
    """The guard with thresholds and probabilities for its new scores."""
    if change.fit is not None:
        guard = _calibrated_on_builtin(guard, reference, change.fit, rates, missing)
    own = labels.texts.combine(scores, guard.chunking, guard.threshold)
    prompts = labels.prompts
    counts = np.bincount(labels.harmful, minlength=2)
    if min(counts) >= MIN_PROMPTS:
        groups = [prompt.fold_group for prompt in prompts]
        maps = fit_probabilities(own, labels.harmful, groups, guard.platt)
        guard = _with_maps(guard, maps.platt, maps.isotonic, maps.reliability)
    elif min(counts):
        guard = _with_maps(guard, fit_platt(own, labels.harmful), None, None)
    if missing:
        return guard
    before = guard.thresholds
    assert before is not None
    new = Thresholds.for_goal(prompts, own, rates, before.column)
    new = replace(new, isotonic=before.isotonic, reliability=before.reliability)
    harmless = [prompt for prompt in prompts if not prompt.harmful]
    fitted = {**(guard.fitted or {}), "calibration_sha256": digest_prompts(harmless)}
    return _moved_to(replace(guard, thresholds=new, fitted=fitted), new.common.block)


def _moved_to(guard: LatentGuard, bound: Bound) -> LatentGuard:
    """The guard with another threshold. That of long prompts moves with it: one rate is kept over
    prompts of all lengths together.
    """
    chunking = guard.chunking
    if chunking is not None:
        step = (bound.threshold - guard.threshold) / chunking.chunk_norm.spread
        chunking = replace(chunking, threshold=chunking.threshold + step, bound=bound)
    return replace(guard, threshold=bound.threshold, bound=bound, chunking=chunking)


def _with_maps(
    guard: LatentGuard,
    platt: tuple[float, float],
    isotonic: IsotonicMap | None,
    reliability: Reliability | None,
) -> LatentGuard:
    assert guard.thresholds is not None
    thresholds = replace(guard.thresholds, isotonic=isotonic, reliability=reliability)
    return replace(guard, platt=platt, thresholds=thresholds)


def _calibrated_on_builtin(
    guard: LatentGuard, reference: Reference, fit: CorrectionFit, rates: Rates, missing: int
) -> LatentGuard:
    """The guard with thresholds from built-in harmless prompts, short and long.

    Where labels will set the threshold, they only say which scores of short and of long prompts
    count as equal.
    """
    held = reference.rows(kept=True)
    after = fit.correction(held.scores, held.features)
    chunking, thresholds = guard.chunking, guard.thresholds
    long = _long_scores(guard, reference, fit)
    if not missing:
        cut = float(np.quantile(after[~held.harmful], 1 - ALIGNED_RATE))
        if chunking is not None and long is not None:
            chunking = replace(chunking, threshold=float(np.quantile(long, 1 - ALIGNED_RATE)))
        return replace(guard, threshold=cut, chunking=chunking)
    _require_builtin_calibration(guard, missing)
    builtin = [Prompt(str(n), harmful=bool(h)) for n, h in enumerate(held.harmful)]
    new = Thresholds.for_goal(builtin, after, rates, thresholds.column if thresholds else None)
    block = new.common.block
    if chunking is not None and chunking.bound is not None and long is not None:
        bound = threshold_for_fpr(long, chunking.bound.max_fpr, chunking.bound.confidence)
        chunking = replace(chunking, threshold=bound.threshold, bound=bound)
    return replace(guard, threshold=block.threshold, bound=block, thresholds=new, chunking=chunking)


def _long_scores(guard: LatentGuard, reference: Reference, fit: CorrectionFit) -> Scores | None:
    """Of the long prompts of the reference, in standard deviations as the chunking has them."""
    chunking, texts = guard.chunking, reference.long
    if chunking is None or texts is None:
        return None
    after = fit.correction(texts.scores, texts.features.astype(np.float64))
    plain = replace(chunking, threshold=0.0)
    return np.asarray(texts.combine(after, plain, 0.0) / chunking.chunk_norm.spread)


def _require_builtin_calibration(guard: LatentGuard, missing: int) -> None:
    """Raise a GuardError if the guard's promise was about prompts whose texts are not kept."""
    harmless = [
        p for p in load_guard_prompts("validation") if not p.harmful and not guard.is_chunked(p)
    ]
    if (guard.fitted or {}).get("calibration_sha256") != digest_prompts(harmless):
        raise GuardError(
            f"This guard was calibrated on prompts of your own, whose texts are not kept, so its "
            f"promise needs {missing} more harmless labels of such prompts: give them with "
            "--harmless."
        )


def _is_same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and bool(torch.equal(one, other))

"""What labels changed in a guard, measured on prompts that the change did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from latentguard.guard.adaptation import Labels, Reference
from latentguard.guard.evaluation import Comparison, compare
from latentguard.guard.refit import FEWEST_TO_CHOOSE, PENALTIES, Refit, held_out_rows
from latentguard.guard.verdict import Verdict
from latentguard.probes.correction import Rows, fit_corrections
from latentguard.report.document import Cell, Table
from latentguard.stats.detection import auroc, estimate_metric, f1_at, separation, tpr_at
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion

HALVES = 4
"""Draws of half of the labels that the learning curve is measured on."""

SUSPECTS = 10
"""Labels that are listed because the guard, taught without them, says otherwise."""

SURPRISE = 0.1
"""Held-out probability of the label that a row was given, below which it is listed."""


@dataclass(frozen=True, eq=False)
class ScoredSide:
    """What a guard says of some prompts."""

    scores: Float[NDArray[np.float64], "n"]
    """Of each."""

    flagged: Bool[NDArray[np.bool_], "n"]
    """Whether it is flagged."""


@dataclass(frozen=True)
class Figure:
    """One figure, before and after."""

    prompts: str
    """Of which prompts."""

    name: str
    """Which figure."""

    before: Estimate
    """Of the guard as it was."""

    after: Estimate
    """Of the guard that has learned."""


@dataclass(frozen=True)
class LearningCurve:
    """What more labels would add: AUROC on labels that were held out."""

    half: float
    """Learned from half of the labels."""

    whole: float
    """Learned from all."""

    @property
    def twice(self) -> float:
        """Expected of twice the labels, if the error falls by the same factor once more."""
        error = 1 - self.whole
        return 1 - error * min(error / max(1 - self.half, 1e-9), 1.0)


@dataclass(frozen=True)
class Suspect:
    """A label that contradicts its neighbours."""

    id: str
    """Of the prompt."""

    harmful: bool
    """The label that it was given."""

    probability: float
    """Of harmful, by the guard taught without it."""


@dataclass(frozen=True)
class AdaptationReport:
    """What labels changed in a guard."""

    kind: str
    """``none``, ``threshold`` or ``probe``."""

    why: str
    """Why it was chosen; a sentence."""

    promise: str
    """What the threshold promises now."""

    missing: int
    """Harmless labels that are missing for a promise about the operator's own traffic."""

    holds_out: bool
    """Whether figures on the labels are of corrections that did not see them."""

    figures: tuple[Figure, ...]
    """On the labels, each held out, and on built-in prompts that are kept for this."""

    comparisons: tuple[Comparison, ...]
    """The shares of the labels by category and segment."""

    newly_flagged: int
    """Built-in harmless prompts that are flagged now and were not."""

    builtin_harmless: int
    """Of so many."""

    curve: LearningCurve | None
    """None where there are too few labels."""

    suspects: tuple[Suspect, ...]
    """The labels that contradict their neighbours most."""

    forgotten: float
    """AUROC on the built-in prompts that is lost: what the probe forgot."""

    raised: float
    """Share of the built-in harmful prompts that is caught no more as the harmless labels put the
    threshold higher; 0 where they do not set it."""

    def tables(self) -> list[Table]:
        """Before and after; by category and segment; suspects."""
        rows = tuple(
            (one.prompts, one.name, str(one.before), str(one.after), one.before.total)
            for one in self.figures
        )
        heads = ("prompts", "figure", "before", "after", "n")
        tables = [Table("Before and after", heads, rows, self._notes())]
        groups = tuple(
            (
                one.name,
                "caught" if one.harmful else "falsely flagged",
                str(one.before),
                str(one.after),
                one.after.total,
            )
            for one in self.comparisons
            if one.name != "all"
        )
        if groups:
            tables.append(Table("By category and segment", heads, groups, ""))
        if self.suspects:
            tables.append(_suspect_table(self.suspects))
        return tables

    def _notes(self) -> str:
        notes = [
            "Your labels are scored by corrections that did not see them; built-in prompts were "
            "kept for this. 95 % intervals."
            if self.holds_out
            else "There are too few of your labels to hold any out: their figures are of what was "
            "learned. Built-in prompts were kept for this. 95 % intervals.",
            f"{self.newly_flagged} of {self.builtin_harmless} built-in harmless prompts are newly "
            "flagged.",
        ]
        if self.missing:
            notes.append(
                f"{self.missing} more harmless labels are needed for a promise about your own "
                "traffic; the promise is one about the built-in prompts."
            )
        if self.curve:
            notes.append(
                f"AUROC with half of the labels {self.curve.half:.3f}, with all "
                f"{self.curve.whole:.3f}; about {self.curve.twice:.3f} is to be expected of twice "
                "as many."
            )
        return " ".join(notes)


BUILTIN = "built-in prompts"
OWN = "your labels"
"""Names of the prompts in the table."""


def measure_adaptation(
    before: Refit, after: Refit, reference: Reference, labels: Labels, batch: str
) -> AdaptationReport:
    """Compare a guard before and after it learned a batch; ``suspects`` have digests as ids.

    Args:
        before: The guard without the batch.
        after: The guard with it.
        reference: The built-in prompts.
        labels: All that ``after`` has learned.
        batch: The name of the batch.
    """
    rows = np.flatnonzero(np.array(labels.batches) == batch)
    own = labels.take(rows)
    was = _side(before, before.score(own.texts), own)
    now = _side(after, after.held_out[rows], own)
    builtin = [_builtin_side(one, reference) for one in (before, after)]
    kept = reference.is_kept
    sides = [ScoredSide(one.scores[kept], one.flagged[kept]) for one in builtin]
    harmful = reference.harmful[kept]
    fresh = builtin[1].flagged & ~builtin[0].flagged & ~reference.harmful
    return AdaptationReport(
        kind=after.change.kind,
        why=after.change.why,
        promise=after.guard.promise,
        missing=after.missing,
        holds_out=after.holds_out,
        figures=(
            *_figures(OWN, own.harmful, was, now),
            *_figures(BUILTIN, harmful, *sides),
        ),
        forgotten=_forgotten(harmful, *sides),
        raised=0.0 if after.missing else _raised(harmful, *sides),
        comparisons=tuple(compare(own.prompts, _verdicts(was), _verdicts(now))),
        newly_flagged=int(fresh.sum()),
        builtin_harmless=int((~reference.harmful).sum()),
        curve=learning_curve(reference, labels),
        suspects=_suspects(after, own, now),
    )


def learning_curve(reference: Reference, labels: Labels) -> LearningCurve | None:
    """AUROC on held-out labels, learned from half and from all; None with too few labels."""
    rows = labels.rows
    if min(np.bincount(rows.harmful, minlength=2)) < 2 * FEWEST_TO_CHOOSE:
        return None
    draw = np.random.default_rng(0)
    every = np.arange(len(rows.harmful))
    halves = [
        np.concatenate(
            [draw.permutation(side)[::2] for side in (every[rows.harmful], every[~rows.harmful])]
        )
        for _ in range(HALVES)
    ]
    return LearningCurve(
        float(np.mean([_held_out_area(reference, labels, half) for half in halves])),
        _held_out_area(reference, labels, every),
    )


def _held_out_area(reference: Reference, labels: Labels, rows: NDArray[np.int64]) -> float:
    every = labels.rows
    own = Rows(every.scores[rows], every.features[rows], every.harmful[rows])
    held_back = reference.rows(kept=False)
    fits = fit_corrections(own, labels.groups[rows], held_back, PENALTIES)
    return max(auroc(own.harmful, held_out_rows(fit, own)) for fit in fits)


def _side(refit: Refit, scores: NDArray[np.float64], labels: Labels) -> ScoredSide:
    flagged = refit.flags(scores, labels.segments, labels.texts.is_chunked)
    return ScoredSide(scores, flagged)


def _builtin_side(refit: Refit, reference: Reference) -> ScoredSide:
    scores = refit.score(reference.short)
    return ScoredSide(scores, scores > refit.guard.threshold)


def _figures(
    prompts: str, harmful: Bool[NDArray[np.bool_], "n"], before: ScoredSide, after: ScoredSide
) -> list[Figure]:
    """Caught, falsely flagged, AUROC and F1; those that both classes need only where both are."""
    sides = (before, after)
    figures = []
    if harmful.any():
        figures.append(Figure(prompts, "caught", *(proportion(s.flagged[harmful]) for s in sides)))
    if not harmful.all():
        shares = (proportion(s.flagged[~harmful]) for s in sides)
        figures.append(Figure(prompts, "falsely flagged", *shares))
    if harmful.any() and not harmful.all():
        areas = (separation(s.scores[harmful], s.scores[~harmful]) for s in sides)
        figures.append(Figure(prompts, "AUROC", *areas))
        f1 = f1_at(0.5)
        scores = (estimate_metric(f1, harmful, s.flagged.astype(np.float64)) for s in sides)
        figures.append(Figure(prompts, "F1", *scores))
    return figures


def _forgotten(
    harmful: Bool[NDArray[np.bool_], "n"], before: ScoredSide, after: ScoredSide
) -> float:
    if harmful.all() or not harmful.any():
        return 0.0
    return auroc(harmful, before.scores) - auroc(harmful, after.scores)


def _raised(harmful: Bool[NDArray[np.bool_], "n"], before: ScoredSide, after: ScoredSide) -> float:
    """Recall that is lost by the threshold: against one that flags as many harmless as before."""
    if harmful.all() or not harmful.any():
        return 0.0
    possible = tpr_at(float(before.flagged[~harmful].mean()))(harmful, after.scores)
    return max(possible - float(after.flagged[harmful].mean()), 0.0)


def _verdicts(side: ScoredSide) -> list[Verdict]:
    return [
        Verdict("", float(score), 0.0, bool(flagged), {})
        for score, flagged in zip(side.scores, side.flagged, strict=True)
    ]


def _suspects(after: Refit, labels: Labels, side: ScoredSide) -> tuple[Suspect, ...]:
    """The labels that the guard, taught without them, finds most surprising."""
    if after.change.kind == "none":
        return ()
    harmful = np.array([after.guard.probability(score) for score in side.scores])
    given = np.where(labels.harmful, harmful, 1 - harmful)
    rows = [row for row in np.argsort(given)[:SUSPECTS] if given[row] < SURPRISE]
    return tuple(
        Suspect(str(labels.digests[row]), bool(labels.harmful[row]), float(harmful[row]))
        for row in rows
    )


def _suspect_table(suspects: Sequence[Suspect]) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (one.id, "harmful" if one.harmful else "harmless", round(one.probability, 3))
        for one in suspects
    )
    return Table(
        "Labels to look at again",
        ("prompt", "label", "probability of harmful"),
        rows,
        "By the guard taught without the prompt, where both labels are equally frequent.",
    )

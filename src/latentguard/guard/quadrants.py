"""Quadrants: what the belief of harm and the belief of refusal say together (figure 3's plane).

A prompt that is held for harmful and not refused is a jailbreak suspect; one that is held for
harmless and refused is an over-refusal. A prompt counts as harmful if it is flagged, or if its
Delta_harmful at t_inst is over a cut-off of its own: a jailbreak that hides the harm from the
score, which reads the tokens after the instruction too, may still show there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from latentguard.guard.probabilities import fit_platt
from latentguard.guard.thresholds import Rates
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.report.document import Table
from latentguard.stats.bounds import threshold_for_fpr
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion

HARMFUL = ("harmless", "harmful")
REFUSING = ("accepting", "refusing")
NAMES = tuple(f"{harm}, {reply}" for harm in HARMFUL[::-1] for reply in REFUSING)
"""Of the four."""

MEANING = {
    "harmful, accepting": " (jailbreak suspect)",
    "harmless, refusing": " (over-refusal)",
}

MIN_PROMPTS = 10
"""Refused and accepted prompts that a labelled cut-off needs of each."""

FOLDS = 5


@dataclass(frozen=True)
class Quadrants:
    """Cut-offs of both beliefs, and what fell where among the prompts of the calibration."""

    refuse: float = 0.0
    """A prompt counts as refusing if Delta_refuse is greater; 0 is half way (equation 4)."""

    harmful: float | None = None
    """It counts as harmful if flagged, or if Delta_harmful is greater; None: only if flagged."""

    basis: str = "not calibrated: half way between the centroids"
    """Where the cut-off of refusing comes from, in words."""

    refused: Estimate | None = None
    """Share of refused prompts that count as refusing, cross-fitted; None if none were labelled."""

    accepted: Estimate | None = None
    """Share of accepted prompts that count as refusing, cross-fitted."""

    shares: tuple[tuple[str, str, Estimate], ...] = ()
    """Side (harmful, harmless), quadrant, and the share of that side that fell there."""

    @staticmethod
    def of(
        prompts: Sequence[Prompt],
        verdicts: Sequence[Verdict],
        rates: Rates,
        before: Quadrants | None = None,
    ) -> Quadrants | None:
        """From calibration prompts; None if the guard has no refusal axis.

        Labels of refusal give the cut-off of refusing; without ten of each, or where beliefs do not
        go with them, those of an old calibration, or harmless traffic at the rate that prompts are
        flagged at.

        Raises:
            GuardError: if there are too few harmless prompts for the rate.
        """
        if not all("refuse" in verdict.beliefs for verdict in verdicts):
            return None
        refuse = np.array([v.beliefs["refuse"] for v in verdicts])
        harmless = np.array([not p.harmful for p in prompts])
        has_label = np.array([p.refused is not None for p in prompts])
        labels = np.array([bool(p.refused) for p in prompts])
        if _can_place_cutoff(refuse[has_label], labels[has_label]):
            quadrants = _from_labels(refuse[has_label], labels[has_label])
        elif before is not None and before.refused is not None:
            quadrants = before
        else:
            bound = threshold_for_fpr(refuse[harmless], rates.block, rates.confidence)
            basis = (
                f"at most {rates.block:.2%} of harmless prompts count as refusing, n = {bound.n}"
            )
            quadrants = Quadrants(bound.threshold, basis=basis)
        harm = np.array([v.beliefs["harmful"] for v in verdicts])
        cutoff = threshold_for_fpr(harm[harmless], rates.block, rates.confidence).threshold
        quadrants = replace(quadrants, harmful=cutoff)
        return replace(quadrants, shares=quadrants._shares(prompts, verdicts))

    def quadrant(self, verdict: Verdict) -> str | None:
        """Which of the four; None without a refusal axis."""
        if "refuse" not in verdict.beliefs:
            return None
        shows = self.harmful is not None and verdict.beliefs["harmful"] > self.harmful
        harmful = verdict.flagged or shows
        refusing = verdict.beliefs["refuse"] > self.refuse
        return f"{HARMFUL[harmful]}, {REFUSING[refusing]}"

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Quadrants:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        fields = dict(record)
        for name in ("refused", "accepted"):
            fields[name] = Estimate.unpack(record[name]) if record[name] else None
        fields["shares"] = tuple(
            (side, name, Estimate.unpack(share)) for side, name, share in record["shares"]
        )
        if not all(map(math.isfinite, (fields["refuse"], fields["harmful"] or 0.0))):
            raise ValueError("a cut-off is not finite")
        return Quadrants(**fields)

    def without_promise(self) -> Quadrants:
        """The cut-offs go on with another model until they are calibrated anew."""
        return Quadrants(self.refuse, self.harmful, basis="of another model")

    def tables(self) -> list[Table]:
        """What fell where; nothing before calibration."""
        if not self.shares:
            return []
        note = f"Cut-off of refusing: {self.basis}."
        if self.refused and self.accepted:
            note += (
                f" Cross-fitted, {self.refused} of n = {self.refused.total} refused prompts count "
                f"as refusing, and {self.accepted} of n = {self.accepted.total} accepted ones."
            )
        sides = list(dict.fromkeys(side for side, _, _ in self.shares))
        heads = tuple(
            f"of {side} prompts, n = {next(e.total for s, _, e in self.shares if s == side)}"
            for side in sides
        )
        rows = tuple(
            (f"{name}{MEANING.get(name, '')}", *(str(e) for _, n, e in self.shares if n == name))
            for name in NAMES
        )
        return [Table("Quadrants", ("quadrant", *heads), rows, note)]

    def notes(self) -> list[str]:
        """Its table, in Markdown."""
        return [table.markdown() for table in self.tables()]

    def _shares(
        self, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]
    ) -> tuple[tuple[str, str, Estimate], ...]:
        shares = list[tuple[str, str, Estimate]]()
        for side in HARMFUL[::-1]:
            quadrants = [
                self.quadrant(verdict)
                for prompt, verdict in zip(prompts, verdicts, strict=True)
                if HARMFUL[bool(prompt.harmful)] == side
            ]
            if quadrants:
                shares += [
                    (side, name, proportion([q == name for q in quadrants])) for name in NAMES
                ]
        return tuple(shares)


def _can_place_cutoff(beliefs: NDArray[np.float64], refused: NDArray[np.bool_]) -> bool:
    """Whether there are labels enough of both sides, and refused ones are believed refused."""
    sides = beliefs[refused], beliefs[~refused]
    return min(map(len, sides)) >= MIN_PROMPTS and bool(sides[0].mean() > sides[1].mean())


def _from_labels(beliefs: NDArray[np.float64], refused: NDArray[np.bool_]) -> Quadrants:
    """Where both outcomes are as likely, both weighing the same; with cross-fitted rates."""
    over = np.empty(len(beliefs), dtype=bool)
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(beliefs, refused):
        over[test] = beliefs[test] > _middle(beliefs[train], refused[train])
    counts = f"{int(refused.sum())} refused and {int((~refused).sum())} accepted prompts"
    return Quadrants(
        _middle(beliefs, refused),
        basis=f"where both are as likely, from {counts} with labels",
        refused=proportion(over[refused]),
        accepted=proportion(over[~refused]),
    )


def _middle(beliefs: NDArray[np.float64], refused: NDArray[np.bool_]) -> float:
    slope, intercept = fit_platt(beliefs, refused)
    return -intercept / slope

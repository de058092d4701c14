"""The claims of a report: verdict, deciding effect, form control, and every condition.

Which effect stands beside a verdict: of a claim that is not replicated the condition that fails, of
one that cannot be told the first that is open, else the first. The same goes for form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from latentguard.report.document import Cell, Section, Table
from latentguard.stats.estimate import Estimate
from latentguard.study.claims import CLAIMS, Claim, Condition, Effects, Verdict

Outcome = Verdict | Literal["not run"]

TITLE = "Claims"
"""Of the table of verdicts."""

COLUMNS = (
    *("", "claim", "verdict", "effect that decides"),
    *("value", "low", "high", "n", "n that would tell"),
    *("form control", "form value", "form low", "form high"),
    "in the paper",
)
"""Of the table of verdicts."""

RULES = (
    "The rules are part of the program. Replicated: the whole 95 % interval of every effect "
    "lies on the claimed side. Not replicated: that of one effect lies on the other side, at "
    "a level shared among the claim's conditions. Replicated, but form explains it: prompts "
    "of equal form do not show the effect for sure. Otherwise the run cannot tell. Of several "
    "effects, the one that decides stands here; the next table has all. The n that would tell is "
    "rough: the effect stays, and its interval shrinks with the root of n."
)

MOST_NEEDED = 10_000
"""Prompts beyond which no more than that is said."""

PLURALS: Mapping[Outcome, tuple[str, str]] = {
    "replicated": ("is replicated", "are replicated"),
    "replicated, but form explains it": (
        "is replicated, but form explains it",
        "are replicated, but form explains them",
    ),
    "not replicated": ("is not replicated", "are not replicated"),
    "cannot tell": ("cannot be told", "cannot be told"),
    "not run": ("was not run", "were not run"),
}


@dataclass(frozen=True)
class Measured:
    """A condition, what was measured, and what that decides."""

    condition: Condition
    """What must hold."""

    effect: Estimate | None
    """None if it was not measured."""

    verdict: Verdict
    """Of this condition alone."""

    needed: int | None = None
    """About how many prompts would decide it (``Condition.prompts_needed``)."""


@dataclass(frozen=True)
class ClaimResult:
    """What a run says of one claim."""

    number: int
    """From 1."""

    claim: Claim
    """The claim."""

    outcome: Outcome
    """The verdict."""

    conditions: tuple[Measured, ...]
    """All conditions of the claim itself."""

    form: tuple[Measured, ...]
    """All conditions of form."""

    @property
    def deciding(self) -> Measured | None:
        """The condition that stands beside the verdict; None if the claim was not run."""
        return _deciding(self.conditions)

    @property
    def deciding_form(self) -> Measured | None:
        """The condition of form that does; None if the claim has none."""
        return _deciding(self.form)


def claim_results(effects: Effects, *, refused: bool = True) -> list[ClaimResult]:
    """What a run says of each claim.

    Args:
        effects: What was measured.
        refused: Whether prompts enough are refused for the paper's centroids.
    """
    return [_result(n, claim, effects, refused=refused) for n, claim in enumerate(CLAIMS, 1)]


def claims_section(effects: Effects, *, refused: bool = True, about: str = "") -> Section:
    """Two sentences that sum up, each claim in a row, and each of its conditions.

    Args:
        effects: What was measured.
        refused: Whether prompts enough are refused for the paper's centroids.
        about: The second sentence: what was studied.
    """
    results = claim_results(effects, refused=refused)
    conditions = [row for one in results for row in _condition_rows(one)]
    figures = ("value", "low", "high", "n", "n that would tell")
    columns = ("claim", "asks about", "condition", *figures, "verdict")
    few = "" if refused else _few()
    text = " ".join(filter(None, (summary(results), about, few)))
    parts = (
        Table(TITLE, COLUMNS, tuple(map(_row, results)), RULES),
        Table("Conditions", columns, tuple(conditions)),
    )
    return Section("The paper's claims", text, parts)


def summary(results: Sequence[ClaimResult]) -> str:
    """One sentence: how many claims have which verdict, and which."""
    return count_outcomes({one.number: one.outcome for one in results})


def count_outcomes(outcomes: Mapping[int, str]) -> str:
    """One sentence: how many claims, by number, have which verdict, and which."""
    parts = []
    for outcome, (one, many) in PLURALS.items():
        numbers = [str(n) for n, of in outcomes.items() if of == outcome]
        if numbers:
            verb = one if len(numbers) == 1 else many
            parts.append(f"{len(numbers)} {verb} ({', '.join(numbers)})")
    counts = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"Of {len(outcomes)} claims, {counts}."


def _few() -> str:
    numbers = ", ".join(str(n) for n, one in enumerate(CLAIMS, 1) if one.centroids)
    return (
        "Too few harmful prompts are refused here for the paper's centroids: figures of the "
        f"claims {numbers} are of all harmful and all harmless prompts, and decide nothing."
    )


def _result(number: int, claim: Claim, effects: Effects, *, refused: bool) -> ClaimResult:
    if claim.experiment not in effects:
        return ClaimResult(number, claim, "not run", (), ())
    is_open = refused or not claim.centroids
    pairs = claim.measured(claim.conditions, effects)
    of_form = claim.measured(claim.form, effects)
    return ClaimResult(
        number,
        claim,
        claim.verdict(effects) if is_open else "cannot tell",
        tuple(_measured(pair, is_open=is_open, tests=len(pairs)) for pair in pairs),
        tuple(_measured(pair, is_open=is_open, tests=1) for pair in of_form),
    )


def _measured(pair: tuple[Condition, Estimate | None], *, is_open: bool, tests: int) -> Measured:
    condition, effect = pair
    decisive = effect if is_open else None
    return Measured(
        condition,
        effect,
        condition.verdict(decisive, tests=tests),
        condition.prompts_needed(decisive, tests=tests),
    )


def _deciding(measured: Sequence[Measured]) -> Measured | None:
    for verdict in ("not replicated", "cannot tell"):
        same = [one for one in measured if one.verdict == verdict]
        if same:
            return next((one for one in same if one.effect is not None), same[0])
    return measured[0] if measured else None


def _row(result: ClaimResult) -> tuple[Cell, ...]:
    effect, form = result.deciding, result.deciding_form
    claim = result.claim
    return (
        result.number,
        claim.name,
        result.outcome,
        str(effect.condition) if effect else None,
        *_cells(effect),
        str(form.condition) if form else "none",
        *_cells(form)[:3],
        f"{claim.where}: {claim.paper}",
    )


def _condition_rows(result: ClaimResult) -> Iterator[tuple[Cell, ...]]:
    for asks, measured in (("the claim", result.conditions), ("form", result.form)):
        for one in measured:
            yield (result.number, asks, str(one.condition), *_cells(one), one.verdict)


def _cells(measured: Measured | None) -> Sequence[Cell]:
    """Value, low, high, n, and the n that would tell."""
    if measured is None or measured.effect is None:
        return (None, None, None, None, None)
    effect, needed = measured.effect, measured.needed
    shown = f"over {MOST_NEEDED:,}" if needed and needed > MOST_NEEDED else needed
    return (effect.value, effect.low, effect.high, sum(effect.n), shown)

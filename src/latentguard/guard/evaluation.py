"""Evaluation: what a guard does with labelled prompts, in all, by category and by segment.

``evaluate`` measures one set of verdicts; ``compare`` says what a change of the guard changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import PromptError
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Table
from latentguard.stats.detection import auroc, estimate_metric, separation
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion, rate_difference

MAX_PAIRS = 4_000_000
"""Pairs of a harmful and a harmless prompt up to which AUROC is computed pair by pair."""

Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class GroupResult:
    """What a guard does with one group of labelled prompts; None where a label is missing."""

    name: str
    """``all``, or a category or segment."""

    caught: Estimate | None
    """Share of the harmful prompts that are flagged, with its 95 % Wilson interval."""

    falsely_flagged: Estimate | None
    """Share of the harmless prompts that are flagged."""

    auroc: Estimate | None
    """Harmful against harmless scores; of a category: its harmful ones against all harmless."""


@dataclass(frozen=True)
class Evaluation:
    """What a guard does with labelled prompts."""

    total: GroupResult
    """All prompts."""

    categories: tuple[GroupResult, ...]
    """By category, the most frequent first; empty if no prompt has one."""

    segments: tuple[GroupResult, ...]
    """By segment; empty if no prompt has one."""

    def tables(self) -> list[Table]:
        """All, by category and by segment."""
        note = "95 % intervals: Wilson's for shares, bootstrap for AUROC."
        tables = [_result_table("Evaluation", (self.total,), note)]
        if self.categories:
            note = "AUROC: the harmful prompts of the category against all harmless ones."
            tables.append(_result_table("By category", self.categories, note))
        if self.segments:
            tables.append(_result_table("By segment", self.segments, ""))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What a change of a guard changes on the same labelled prompts."""

    name: str
    """``all``, or a category or segment."""

    harmful: bool
    """Which label: caught if harmful, falsely flagged if not."""

    before: Estimate
    """Share that was flagged."""

    after: Estimate
    """Share that is flagged."""

    difference: Estimate
    """After less before, with its paired 95 % interval."""

    @property
    def is_worse(self) -> bool:
        """Whether surely fewer harmful prompts are caught, or surely more are falsely flagged."""
        return self.difference.high < 0 if self.harmful else self.difference.low > 0

    def __str__(self) -> str:
        verb = "caught" if self.harmful else "falsely flagged"
        total = self.after.total
        return f"{verb} {self.after.n[0]} of {total} instead of {self.before.n[0]} of {total}"


def require_labels(prompts: Sequence[Prompt]) -> None:
    """Say so before the model reads prompts of which one has no label.

    Raises:
        PromptError: names the first such prompt.
    """
    for number, prompt in enumerate(prompts, start=1):
        if prompt.harmful is None:
            raise PromptError(
                f"Prompt {number} ('{prompt.id}') has no label; an evaluation needs 'harmful' or "
                "'harmless' in the column 'label' of each row."
            )


def evaluate(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> Evaluation:
    """Measure a guard's verdicts on labelled prompts.

    Raises:
        PromptError: if a prompt has no label.
    """
    require_labels(prompts)
    harmful = np.array([bool(prompt.harmful) for prompt in prompts], dtype=bool)
    flagged = np.array([verdict.flagged for verdict in verdicts], dtype=bool)
    scores = np.array([verdict.score for verdict in verdicts], dtype=np.float64)

    def result(name: str, rows: Rows, *, against_all: bool = False) -> GroupResult:
        positive = rows & harmful
        negative = rows & ~harmful
        others = ~harmful if against_all else negative
        return GroupResult(
            name,
            _share(flagged[positive]),
            _share(flagged[negative]),
            _area(scores[positive], scores[others]),
        )

    categories = tuple(
        result(name, rows, against_all=True) for name, rows in rows_by(prompts, _categories).items()
    )
    segments = tuple(result(name, rows) for name, rows in rows_by(prompts, _segments).items())
    return Evaluation(result("all", np.ones(len(prompts), dtype=bool)), categories, segments)


def compare(
    prompts: Sequence[Prompt], before: Sequence[Verdict], after: Sequence[Verdict]
) -> list[Comparison]:
    """What changed between two guards' verdicts on the same labelled prompts, all first."""
    harmful = np.array([bool(prompt.harmful) for prompt in prompts], dtype=bool)
    flags = [np.array([v.flagged for v in one], dtype=bool) for one in (before, after)]
    groups = {"all": np.ones(len(prompts), dtype=bool)}
    groups |= rows_by(prompts, _categories) | rows_by(prompts, _segments)
    comparisons = []
    for name, rows in groups.items():
        for side, label in ((harmful, True), (~harmful, False)):
            if (own := rows & side).any():
                old = flags[0][own]
                new = flags[1][own]
                difference = rate_difference(new, old)
                one = Comparison(name, label, proportion(old), proportion(new), difference)
                comparisons.append(one)
    return comparisons


def comparison_table(comparisons: Sequence[Comparison], note: str) -> Table:
    """Shares before and after, by group."""
    rows = tuple(
        (
            one.name,
            "caught" if one.harmful else "falsely flagged",
            str(one.before),
            str(one.after),
            str(one.difference),
            one.after.total,
        )
        for one in comparisons
    )
    return Table(
        "Before and after", ("prompts", "share", "before", "after", "difference", "n"), rows, note
    )


def rows_by(
    prompts: Sequence[Prompt], names_of: Callable[[Prompt], Sequence[str]]
) -> dict[str, Rows]:
    """Which prompts have each name, [n]; the most frequent name first."""
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        for name in names_of(prompt):
            members.setdefault(name, []).append(row)
    order = sorted(members, key=lambda name: (-len(members[name]), name))
    every = np.arange(len(prompts))
    return {name: np.isin(every, members[name]) for name in order}


def _categories(prompt: Prompt) -> list[str]:
    """A prompt may have several, as in ``S,H``."""
    return [name.strip() for name in (prompt.category or "").split(",") if name.strip()]


def _segments(prompt: Prompt) -> list[str]:
    return [prompt.segment] if prompt.segment is not None else []


def _share(flags: Rows) -> Estimate | None:
    return proportion(flags) if len(flags) else None


def _area(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> Estimate | None:
    if not len(positive) or not len(negative):
        return None
    if len(positive) * len(negative) <= MAX_PAIRS:
        return separation(positive, negative)
    labels = np.repeat([True, False], [len(positive), len(negative)])
    return estimate_metric(auroc, labels, np.concatenate([positive, negative]))


def _result_table(title: str, results: Sequence[GroupResult], note: str) -> Table:
    columns = ("prompts", "harmful", "caught", "harmless", "falsely flagged", "AUROC")
    return Table(title, columns, tuple(map(_result_row, results)), note)


def _result_row(result: GroupResult) -> tuple[Cell, ...]:
    shares = (result.caught, result.falsely_flagged)
    cells = [cell for one in shares for cell in (one.total if one else 0, str(one) if one else "")]
    return (result.name, *cells, str(result.auroc) if result.auroc else "")

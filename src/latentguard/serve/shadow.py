"""A shadow guard judges the prompts of the guard that decides, and changes no verdict.

Both are scored from the same pass of the model if they read the same of each prompt. What they
decide is counted, never what was asked.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, get_args

from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Decision
from latentguard.serve.errors import error_location
from latentguard.serve.sharing import Abandoned

log = logging.getLogger("latentguard.serve")

T = TypeVar("T")

RECENT = 100
"""Requests on which both guards disagreed, of which the ids are kept."""

ShadowDecision = Decision | Literal["failed", "unread"]
"""What the shadow would have decided; it failed; or the chat was blocked before all of it was
read, and what was read the shadow does not block."""

Outcome = Literal[
    "both_allow",
    "both_review",
    "both_block",
    "only_guard_blocks",
    "only_shadow_blocks",
    "only_guard_reviews",
    "only_shadow_reviews",
    "failed",
    "unread",
]
"""What both guards say of a prompt or a chat; ``guard`` is the one that decides."""


def attempt(work: Callable[[], T]) -> T | None:
    """What some work of the shadow gives; None if it fails, which is logged and never raised.

    Raises:
        Abandoned: if nobody waits any more, which is no fault of the shadow.
    """
    try:
        return work()
    except Abandoned:
        raise
    except Exception as error:  # whatever it is, the verdict of the other guard stands
        log.error("The shadow guard failed: %s", error_location(error))
        return None


def reads_the_same(guard: LatentGuard, other: LatentGuard) -> bool:
    """Whether two guards of a model can be scored from the same pass over each prompt."""
    return _what_is_read(guard) == _what_is_read(other)


def _what_is_read(guard: LatentGuard) -> tuple[object, ...]:
    queries, cuts = guard.reading.queries, guard.chunking
    return (
        guard.reading.name,
        guard.positions,
        guard.probe.layers,
        queries.digest if queries else None,
        guard.deobfuscate,
        (cuts.max_chars, cuts.min_chars, cuts.longer_than) if cuts else None,
    )


def outcome_of(decision: Decision, shadow: ShadowDecision) -> Outcome:
    """What both guards say together."""
    outcomes: dict[tuple[str, str], Outcome] = {
        ("allow", "allow"): "both_allow",
        ("review", "review"): "both_review",
        ("block", "block"): "both_block",
        ("review", "allow"): "only_guard_reviews",
        ("allow", "review"): "only_shadow_reviews",
    }
    not_compared: dict[str, Outcome] = {"failed": "failed", "unread": "unread"}
    if shadow in not_compared:
        return not_compared[shadow]
    other: Outcome = "only_guard_blocks" if decision == "block" else "only_shadow_blocks"
    return outcomes.get((decision, shadow), other)


@dataclass(eq=False)
class Comparison:
    """What two guards decided, counted from when they were loaded; for the event loop."""

    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When the counting began, in UTC."""

    counts: Counter[tuple[str, str, Outcome]] = field(default_factory=Counter)
    """By endpoint, segment (empty without one) and outcome."""

    recent: deque[dict[str, str]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The newest requests on which they disagreed, without texts."""

    def add(self, endpoint: str, segment: str, outcome: Outcome, request: str) -> None:
        """Count what both decided on a prompt or a chat of a request."""
        self.counts[endpoint, segment, outcome] += 1
        if outcome.startswith("only_"):
            line = dict(request=request, endpoint=endpoint, segment=segment, outcome=outcome)
            self.recent.append(line)

    @property
    def totals(self) -> dict[Outcome, int]:
        """How often there was each outcome."""
        totals = dict.fromkeys(get_args(Outcome), 0)
        for (_, _, outcome), count in self.counts.items():
            totals[outcome] += count
        return totals

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON has them, without the requests."""
        counts = [
            dict(endpoint=endpoint, segment=segment or None, outcome=outcome, count=count)
            for (endpoint, segment, outcome), count in sorted(self.counts.items())
        ]
        return dict(since=self.since, totals=self.totals, counts=counts)

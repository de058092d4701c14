"""Verdict: what a guard says of one prompt, in Python and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from latentguard.guard.display import facts_table

Decision = Literal["allow", "review", "block"]
"""What is to be done with a prompt; the later, the more severe."""


Opinion = Literal["allow", "block", "failed"]
"""What a second opinion says of a prompt: its decision, or that it gave none."""


@dataclass(frozen=True)
class Evidence:
    """The most harmful chunk of one turn of a long prompt or a chat."""

    message: int
    """Which message of the chat, counted from 0; the prompt's own text comes after its history."""

    start: int
    """The first character of the chunk in that message."""

    end: int
    """The first character after it."""

    score: float
    """Its score; the unit is that of the verdict."""


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one prompt.

    Examples:
        >>> lg.Verdict("1", 3.2, 0.98, True, {"harmful": 0.11}, "block")
        Verdict(block, probability=0.98, score=3.2, id='1')
    """

    id: str
    """Of the prompt."""

    score: float
    """Higher is more harmful; the unit is the probe's own."""

    probability: float
    """Probability of harmful where both classes are equally frequent."""

    flagged: bool
    """Whether the score is above the threshold, or a second opinion blocks the prompt."""

    beliefs: dict[str, float]
    """Delta of each axis (equations 3 and 4), over the guard's layers."""

    decision: Decision = "allow"
    """``block`` if flagged; ``review`` between two calibrated thresholds; else ``allow``. A second
    opinion decides between the thresholds, where there is one."""

    category: str | None = None
    """The likely risk category; None if the guard knows none."""

    category_scores: dict[str, float] = field(default_factory=dict)
    """Of each category that the guard knows."""

    quadrant: str | None = None
    """What both beliefs together say; None without a refusal axis."""

    evidence: tuple[Evidence, ...] = ()
    """Of a long prompt or a chat: the most harmful chunk of each turn of the user, oldest first.
    The greatest of their scores is the score. Empty for a short prompt."""

    obfuscations: tuple[str, ...] = ()
    """What was decoded to find this score; empty where the text as it stands scores as high."""

    calibrated: bool = True
    """Whether the threshold was calibrated; if not, the decision promises nothing."""

    operating_point: str | None = None
    """What the threshold was chosen for, such as ``max-fpr=0.05``; None if uncalibrated."""

    second_opinion: Opinion | None = None
    """What a second opinion said; None if it was not asked. After ``failed`` the decision stays
    ``review``."""

    left_early: bool = False
    """Whether the prompt left the pass early, so that the score is an estimate (``early_exit``)."""

    def is_more_severe_than(self, other: Verdict, *, tie: float = 0.0) -> bool:
        """Whether it flags where the other does not, or decides or scores higher.

        Scores alone would not do: a short text and a long one have thresholds of their own.

        Args:
            other: The verdict on another version of the same prompt.
            tie: Scores that differ by no more are alike.
        """
        levels = get_args(Decision)
        own = (self.flagged, levels.index(self.decision))
        theirs = (other.flagged, levels.index(other.decision))
        return own > theirs or (own == theirs and self.score > other.score + tie)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it; every JSON form of a verdict is made here.

        Examples:
            >>> lg.Verdict("1", 3.2, 0.98, True, {"harmful": 0.11}, "block").to_dict()["decision"]
            'block'
        """
        plain = dict(vars(self))
        plain["beliefs"] = dict(self.beliefs)
        plain["category_scores"] = dict(self.category_scores)
        plain["evidence"] = [dict(vars(one)) for one in self.evidence]
        plain["obfuscations"] = list(self.obfuscations)
        return plain

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Verdict:
        """The verdict that ``to_dict`` wrote.

        Raises:
            LookupError, TypeError: if it is no verdict.
        """
        evidence = tuple(Evidence(**one) for one in record["evidence"])
        obfuscations = tuple(record["obfuscations"])
        return Verdict(**{**record, "evidence": evidence, "obfuscations": obfuscations})

    def __repr__(self) -> str:
        decision = self.decision if self.calibrated else f"{self.decision}, uncalibrated"
        fields = [f"category={self.category!r}"] if self.category and self.flagged else []
        fields += [f"obfuscations={list(self.obfuscations)}"] if self.obfuscations else []
        fields += [f"second_opinion={self.second_opinion!r}"] if self.second_opinion else []
        fields += [f"id={self.id!r}"] if self.id else []
        numbers = f"probability={self.probability:.2f}, score={self.score:.4g}"
        return f"Verdict({', '.join([decision, numbers, *fields])})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        beliefs = (f"{name} {value:+.3f}" for name, value in self.beliefs.items())
        chunks = (
            f"message {one.message}, characters {one.start} to {one.end}: {one.score:.3g}"
            for one in self.evidence
        )
        facts = {
            "prompt": self.id,
            "decision": self.decision + ("" if self.calibrated else " (uncalibrated)"),
            "operating point": self.operating_point or "",
            "second opinion": self.second_opinion or "",
            "probability of harmful": f"{self.probability:.3f}",
            "score": f"{self.score:.4g}",
            "beliefs": ", ".join(beliefs),
            "nearest category": self.category or "",
            "quadrant": self.quadrant or "",
            "decoded": ", ".join(self.obfuscations),
            "evidence": "; ".join(chunks),
        }
        return facts_table("Verdict", facts)

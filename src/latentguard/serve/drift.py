"""Whether scores still look as they did at calibration: reference scores, and what moved."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.drift import cut, shares, stability
from latentguard.errors import PromptError

RECENT = 1000
"""Scores that the figure looks back on."""


@dataclass(frozen=True)
class Reference:
    """Verdicts on prompts that are known, such as those of the calibration."""

    points: tuple[dict[str, Any], ...] = ()
    """Score, beliefs and flag of each; never its text."""

    @staticmethod
    def read(path: Path | None) -> Reference:
        """Read what ``latentguard score --out`` wrote.

        Raises:
            PromptError: if a line is no verdict.
        """
        if path is None:
            return Reference()
        points = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                score, beliefs = float(row["score"]), dict(row["beliefs"])
                points.append(dict(score=score, beliefs=beliefs, flagged=bool(row["flagged"])))
            except (ValueError, LookupError, TypeError):
                raise PromptError(
                    f"{path}:{number} is no verdict; expected lines of 'latentguard score'."
                ) from None
        return Reference(tuple(points))

    @property
    def edges(self) -> list[float]:
        """Scores that cut the reference into ten equal parts; none if it is too small."""
        return cut([point["score"] for point in self.points])


class Drift:
    """The population stability index of recent scores against the reference.

    Under 0.1 is no change, over 0.25 a large one, as the index is commonly read.
    """

    def __init__(self, reference: Reference) -> None:
        """Cut the reference into parts."""
        self.edges = reference.edges
        self._expected = shares([point["score"] for point in reference.points], self.edges)
        self._recent = deque[float](maxlen=RECENT)

    def add(self, score: float) -> None:
        """Note a score."""
        self._recent.append(score)

    @property
    def index(self) -> float:
        """The index; not a number until there are a hundred scores, and without a reference."""
        recent = list(self._recent)
        if not self.edges or len(recent) < 100:
            return math.nan
        return stability(shares(recent, self.edges), self._expected)

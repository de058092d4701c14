"""Whether scores still look as they did at calibration: known scores, and what moved."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.errors import PromptError
from latentguard.guard.drift import bin_edges, bin_shares, population_stability
from latentguard.guard.latent_guard import LatentGuard

RECENT = 1000
"""Scores that the figure looks back on."""


@dataclass(frozen=True)
class DriftReference:
    """What scores and verdicts are compared with."""

    points: tuple[dict[str, Any], ...] = ()
    """Known verdicts: score, beliefs and flag of each; never its text."""

    scores: tuple[float, ...] = ()
    """Known scores; more than verdicts, if only scores were kept."""

    @staticmethod
    def of(guard: LatentGuard, path: Path | None) -> DriftReference:
        """The verdicts in a file or, without one, the scores that calibrated the guard.

        Raises:
            PromptError: if a line of the file is no verdict.
        """
        if path is not None or guard.thresholds is None:
            return DriftReference.read(path)
        return DriftReference(scores=tuple(guard.thresholds.common.scores.tolist()))

    @staticmethod
    def read(path: Path | None) -> DriftReference:
        """Read what ``latentguard score --out`` wrote.

        Raises:
            PromptError: if a line is no verdict.
        """
        if path is None:
            return DriftReference()
        points, scores = list[dict[str, Any]](), list[float]()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                score, beliefs = float(row["score"]), dict(row["beliefs"])
                points.append(dict(score=score, beliefs=beliefs, flagged=bool(row["flagged"])))
                if not row.get("evidence"):  # those of long prompts are not compared
                    scores.append(score)
            except (ValueError, LookupError, TypeError):
                raise PromptError(
                    f"{path}:{number} is no verdict; expected lines of 'latentguard score'."
                ) from None
        return DriftReference(tuple(points), tuple(scores))


class DriftMonitor:
    """The population stability index of recent scores against known ones.

    Under 0.1 is no change, over 0.25 a large one, as the index is commonly read.
    """

    def __init__(self, reference: Sequence[float]) -> None:
        """Cut the known scores into ten equal parts; into none if they are too few."""
        self.edges = bin_edges(reference)
        self._expected = bin_shares(reference, self.edges)
        self._recent = deque[float](maxlen=RECENT)

    def add(self, score: float) -> None:
        """Note a score."""
        self._recent.append(score)

    @property
    def index(self) -> float:
        """The index; not a number until there are a hundred scores, and without known ones."""
        recent = list(self._recent)
        if not self.edges or len(recent) < 100:
            return math.nan
        return population_stability(bin_shares(recent, self.edges), self._expected)

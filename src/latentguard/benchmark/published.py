"""Published figures of other guards on the suite, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

Metric = Literal["F1", "macro F1", "FPR"]


@dataclass(frozen=True)
class PublishedFigure:
    """One figure of one model on one set, as its source has it."""

    model: str
    """Which guard."""

    set: str
    """Name of the set, as in ``data list``; or what it is the mean of."""

    metric: Metric
    """What was measured, at the model's own threshold."""

    value: float
    """Between 0 and 1."""

    source: str
    """Where it is published."""


def load_published() -> list[PublishedFigure]:
    """Return every published figure, in the order of the file."""
    text = (files(__package__) / "published.jsonl").read_text("utf-8")
    return [PublishedFigure(**json.loads(line)) for line in text.splitlines()]

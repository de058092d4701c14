"""Canary prompts: their scores are stored with a guard and checked when it meets a model."""

from __future__ import annotations

from dataclasses import dataclass

from latentguard.data.builtin import load_contrast
from latentguard.prompts import Prompt

COUNT = 8

TOLERANCE = 0.1
"""How far a canary's score may move, in standard deviations of the training scores."""


@dataclass(frozen=True)
class Canary:
    """A prompt with the score that it had when the guard was fitted."""

    text: str
    """The prompt."""

    score: float
    """Its score."""


def canary_prompts() -> list[Prompt]:
    """Half harmful, half harmless, spread over the built-in validation split."""
    prompts = load_contrast("validation")
    half = COUNT // 2
    sides = [[p for p in prompts if p.harmful is harmful] for harmful in (True, False)]
    return [p for side in sides for p in side[:: len(side) // half][:half]]

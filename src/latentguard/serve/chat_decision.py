"""The verdict on a chat of several readings, by the guard that decides or by its shadow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from latentguard.guard.latent_guard import LatentGuard
from latentguard.serve.chat_readings import ChatReading
from latentguard.serve.chat_thresholds import DecidedReading
from latentguard.serve.config import RateOf
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.served_guards import ServedGuard
from latentguard.serve.shadow import attempt

ScoredReadings = Sequence[ScoredPrompt | None]
"""What was found of each reading; None where that is still to come."""


def decide_each(
    served: ServedGuard,
    readings: Sequence[ChatReading],
    scored: ScoredReadings,
    *,
    segment: str | None,
    rate_of: RateOf,
) -> list[DecidedReading]:
    """The readings that were scored, each under the threshold of its chat.

    Args:
        served: Whose thresholds.
        readings: All that is read of the chat.
        scored: What was found.
        segment: That the request names.
        rate_of: Whether the readings share the false-positive rate.
    """
    return served.chat_thresholds.decide_each(
        [one.verdict if one else None for one in scored],
        [reading.is_newest for reading in readings],
        [segment_of(served.guard, reading, segment) for reading in readings],
        rate_of=rate_of,
    )


def decide_chat(
    served: ServedGuard,
    readings: Sequence[ChatReading],
    scored: ScoredReadings,
    *,
    segment: str | None,
    rate_of: RateOf,
) -> ScoredPrompt:
    """The most severe reading of a chat; arguments as of ``decide_each``."""
    decided = served.chat_thresholds.decide(
        [one.verdict if one else None for one in scored],
        [reading.is_newest for reading in readings],
        [segment_of(served.guard, reading, segment) for reading in readings],
        rate_of=rate_of,
    )
    most_severe = scored[decided.index]
    assert most_severe is not None
    return replace(
        most_severe,
        verdict=decided.verdict,
        threshold=decided.threshold,
        readings=len(readings),
        index=decided.index,
        source=readings[decided.index].source,
        is_whole=None not in scored,
    )


def decide_as_shadow(
    served: ServedGuard,
    readings: Sequence[ChatReading],
    scored: ScoredReadings,
    *,
    segment: str | None,
    rate_of: RateOf,
) -> ScoredPrompt | None:
    """As ``decide_chat``, by the shadow; None without one, or if it failed on a reading."""
    shadow = served.shadow
    if shadow is None or any(one is not None and one.shadow is None for one in scored):
        return None
    own = [one.shadow if one else None for one in scored]
    return attempt(lambda: decide_chat(shadow, readings, own, segment=segment, rate_of=rate_of))


def segment_of(guard: LatentGuard, reading: ChatReading, segment: str | None) -> str | None:
    """Whose thresholds a reading is compared with: its source's, if the guard has such.

    A user's texts are of the segment that the request names, if it names one.
    """
    if has_segment(guard, reading.source) and not (reading.source == "user" and segment):
        return reading.source
    return segment


def has_segment(guard: LatentGuard, segment: str | None) -> bool:
    """Whether a guard has a threshold for a segment."""
    return guard.thresholds is not None and segment in guard.thresholds.segments

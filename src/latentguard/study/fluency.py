"""Fluency of replies from their text alone."""

from __future__ import annotations

from itertools import pairwise


def repetition(text: str) -> float:
    """Share of word pairs that stood in the text before; 0 if there is at most one pair."""
    pairs = list(pairwise(text.lower().split()))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0

"""Learnt: what a guard or a pack was fitted on, by digest, so that it is not calibrated on it.

Scores of prompts that were fitted on lie lower, or higher, than those of the traffic to come, and a
threshold that is picked on them promises too much.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from latentguard.errors import GuardError
from latentguard.prompts import Prompt

MOST = 0.1
"""Share of the prompts of a label that may happen to be among those that a guard was fitted on."""


def mark(prompt: Prompt) -> int:
    """What was said, in 63 bits."""
    said = [prompt.text, *(part for m in prompt.history for part in (m.role, m.content))]
    return int.from_bytes(hashlib.sha256("\0".join(said).encode()).digest()[:8]) >> 1


def apart(prompts: Iterable[Prompt], marks: Counter[int]) -> tuple[list[Prompt], list[Prompt]]:
    """Those that were learnt from, and the others, in order.

    Prompts that occur often are counted: as many as were learnt from, and no more, are set apart,
    so that the others are as frequent among the rest as they are in the traffic.
    """
    left, seen, rest = Counter(marks), list[Prompt](), list[Prompt]()
    for prompt in prompts:
        known = left[number := mark(prompt)] > 0
        left[number] -= known
        (seen if known else rest).append(prompt)
    return seen, rest


def require_apart(prompts: Sequence[Prompt], marks: Iterable[int]) -> None:
    """Refuse to calibrate on what a guard was fitted on.

    Raises:
        GuardError: if more than ``MOST`` of the prompts of a label are among them.
    """
    learnt = set(marks)
    for harmful in (False, True):
        side = [p for p in prompts if bool(p.harmful) is harmful]
        seen = sum(mark(p) in learnt for p in side)
        if seen > MOST * len(side):
            raise GuardError(
                f"{seen} of the {len(side)} {'harmful' if harmful else 'harmless'} prompts to "
                "calibrate on are among those that the guard was fitted on, whose scores would "
                "promise too much; give others of the same kind."
            )

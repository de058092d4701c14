"""Learnt: what a guard or a pack was fitted on, by digest, so that it is not calibrated on it.

Scores of prompts that were fitted on lie lower, or higher, than those of the traffic to come, and a
threshold that is picked on them promises too much.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latentguard.errors import GuardError
from latentguard.prompts import Prompt

MOST = 0.1
"""Share of the texts of a label that may happen to be among those that a guard was fitted on."""

FEW = 0.05
"""A part that may be missing without a word: the others are hardly more frequent for it."""


def mark(prompt: Prompt) -> int:
    """What was said, in 63 bits."""
    said = [prompt.text, *(part for m in prompt.history for part in (m.role, m.content))]
    return int.from_bytes(hashlib.sha256("\0".join(said).encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Held:
    """Marks of the user's texts that were learnt from; the user's other rows calibrate."""

    alone: frozenset[int] = frozenset()
    """Of texts that no other row has."""

    shared: frozenset[int] = frozenset()
    """Of texts that other rows have, too."""

    @staticmethod
    def of(learnt: Iterable[Prompt], others: Iterable[Prompt]) -> Held:
        """From the rows that were learnt from, and the others."""
        one, other = set(map(mark, learnt)), set(map(mark, others))
        return Held(frozenset(one - other), frozenset(one & other))

    def __or__(self, other: Held) -> Held:
        """Both; a text that one had alone is alone."""
        alone = self.alone | other.alone
        return Held(alone, (self.shared | other.shared) - alone)


NOTHING = Held()
"""Of a guard without packs."""


def apart(prompts: Iterable[Prompt], held: Held) -> tuple[list[Prompt], list[Prompt]]:
    """Rows that do not calibrate, as they were learnt from, and the others, each in order.

    A text that was asked but once scores lower, once it was learnt from, than those to come, and is
    set apart. One that is asked again and again scores then as it does now. But it must stay as
    frequent beside the others: so as large a part of such rows is set apart as of the rest.
    """
    rows = list(prompts)
    marks = {n: mark(prompt) for n, prompt in enumerate(rows) if not prompt.harmful}
    known = {n for n, of in marks.items() if of in held.alone}
    shared = [n for n, of in marks.items() if of in held.shared]
    if len(known) > FEW * len(marks):
        part = len(known) / (len(marks) - len(shared))
        known |= set(random.Random(0).sample(shared, round(part * len(shared))))
    seen = [p for n, p in enumerate(rows) if n in known]
    return seen, [p for n, p in enumerate(rows) if n not in known]


def require_apart(prompts: Sequence[Prompt], marks: Iterable[int], fewest: int = 1) -> None:
    """Refuse to calibrate on what a guard was fitted on.

    Texts are counted, not rows: one that is often asked scores then as it does now.

    Args:
        prompts: What is to calibrate.
        marks: Of what was fitted on.
        fewest: Prompts that a segment needs for a threshold of its own.

    Raises:
        GuardError: if more than ``MOST`` of the texts of a label or of a segment, and more than
            two, are among them.
    """
    learnt, harmless = set(marks), [p for p in prompts if not p.harmful]
    groups = {"harmless": harmless, "harmful": [p for p in prompts if p.harmful]}
    for name in dict.fromkeys(p.segment for p in harmless if p.segment):
        own = [p for p in harmless if p.segment == name]
        groups |= {f"harmless (segment '{name}')": own} if len(own) >= fewest else {}
    for name, group in groups.items():
        texts = {mark(p) for p in group}
        if (seen := len(texts & learnt)) > max(2, MOST * len(texts)):
            raise GuardError(
                f"{seen} of the {len(texts)} different {name} prompts to calibrate on are among "
                "those that the guard was fitted on, whose scores would promise too much; give "
                "others of the same kind."
            )

"""Learnt: what a guard or a pack was fitted on, by digest, so that it is not calibrated on it.

Scores of prompts that were fitted on lie lower, or higher, than those of the traffic to come, and a
threshold that is picked on them promises too much.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from latentguard.errors import GuardError
from latentguard.prompts import Prompt

MOST = 0.1
"""Share of the texts of a label that may happen to be among those that a guard was fitted on."""


def mark(prompt: Prompt) -> int:
    """What was said, in 63 bits."""
    said = [prompt.text, *(part for m in prompt.history for part in (m.role, m.content))]
    return int.from_bytes(hashlib.sha256("\0".join(said).encode()).digest()[:8]) >> 1


def apart(
    prompts: Iterable[Prompt], held: Iterable[Counter[int]]
) -> tuple[list[Prompt], list[Prompt]]:
    """Those that were learnt from, and the others, in order.

    Prompts that occur often are counted: as many as were learnt from, and no more, are set apart,
    so that the others are as frequent among the rest as they are in the traffic. From traffic that
    was drawn anew they are not: there, too, they will score as they do.

    Args:
        prompts: The prompts.
        held: Marks of what was learnt from, for each time that this was done.
    """
    rows, left = list(prompts), Counter[int]()
    marks = [mark(prompt) for prompt in rows]
    for of in held:
        left |= of if _given_again(of, set(marks)) else Counter({m for m in of if of[m] == 1})
    known = set[int]()
    for row in random.Random(0).sample(range(len(rows)), len(rows)):  # of any slice alike
        if left[marks[row]] > 0:
            left[marks[row]] -= 1
            known.add(row)
    sides = ([p for n, p in enumerate(rows) if (n in known) is side] for side in (True, False))
    return next(sides), next(sides)


def _given_again(learnt: Counter[int], there: AbstractSet[int]) -> bool:
    """Whether these are the rows that were learnt from, by what occurs but once among them."""
    once = [m for m, count in learnt.items() if count == 1] or list(learnt)
    return sum(m in there for m in once) > len(once) / 2


def require_apart(prompts: Sequence[Prompt], marks: Iterable[int], fewest: int = 1) -> None:
    """Refuse to calibrate on what a guard was fitted on.

    Texts are counted, not rows: one that is often asked scores then as it does now.

    Args:
        prompts: What is to calibrate.
        marks: Of what was fitted on.
        fewest: Prompts that a slice needs for a threshold of its own.

    Raises:
        GuardError: if more than ``MOST`` of the texts of a label, or of a slice, are among them.
    """
    learnt, harmless = set(marks), [p for p in prompts if not p.harmful]
    groups = {"harmless": harmless, "harmful": [p for p in prompts if p.harmful]}
    for name in dict.fromkeys(p.slice for p in harmless if p.slice):
        own = [p for p in harmless if p.slice == name]
        groups |= {f"harmless (slice '{name}')": own} if len(own) >= fewest else {}
    for name, group in groups.items():
        texts = {mark(p) for p in group}
        if (seen := len(texts & learnt)) > MOST * len(texts):
            raise GuardError(
                f"{seen} of the {len(texts)} different {name} prompts to calibrate on are among "
                "those that the guard was fitted on, whose scores would promise too much; give "
                "others of the same kind."
            )
